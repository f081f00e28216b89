#include "coordinator/schedule/constraint.h"

#include <algorithm>
#include <cstdlib>

namespace heddle::schedule {

namespace {

// The whole text as a number; false if it is none.
bool Number(const std::string& text, double* value) {
  char* end = nullptr;
  *value = std::strtod(text.c_str(), &end);
  return !text.empty() && end == text.c_str() + text.size();
}

}  // namespace

Constraint::Constraint(const std::string& text) {
  const size_t equals = text.find('=');
  if (equals == std::string::npos || equals == 0) {
    return;
  }
  const char before = text[equals - 1];
  const bool two = before == '!' || before == '>';
  test_ = before == '!' ? Test::kUnequal : before == '>' ? Test::kAtLeast : Test::kEqual;
  key_ = text.substr(0, two ? equals - 1 : equals);
  wanted_ = text.substr(equals + 1);
}

bool Constraint::Matches(const std::map<std::string, std::string>& labels) const {
  if (test_ == Test::kNone) {
    return false;
  }
  const auto label = labels.find(key_);
  if (test_ == Test::kUnequal) {
    return label == labels.end() || label->second != wanted_;
  }
  if (label == labels.end()) {
    return false;
  }
  if (test_ == Test::kAtLeast) {
    double have = 0;
    double need = 0;
    return Number(label->second, &have) && Number(wanted_, &need) && have >= need;
  }
  return label->second == wanted_;
}

bool Matches(const std::string& constraint, const std::map<std::string, std::string>& labels) {
  return Constraint(constraint).Matches(labels);
}

bool MatchesAll(const std::vector<std::string>& constraints,
                const std::map<std::string, std::string>& labels) {
  return std::all_of(constraints.begin(), constraints.end(),
                     [&labels](const std::string& one) { return Matches(one, labels); });
}

}  // namespace heddle::schedule
