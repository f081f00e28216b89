// Hydra's override grammar: `a.b=v`, `+a.b=v`, `++a.b=v`, `~a.b`, `group@pkg=option`, sweeps,
// quotes, lists, maps. What of Hydra is not here is refused by name (formats.md section 8).
// Internal to base/settings.
#pragma once

#include <string>
#include <vector>

#include "base/settings/value.h"
#include "base/status/status.h"

namespace heddle::settings {

struct Override {
  enum class Kind { kSet, kAdd, kForce, kDelete };
  Kind kind = Kind::kSet;
  std::string text;     // as typed
  std::string key;      // dotted, or a group's name
  std::string package;  // after '@'; empty: none
  bool has_value = false;
  // One value, or the elements of a sweep.
  std::vector<Value> choices;
  bool is_sweep = false;
  std::string glob;  // `glob(PATTERN)`: choices are the group's options that match
};

// INVALID_ARGUMENT: "override 'TEXT': PROBLEM".
StatusOr<Override> ParseOverride(const std::string& text);

// True if `name` matches `pattern`, where `*` is any text and `?` any character.
bool MatchesGlob(const std::string& pattern, const std::string& name);

}  // namespace heddle::settings
