// Bytes and durations as text in configs, flags, logs and tables.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/status/status.h"

namespace heddle {

inline constexpr int64_t kKiB = int64_t{1} << 10;
inline constexpr int64_t kMiB = int64_t{1} << 20;
inline constexpr int64_t kGiB = int64_t{1} << 30;
inline constexpr int64_t kTiB = int64_t{1} << 40;

// "64MiB", "1.5GiB", "512" (bytes), "2kB" (decimal): a number of at most 2^63-1 bytes and a unit of
// B, KiB, MiB, GiB, TiB, kB, MB, GB, TB, in any case, blanks between allowed. INVALID_ARGUMENT for
// everything else: negative, no number, unknown unit, overflow, a fraction of a byte.
StatusOr<int64_t> ParseBytes(std::string_view text);

// The shortest exact form in binary units ("64MiB", "1000B", "1536MiB"): ParseBytes gives the same
// number back.
std::string FormatBytes(int64_t bytes);
// For people: at most one decimal, "1.4GiB".
std::string ApproximateBytes(int64_t bytes);

// "10m", "1h30m", "250ms", "1.5s", "2d": numbers with units ns, us, ms, s, m, h, d, largest first,
// each unit once. A bare "0" is allowed; other bare numbers have no unit and are INVALID_ARGUMENT,
// as are negative values and overflow of int64 nanoseconds.
StatusOr<std::chrono::nanoseconds> ParseDuration(std::string_view text);

// The shortest exact form: "1h30m", "250ms", "0s". ParseDuration gives the same value back.
std::string FormatDuration(std::chrono::nanoseconds duration);
// For people: the two largest units, "1h30m", "3m12s", "450ms".
std::string ApproximateDuration(std::chrono::nanoseconds duration);

}  // namespace heddle
