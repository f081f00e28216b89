#include "base/settings/override_parser.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "base/settings/json.h"
#include "base/settings/scalar.h"
#include "base/settings/utf8.h"
#include "heddle/v1/options.pb.h"

namespace heddle::settings {
namespace {

constexpr size_t kTextBytesMax = 64 << 10;
constexpr size_t kSweepMax = 10000;

bool IsWordChar(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_';
}

// Functions of Hydra's grammar that change how values are made; none of them is needed here.
const std::set<std::string>& RefusedFunctions() {
  static const std::set<std::string> names = {"interval", "sort",       "shuffle", "tag",
                                              "int",      "float",      "str",     "bool",
                                              "json_str", "extend_list"};
  return names;
}

class ValueParser {
 public:
  explicit ValueParser(const std::string& text) : text_(text) {}

  Status Parse(Override& out) {
    SkipBlanks();
    if (AtEnd()) {
      out.choices.push_back(Value::Scalar("", true));
      return OkStatus();
    }
    const std::string function = FunctionName();
    if (!function.empty()) {
      return ParseFunction(function, out);
    }
    ASSIGN_OR_RETURN(std::vector<Value> elements, ParseElements('\0'));
    out.is_sweep = elements.size() > 1;
    out.choices = std::move(elements);
    return OkStatus();
  }

 private:
  bool AtEnd() const { return i_ >= text_.size(); }
  char Peek() const { return AtEnd() ? '\0' : text_[i_]; }
  void SkipBlanks() {
    while (Peek() == ' ' || Peek() == '\t') {
      ++i_;
    }
  }

  // The name of a call that starts here, such as "choice" of `choice(1,2)`; empty if there is none.
  std::string FunctionName() const {
    size_t end = i_;
    while (end < text_.size() && IsWordChar(text_[end])) {
      ++end;
    }
    return end > i_ && end < text_.size() && text_[end] == '(' ? text_.substr(i_, end - i_) : "";
  }

  Status ParseFunction(const std::string& name, Override& out) {
    if (name != "choice" && name != "range" && name != "glob") {
      return InvalidArgument(
          RefusedFunctions().count(name) > 0
              ? Str("Hydra's ", name, "() is not supported")
              : Str("unknown function ", name, "(); put the text in quotes if it is a value"));
    }
    i_ += name.size() + 1;
    ASSIGN_OR_RETURN(const std::vector<Value> arguments, ParseElements(')'));
    SkipBlanks();
    if (!AtEnd()) {
      return InvalidArgument(Str("unexpected text after ", name, "(...)"));
    }
    out.is_sweep = true;
    if (name == "choice") {
      out.choices = arguments;
      return out.choices.empty() ? InvalidArgument("choice() needs values") : OkStatus();
    }
    if (name == "range") {
      return ExpandRange(arguments, out);
    }
    if (arguments.size() != 1 || arguments[0].kind != Value::Kind::kScalar) {
      return InvalidArgument("glob() takes one pattern here");
    }
    out.glob = arguments[0].text;
    return OkStatus();
  }

  // range(stop), range(start, stop), range(start, stop, step); stop is excluded.
  static Status ExpandRange(const std::vector<Value>& arguments, Override& out) {
    std::vector<double> numbers;
    bool integers = true;
    for (const Value& argument : arguments) {
      ASSIGN_OR_RETURN(const double number, ParseNumber(argument.text));
      numbers.push_back(number);
      integers = integers && IsInteger(argument.text);
    }
    if (numbers.empty() || numbers.size() > 3) {
      return InvalidArgument("range() takes stop, or start, stop and step");
    }
    const double start = numbers.size() == 1 ? 0 : numbers[0];
    const double stop = numbers.size() == 1 ? numbers[0] : numbers[1];
    const double step = numbers.size() == 3 ? numbers[2] : 1;
    const double count = std::ceil((stop - start) / step - 1e-9);
    if (step == 0 || !(count >= 1)) {
      return InvalidArgument("range() is empty");
    }
    if (count > static_cast<double>(kSweepMax)) {
      return InvalidArgument(Str("range() has more than ", kSweepMax, " values"));
    }
    for (int k = 0; k < static_cast<int>(count); ++k) {
      const double value = start + k * step;
      out.choices.push_back(Value::Scalar(integers ? Str(static_cast<int64_t>(std::llround(value)))
                                                   : JsonNumber(value)));
    }
    return OkStatus();
  }

  // Comma-separated elements up to `end` ('\0': the end of the text), which is consumed.
  StatusOr<std::vector<Value>> ParseElements(char end) {
    std::vector<Value> out;
    SkipBlanks();
    if (end != '\0' && Peek() == end) {
      ++i_;
      return out;
    }
    while (true) {
      ASSIGN_OR_RETURN(Value value, ParseValue(end));
      out.push_back(std::move(value));
      if (out.size() > kSweepMax) {
        return InvalidArgument(Str("more than ", kSweepMax, " values"));
      }
      SkipBlanks();
      if (Peek() == ',') {
        ++i_;
        continue;
      }
      if (end == '\0' ? AtEnd() : Peek() == end) {
        i_ += end == '\0' ? 0 : 1;
        return out;
      }
      return InvalidArgument(AtEnd() ? Str("'", end, "' is missing")
                                     : Str("unexpected '", Peek(), "' at byte ", i_ + 1));
    }
  }

  StatusOr<Value> ParseValue(char end) {
    SkipBlanks();
    if (++depth_ > kDepthMax) {
      return InvalidArgument(Str("nested deeper than ", kDepthMax));
    }
    StatusOr<Value> value = ParseValueHere(end);
    --depth_;
    return value;
  }

  StatusOr<Value> ParseValueHere(char end) {
    if (Peek() == '\'' || Peek() == '"') {
      ASSIGN_OR_RETURN(std::string text, ParseQuoted());
      return Value::Scalar(std::move(text), true);
    }
    if (Peek() == '[') {
      ++i_;
      Value list;
      list.kind = Value::Kind::kList;
      ASSIGN_OR_RETURN(list.items, ParseElements(']'));
      return list;
    }
    if (Peek() == '{') {
      ++i_;
      return ParseMap();
    }
    const std::string function = FunctionName();
    if (!function.empty()) {
      return InvalidArgument(Str(function, "() is not supported inside another value"));
    }
    ASSIGN_OR_RETURN(std::string text, ParsePlain(end, false));
    if (text.empty()) {
      return InvalidArgument(Str("an empty value at byte ", i_ + 1, " (use '' for an empty text)"));
    }
    Value value = Value::Scalar(std::move(text));
    if (value.text == "null") {
      value = Value();
    }
    return value;
  }

  StatusOr<Value> ParseMap() {
    Value map;
    map.kind = Value::Kind::kMap;
    SkipBlanks();
    while (Peek() != '}') {
      SkipBlanks();
      std::string key;
      if (Peek() == '\'' || Peek() == '"') {
        ASSIGN_OR_RETURN(key, ParseQuoted());
      } else {
        ASSIGN_OR_RETURN(key, ParsePlain('}', true));
      }
      SkipBlanks();
      if (key.empty() || Peek() != ':') {
        return InvalidArgument(Str("a map needs KEY: VALUE at byte ", i_ + 1));
      }
      ++i_;
      for (const auto& member : map.members) {
        if (member.first.text == key) {
          return InvalidArgument(Str(key, ": duplicate key"));
        }
      }
      ASSIGN_OR_RETURN(Value value, ParseValue('}'));
      map.members.push_back({Value::Key{key, 0, 0}, std::move(value)});
      SkipBlanks();
      if (Peek() == ',') {
        ++i_;
        SkipBlanks();
      } else if (Peek() != '}') {
        return InvalidArgument("'}' is missing");
      }
    }
    ++i_;
    return map;
  }

  StatusOr<std::string> ParseQuoted() {
    const char quote = text_[i_++];
    std::string out;
    while (!AtEnd() && Peek() != quote) {
      const bool escape = Peek() == '\\' && i_ + 1 < text_.size() &&
                          (text_[i_ + 1] == quote || text_[i_ + 1] == '\\');
      i_ += escape ? 1 : 0;
      out += text_[i_++];
    }
    if (AtEnd()) {
      return InvalidArgument("a quote is not closed");
    }
    ++i_;
    return out;
  }

  // Text without quotes up to a ',' or the end of its list or map; `${...}` may hold anything.
  StatusOr<std::string> ParsePlain(char end, bool is_key) {
    std::string out;
    int interpolation = 0;
    while (!AtEnd()) {
      const char c = Peek();
      if (c == '$' && i_ + 1 < text_.size() && text_[i_ + 1] == '{') {
        ++interpolation;
        out += "${";
        i_ += 2;
        continue;
      }
      if (interpolation > 0) {
        interpolation -= c == '}' ? 1 : 0;
        out += c;
        ++i_;
        continue;
      }
      if (c == ',' || (end != '\0' && c == end) || (is_key && c == ':')) {
        break;
      }
      if (c == '[' || c == ']' || c == '{' || c == '}' || c == '(' || c == ')' || c == '\'' ||
          c == '"') {
        return InvalidArgument(Str("unexpected '", c, "' at byte ", i_ + 1,
                                   "; put the text in quotes or a backslash before it"));
      }
      if (c == '\\' && i_ + 1 < text_.size()) {
        ++i_;
      }
      out += text_[i_++];
    }
    if (interpolation > 0) {
      return InvalidArgument("'}' of an interpolation is missing");
    }
    while (!out.empty() && (out.back() == ' ' || out.back() == '\t')) {
      out.pop_back();
    }
    return out;
  }

  const std::string& text_;
  size_t i_ = 0;
  int depth_ = 0;
};

Status CheckKey(const Override& out) {
  if (out.key.empty()) {
    return InvalidArgument("needs KEY=VALUE");
  }
  if (out.key.rfind("hydra", 0) == 0 &&
      (out.key.size() == 5 || out.key[5] == '.' || out.key[5] == '/')) {
    return InvalidArgument("Hydra's own settings (hydra.*) do not exist here");
  }
  if (out.package.find(':') != std::string::npos) {
    return InvalidArgument("renaming a package (@from:to) is not supported");
  }
  for (const char c : out.key) {
    if (!IsWordChar(c) && c != '.' && c != '-' && c != '/') {
      return InvalidArgument(Str("a key cannot contain '", c, "'"));
    }
  }
  return OkStatus();
}

Status ParseInto(Override& out) {
  const std::string& text = out.text;
  size_t offset = 0;
  if (text.size() > kTextBytesMax || !IsUtf8(text, &offset) ||
      text.find('\0') != std::string::npos) {
    return InvalidArgument("too long or not a text");
  }
  size_t start = 0;
  if (text.rfind("++", 0) == 0) {
    out.kind = Override::Kind::kForce;
    start = 2;
  } else if (text.rfind('+', 0) == 0) {
    out.kind = Override::Kind::kAdd;
    start = 1;
  } else if (text.rfind('~', 0) == 0) {
    out.kind = Override::Kind::kDelete;
    start = 1;
  } else if (text.rfind('-', 0) == 0) {
    return InvalidArgument("needs KEY=VALUE; flags stand before the overrides");
  }
  const size_t equals = text.find('=');
  out.key = text.substr(start, equals == std::string::npos ? equals : equals - start);
  if (const size_t at = out.key.find('@'); at != std::string::npos) {
    out.package = out.key.substr(at + 1);
    out.key = out.key.substr(0, at);
  }
  RETURN_IF_ERROR(CheckKey(out));
  out.has_value = equals != std::string::npos;
  if (!out.has_value) {
    return out.kind == Override::Kind::kDelete ? OkStatus() : InvalidArgument("needs KEY=VALUE");
  }
  const std::string value = text.substr(equals + 1);
  return ValueParser(value).Parse(out);
}

}  // namespace

StatusOr<Override> ParseOverride(const std::string& text) {
  Override out;
  out.text = text;
  if (Status status = ParseInto(out); !status.ok()) {
    return InvalidArgument(Str("override '", text.substr(0, 200), "': ", Message(status)));
  }
  return out;
}

bool MatchesGlob(const std::string& pattern, const std::string& name) {
  size_t p = 0;
  size_t n = 0;
  size_t star = std::string::npos;
  size_t retry = 0;
  while (n < name.size()) {
    if (p < pattern.size() && (pattern[p] == '?' || pattern[p] == name[n])) {
      ++p;
      ++n;
    } else if (p < pattern.size() && pattern[p] == '*') {
      star = p++;
      retry = n;
    } else if (star != std::string::npos) {
      p = star + 1;
      n = ++retry;
    } else {
      return false;
    }
  }
  while (p < pattern.size() && pattern[p] == '*') {
    ++p;
  }
  return p == pattern.size();
}

}  // namespace heddle::settings
