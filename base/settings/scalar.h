// Texts -> numbers and the other way, strictly: decimal integers without leading zeros, finite
// numbers, units where the schema declares one. Internal to base/settings.
#pragma once

#include <cstdint>
#include <string>

#include "base/status/status.h"
#include "heddle/v1/options.pb.h"

namespace heddle::settings {

// INVALID_ARGUMENT says what is expected instead: "needs an integer (is '010')".
StatusOr<int64_t> ParseInteger(const std::string& text, const v1::KeyOptions& options);
StatusOr<double> ParseNumber(const std::string& text);
StatusOr<bool> ParseBool(const std::string& text);

// "2026-11-20T23:30:00Z" or with an offset "+01:00" -> ms since 1970.
StatusOr<int64_t> ParseTime(const std::string& text);

// True for what ParseInteger reads without a unit.
bool IsInteger(const std::string& text);

}  // namespace heddle::settings
