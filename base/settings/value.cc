#include "base/settings/value.h"

#include <algorithm>

namespace heddle::settings {
namespace {

constexpr size_t kShownMax = 60;
constexpr size_t kProblemsPrinted = 100;

void Show(const Value& value, std::string& out) {
  if (out.size() > kShownMax) {
    return;
  }
  switch (value.kind) {
    case Value::Kind::kNull:
      out += "null";
      return;
    case Value::Kind::kScalar:
      out += value.text.substr(0, kShownMax + 1);
      return;
    case Value::Kind::kList:
      out += '[';
      for (size_t i = 0; i < value.items.size(); ++i) {
        out += i == 0 ? "" : ", ";
        Show(value.items[i], out);
      }
      out += ']';
      return;
    case Value::Kind::kMap:
      out += '{';
      for (size_t i = 0; i < value.members.size(); ++i) {
        out += i == 0 ? "" : ", ";
        out += value.members[i].first.text + ": ";
        Show(value.members[i].second, out);
      }
      out += '}';
      return;
  }
}

}  // namespace

Value Value::Scalar(std::string text, bool quoted) {
  Value value;
  value.kind = Kind::kScalar;
  value.text = std::move(text);
  value.quoted = quoted;
  return value;
}

bool SameContent(const Value& a, const Value& b) {
  if (a.kind != b.kind || a.text != b.text || a.items.size() != b.items.size() ||
      a.members.size() != b.members.size()) {
    return false;
  }
  const auto same_member = [](const auto& x, const auto& y) {
    return x.first.text == y.first.text && SameContent(x.second, y.second);
  };
  return std::equal(a.items.begin(), a.items.end(), b.items.begin(), SameContent) &&
         std::equal(a.members.begin(), a.members.end(), b.members.begin(), same_member);
}

std::string Shown(const Value& value) {
  std::string out;
  Show(value, out);
  if (out.size() > kShownMax) {
    size_t end = kShownMax;
    while (end > 0 && (static_cast<unsigned char>(out[end]) & 0xC0) == 0x80) {
      --end;  // never cut inside a UTF-8 character
    }
    out.resize(end);
    out += "...";
  }
  return out;
}

void Problems::Add(std::string where, std::string key, std::string text) {
  problems_.push_back({std::move(where), std::move(key), std::move(text)});
}

Status Problems::ToStatus() const {
  if (problems_.empty()) {
    return OkStatus();
  }
  std::string out;
  for (size_t i = 0; i < std::min(problems_.size(), kProblemsPrinted); ++i) {
    const Problem& problem = problems_[i];
    out += i == 0 ? "" : "\n";
    out += problem.where.empty() ? "" : problem.where + ": ";
    out += problem.key.empty() ? "" : problem.key + ": ";
    out += problem.text;
  }
  if (problems_.size() > kProblemsPrinted) {
    out += Str("\nand ", problems_.size() - kProblemsPrinted, " more problems");
  }
  return InvalidArgument(out);
}

}  // namespace heddle::settings
