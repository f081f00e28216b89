#include "base/settings/scalar.h"

#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>

#include "base/units/units.h"

namespace heddle::settings {
namespace {

bool IsDigit(char c) { return c >= '0' && c <= '9'; }

// Digits of `text` from `i` on as a number; -1 unless there are exactly `count`.
int Digits(const std::string& text, size_t i, size_t count) {
  int value = 0;
  for (size_t k = i; k < i + count; ++k) {
    if (k >= text.size() || !IsDigit(text[k])) {
      return -1;
    }
    value = value * 10 + (text[k] - '0');
  }
  return value;
}

}  // namespace

bool IsInteger(const std::string& text) {
  const size_t start = !text.empty() && text[0] == '-' ? 1 : 0;
  if (start == text.size() || (text[start] == '0' && text.size() > start + 1)) {
    return false;
  }
  for (size_t i = start; i < text.size(); ++i) {
    if (!IsDigit(text[i])) {
      return false;
    }
  }
  return true;
}

StatusOr<int64_t> ParseInteger(const std::string& text, const v1::KeyOptions& options) {
  if (!options.zero_word().empty() && text == options.zero_word()) {
    return int64_t{0};
  }
  if (IsInteger(text)) {
    int64_t value = 0;
    const auto end = std::from_chars(text.data(), text.data() + text.size(), value);
    if (end.ec != std::errc()) {
      return InvalidArgument(Str("the number ", text.substr(0, 40), " is too large"));
    }
    return value;
  }
  switch (options.unit()) {
    case v1::KeyOptions::UNIT_DURATION_MS: {
      const StatusOr<std::chrono::nanoseconds> duration = ParseDuration(text);
      if (!duration.ok()) {
        return InvalidArgument(
            Str("needs a duration such as 10m, 1h30m or 500ms (is '", text.substr(0, 40), "')"));
      }
      return std::chrono::duration_cast<std::chrono::milliseconds>(*duration).count();
    }
    case v1::KeyOptions::UNIT_BYTES: {
      const StatusOr<int64_t> bytes = ParseBytes(text);
      return bytes.ok() ? bytes
                        : InvalidArgument(Str("needs bytes such as 64MiB or 2GB (is '",
                                              text.substr(0, 40), "')"));
    }
    case v1::KeyOptions::UNIT_TIME_MS:
      return ParseTime(text);
    default:
      break;
  }
  const std::string word =
      options.zero_word().empty() ? "" : Str(" or `", options.zero_word(), "`");
  return InvalidArgument(Str("needs a decimal integer", word, " (is '", text.substr(0, 40), "')"));
}

StatusOr<double> ParseNumber(const std::string& text) {
  const auto refuse = [&](const std::string& what) {
    return InvalidArgument(Str(what, " (is '", text.substr(0, 40), "')"));
  };
  size_t i = !text.empty() && text[0] == '-' ? 1 : 0;
  const size_t whole = i;
  while (i < text.size() && IsDigit(text[i])) {
    ++i;
  }
  bool digits = i > whole;
  if (i - whole > 1 && text[whole] == '0') {
    return refuse("needs a number without leading zeros");
  }
  if (i < text.size() && text[i] == '.') {
    const size_t fraction = ++i;
    while (i < text.size() && IsDigit(text[i])) {
      ++i;
    }
    digits = digits || i > fraction;
  }
  if (digits && i < text.size() && (text[i] == 'e' || text[i] == 'E')) {
    ++i;
    i += i < text.size() && (text[i] == '+' || text[i] == '-') ? 1 : 0;
    const size_t exponent = i;
    while (i < text.size() && IsDigit(text[i])) {
      ++i;
    }
    digits = i > exponent;
  }
  if (!digits || i != text.size()) {
    return refuse("needs a number");
  }
  // from_chars reads neither a leading '.' with digits missing nor '+' in front; both are excluded.
  double value = 0;
  const auto end = std::from_chars(text.data(), text.data() + text.size(), value);
  if (end.ec != std::errc() || end.ptr != text.data() + text.size() || !std::isfinite(value)) {
    return refuse("needs a finite number");
  }
  return value;
}

StatusOr<bool> ParseBool(const std::string& text) {
  if (text == "true" || text == "false") {
    return text == "true";
  }
  return InvalidArgument(Str("needs true or false (is '", text.substr(0, 40), "')"));
}

StatusOr<int64_t> ParseTime(const std::string& text) {
  const auto refuse = [&] {
    return InvalidArgument(
        Str("needs a time such as 2026-11-20T23:30:00Z (is '", text.substr(0, 40), "')"));
  };
  const int year = Digits(text, 0, 4);
  const int month = Digits(text, 5, 2);
  const int day = Digits(text, 8, 2);
  const int hour = Digits(text, 11, 2);
  const int minute = Digits(text, 14, 2);
  const int second = Digits(text, 17, 2);
  if (year < 1970 || month < 1 || day < 1 || hour < 0 || hour > 23 || minute < 0 || minute > 59 ||
      second < 0 || second > 59 || text[4] != '-' || text[7] != '-' || text[10] != 'T' ||
      text[13] != ':' || text[16] != ':') {
    return refuse();
  }
  const std::chrono::year_month_day date{std::chrono::year(year),
                                         std::chrono::month(static_cast<unsigned>(month)),
                                         std::chrono::day(static_cast<unsigned>(day))};
  int offset_minutes = 0;
  const std::string zone = text.substr(19);
  if (zone != "Z") {
    const int hours = Digits(zone, 1, 2);
    const int minutes = Digits(zone, 4, 2);
    if (zone.size() != 6 || (zone[0] != '+' && zone[0] != '-') || zone[3] != ':' || hours < 0 ||
        hours > 23 || minutes < 0 || minutes > 59) {
      return refuse();
    }
    offset_minutes = (zone[0] == '+' ? 1 : -1) * (hours * 60 + minutes);
  }
  if (!date.ok()) {
    return refuse();
  }
  const int64_t days = std::chrono::sys_days(date).time_since_epoch().count();
  const int64_t seconds = ((days * 24 + hour) * 60 + minute - offset_minutes) * 60 + second;
  return seconds * 1000;
}

}  // namespace heddle::settings
