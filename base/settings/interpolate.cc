// ${path} and ${oc.env:NAME,default} in values; the rest of OmegaConf's resolvers is refused by
// name.
#include <algorithm>

#include "base/settings/bind.h"
#include "base/settings/compose.h"

namespace heddle::settings {
namespace {

constexpr int kDepthOfReferencesMax = 16;
constexpr size_t kResultBytesMax = 64 << 10;

// What a config may learn about its user's environment: nothing secret has these names.
bool IsAllowedVariable(const std::string& name) {
  static const std::vector<std::string> names = {"HOME",   "USER",         "LOGNAME", "HOSTNAME",
                                                 "TMPDIR", "SLURM_JOB_ID", "PWD"};
  return name.rfind("HEDDLE_", 0) == 0 ||
         std::find(names.begin(), names.end(), name) != names.end();
}

bool HasInterpolation(const Value& value) { return value.text.find("${") != std::string::npos; }

}  // namespace

void Composer::Interpolate() {
  // Values are resolved against the originals, so the order of keys does not matter.
  const Assignments original = assignments_;
  for (auto& [key, assignment] : assignments_) {
    Value value = original.at(key).value;
    InterpolateValue(value, assignment, 0);
    assignment.value = std::move(value);
  }
}

// The text of ${expression}; `whole` is set when it names a list or map.
std::string Composer::Resolve(const std::string& expression, int depth, std::string& problem,
                              const Value** whole) {
  const size_t colon = expression.find(':');
  if (colon != std::string::npos) {
    const std::string resolver = expression.substr(0, colon);
    if (resolver != "oc.env") {
      problem = Str("the resolver ", resolver.substr(0, 40), " is not supported");
      return "";
    }
    const size_t comma = expression.find(',', colon);
    const std::string name =
        expression.substr(colon + 1, comma == std::string::npos ? comma : comma - colon - 1);
    if (!IsAllowedVariable(name)) {
      problem = Str("the environment variable ", name.substr(0, 40),
                    " may not be read (HEDDLE_*, HOME, USER, LOGNAME, HOSTNAME, TMPDIR, PWD, "
                    "SLURM_JOB_ID may)");
      return "";
    }
    const auto found = options_.environment.find(name);
    if (found != options_.environment.end()) {
      return found->second;
    }
    if (comma == std::string::npos) {
      problem = Str("the environment variable ", name, " is not set and has no default");
      return "";
    }
    const size_t start = expression.find_first_not_of(' ', comma + 1);
    return start == std::string::npos ? "" : expression.substr(start);
  }
  if (expression.empty() || expression[0] == '.') {
    problem = "relative interpolation is not supported";
    return "";
  }
  const StatusOr<KeyRef> key = schema_.Find(expression);
  if (!key.ok()) {
    problem = Str("${", expression.substr(0, 100), "}: ", Message(key.status()));
    return "";
  }
  const auto found = assignments_.find(key->canonical);
  if (found == assignments_.end()) {
    return DefaultText(*key->leaf());
  }
  if (depth >= kDepthOfReferencesMax) {
    problem = Str("interpolations nest deeper than ", kDepthOfReferencesMax, ", or in a circle");
    return "";
  }
  const Value& value = found->second.value;
  if (value.kind != Value::Kind::kScalar) {
    *whole = &value;
    return "";
  }
  Value copy = value;
  const size_t before = problems_.all().size();
  InterpolateValue(copy, found->second, depth + 1);
  if (problems_.all().size() != before) {
    problem = Str("${", expression.substr(0, 100), "} cannot be read");
  }
  return copy.text;
}

void Composer::InterpolateValue(Value& value, const Assignment& owner, int depth) {
  for (Value& item : value.items) {
    InterpolateValue(item, owner, depth);
  }
  for (auto& member : value.members) {
    InterpolateValue(member.second, owner, depth);
  }
  if (value.kind != Value::Kind::kScalar || !HasInterpolation(value)) {
    return;
  }
  const std::string text = value.text;
  std::string out;
  std::string problem;
  for (size_t i = 0; i < text.size() && problem.empty();) {
    if (text.compare(i, 3, "\\${") == 0) {
      out += "${";
      i += 3;
      continue;
    }
    if (text.compare(i, 2, "${") != 0) {
      out += text[i++];
      continue;
    }
    const size_t end = text.find('}', i);
    const std::string expression = end == std::string::npos ? "" : text.substr(i + 2, end - i - 2);
    if (end == std::string::npos || expression.find("${") != std::string::npos) {
      problem = end == std::string::npos ? "'}' of an interpolation is missing"
                                         : "an interpolation inside another is not supported";
      break;
    }
    const Value* whole = nullptr;
    out += Resolve(expression, depth, problem, &whole);
    if (whole != nullptr && problem.empty()) {
      if (i != 0 || end + 1 != text.size()) {
        problem = Str("${", expression, "} is not one value and cannot stand inside a text");
        break;
      }
      Value copy = *whole;
      copy.line = value.line;
      copy.column = value.column;
      value = std::move(copy);
      return;
    }
    i = end + 1;
    if (out.size() > kResultBytesMax) {
      problem = Str("the result is longer than ", kResultBytesMax, " bytes");
    }
  }
  if (!problem.empty()) {
    problems_.Add(owner.origin, owner.spelled, problem);
    return;
  }
  value.text = std::move(out);
}

}  // namespace heddle::settings
