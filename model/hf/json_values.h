// Values of a JSON object by type, and parsing under limits. Internal to model/hf.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <type_traits>

#include "base/status/status.h"

namespace heddle::hf {

// Parses an object whose brackets nest at most `depth_max` deep: nesting is counted before the
// parser sees the text, so that a file of brackets costs nothing. INVALID_ARGUMENT: deeper, not
// JSON, not an object, or a repeated key.
StatusOr<nlohmann::json> ParseJsonObject(std::string_view text, int depth_max);

// A value of one type, or `otherwise` where the key is absent or null. INVALID_ARGUMENT: another
// type, or an integer out of range.
template <typename T>
StatusOr<T> Get(const nlohmann::json& object, const char* key, T otherwise) {
  const auto found = object.find(key);
  if (found == object.end() || found->is_null()) return otherwise;
  if constexpr (std::is_same_v<T, int32_t>) {
    if (!found->is_number_integer()) return InvalidArgument(Str(key, ": not an integer"));
    const bool large = found->is_number_unsigned() && found->template get<uint64_t>() > INT32_MAX;
    const int64_t wide = large ? INT64_MAX : found->template get<int64_t>();
    if (wide < INT32_MIN || wide > INT32_MAX) return InvalidArgument(Str(key, ": out of range"));
    return static_cast<int32_t>(wide);
  } else {
    const bool fits = std::is_same_v<T, bool>     ? found->is_boolean()
                      : std::is_same_v<T, double> ? found->is_number()
                                                  : found->is_string();
    if (!fits) return InvalidArgument(Str(key, ": unexpected type"));
    return found->template get<T>();
  }
}

}  // namespace heddle::hf
