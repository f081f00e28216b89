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

bool Matches(const std::string& constraint, const std::map<std::string, std::string>& labels) {
  const size_t equals = constraint.find('=');
  if (equals == std::string::npos || equals == 0) {
    return false;
  }
  const char before = constraint[equals - 1];
  const bool two = before == '!' || before == '>';
  const std::string key = constraint.substr(0, two ? equals - 1 : equals);
  const std::string wanted = constraint.substr(equals + 1);
  const auto label = labels.find(key);
  if (before == '!') {
    return label == labels.end() || label->second != wanted;
  }
  if (label == labels.end()) {
    return false;
  }
  if (before == '>') {
    double have = 0;
    double need = 0;
    return Number(label->second, &have) && Number(wanted, &need) && have >= need;
  }
  return label->second == wanted;
}

bool MatchesAll(const std::vector<std::string>& constraints,
                const std::map<std::string, std::string>& labels) {
  return std::all_of(constraints.begin(), constraints.end(),
                     [&labels](const std::string& one) { return Matches(one, labels); });
}

}  // namespace heddle::schedule
