// Text for people: aligned tables, ages, escaped text of users. Pure functions.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace heddle::cli {

// Columns aligned by display width, two blanks apart; numbers (a column whose cells all start with
// a digit, '-' or '.') to the right. The header is printed also without rows. Ends with a newline.
std::string FormatTable(const std::vector<std::string>& header,
                        const std::vector<std::vector<std::string>>& rows);

// "12s", "3m05s", "2h10m", "4d03h"; "-" for 0 or less.
std::string FormatAge(int64_t milliseconds);

// "2026-11-20T21:30:05Z"; "-" for 0.
std::string FormatTime(int64_t ms_since_1970);

// Fixed digits after the point, "-" when not finite.
std::string FormatFixed(double value, int digits);

// `text` without control characters (reliability S27); newlines stay if `lines`.
std::string Printable(const std::string& text, bool lines = false);

}  // namespace heddle::cli
