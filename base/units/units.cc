#include "base/units/units.h"

#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <limits>
#include <optional>

namespace heddle {

namespace {

struct Unit {
  std::string_view name;
  int64_t factor;
};

constexpr std::array<Unit, 9> kByteUnits = {{{"B", 1},
                                             {"KiB", kKiB},
                                             {"MiB", kMiB},
                                             {"GiB", kGiB},
                                             {"TiB", kTiB},
                                             {"kB", 1000},
                                             {"MB", 1000 * 1000},
                                             {"GB", 1000 * 1000 * 1000},
                                             {"TB", int64_t{1000} * 1000 * 1000 * 1000}}};

constexpr int64_t kSecondNs = 1000 * 1000 * 1000;
constexpr std::array<Unit, 7> kTimeUnits = {{{"d", 86400 * kSecondNs},
                                             {"h", 3600 * kSecondNs},
                                             {"m", 60 * kSecondNs},
                                             {"s", kSecondNs},
                                             {"ms", 1000 * 1000},
                                             {"us", 1000},
                                             {"ns", 1}}};

bool EqualIgnoringCase(std::string_view a, std::string_view b) {
  if (a.size() != b.size()) {
    return false;
  }
  for (size_t i = 0; i < a.size(); ++i) {
    if (std::tolower(static_cast<unsigned char>(a[i])) !=
        std::tolower(static_cast<unsigned char>(b[i]))) {
      return false;
    }
  }
  return true;
}

// Takes a decimal number "12" or "1.5" off the front of `text` and returns it times 10^scale, where
// scale is the number of its decimals. No sign, no exponent.
struct Decimal {
  int64_t digits = 0;
  int64_t scale = 1;
};
std::optional<Decimal> TakeDecimal(std::string_view& text) {
  Decimal value;
  size_t i = 0;
  bool point = false;
  bool any = false;
  for (; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '.' && !point && any) {
      point = true;
      continue;
    }
    if (c < '0' || c > '9') {
      break;
    }
    any = true;
    if (__builtin_mul_overflow(value.digits, 10, &value.digits) ||
        __builtin_add_overflow(value.digits, c - '0', &value.digits) ||
        (point && __builtin_mul_overflow(value.scale, 10, &value.scale))) {
      return std::nullopt;
    }
  }
  if (!any || text[i - 1] == '.') {
    return std::nullopt;
  }
  text.remove_prefix(i);
  return value;
}

// digits * factor / scale if that is a whole int64.
std::optional<int64_t> Scale(const Decimal& value, int64_t factor) {
  const __int128 product = static_cast<__int128>(value.digits) * factor;
  if (product % value.scale != 0 || product / value.scale > std::numeric_limits<int64_t>::max()) {
    return std::nullopt;
  }
  return static_cast<int64_t>(product / value.scale);
}

std::string_view Trim(std::string_view text) {
  while (!text.empty() && text.front() == ' ') {
    text.remove_prefix(1);
  }
  while (!text.empty() && text.back() == ' ') {
    text.remove_suffix(1);
  }
  return text;
}

}  // namespace

StatusOr<int64_t> ParseBytes(std::string_view text) {
  std::string_view rest = Trim(text);
  const std::optional<Decimal> number = TakeDecimal(rest);
  const std::string_view unit = rest.empty() ? "B" : Trim(rest);
  if (number.has_value()) {
    for (const Unit& known : kByteUnits) {
      if (!EqualIgnoringCase(unit, known.name)) {
        continue;
      }
      if (const std::optional<int64_t> bytes = Scale(*number, known.factor); bytes.has_value()) {
        return *bytes;
      }
      return InvalidArgument(Str("\"", text, "\" is not a whole number of bytes below 2^63"));
    }
  }
  return InvalidArgument(Str("\"", text, "\" is not a size such as 512, 64MiB or 1.5GiB"));
}

std::string FormatBytes(int64_t bytes) {
  static constexpr std::array<std::string_view, 5> kNames = {"B", "KiB", "MiB", "GiB", "TiB"};
  size_t unit = 0;
  while (bytes != 0 && bytes % 1024 == 0 && unit + 1 < kNames.size()) {
    bytes /= 1024;
    ++unit;
  }
  return Str(bytes, kNames[unit]);
}

std::string ApproximateBytes(int64_t bytes) {
  static constexpr std::array<std::string_view, 5> kNames = {"B", "KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes);
  size_t unit = 0;
  // 1023.95 would print as 1024.0.
  while (std::abs(value) >= 1023.95 && unit + 1 < kNames.size()) {
    value /= 1024;
    ++unit;
  }
  if (unit == 0) {
    return Str(bytes, "B");
  }
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "%.1f", value);
  std::string number = buffer;
  if (number.ends_with(".0")) {
    number.resize(number.size() - 2);
  }
  return number + std::string(kNames[unit]);
}

StatusOr<std::chrono::nanoseconds> ParseDuration(std::string_view text) {
  std::string_view rest = Trim(text);
  if (rest == "0") {
    return std::chrono::nanoseconds(0);
  }
  const Status bad = InvalidArgument(
      Str("\"", text, "\" is not a duration such as 250ms, 10m or 1h30m (below 292 years)"));
  int64_t total = 0;
  size_t next_unit = 0;
  if (rest.empty()) {
    return bad;
  }
  while (!rest.empty()) {
    const std::optional<Decimal> number = TakeDecimal(rest);
    size_t letters = 0;
    while (letters < rest.size() && rest[letters] >= 'a' && rest[letters] <= 'z') {
      ++letters;
    }
    const std::string_view name = rest.substr(0, letters);
    rest.remove_prefix(letters);
    size_t unit = next_unit;
    while (unit < kTimeUnits.size() && kTimeUnits[unit].name != name) {
      ++unit;
    }
    if (!number.has_value() || unit == kTimeUnits.size()) {
      return bad;
    }
    const std::optional<int64_t> part = Scale(*number, kTimeUnits[unit].factor);
    if (!part.has_value() || __builtin_add_overflow(total, *part, &total)) {
      return bad;
    }
    next_unit = unit + 1;
  }
  return std::chrono::nanoseconds(total);
}

std::string FormatDuration(std::chrono::nanoseconds duration) {
  int64_t rest = duration.count();
  if (rest == 0) {
    return "0s";
  }
  std::string out = rest < 0 ? "-" : "";
  for (const Unit& unit : kTimeUnits) {
    const int64_t count = rest / unit.factor;
    rest %= unit.factor;
    if (count != 0) {
      out += Str(count < 0 ? std::to_string(count).substr(1) : std::to_string(count), unit.name);
    }
  }
  return out;
}

std::string ApproximateDuration(std::chrono::nanoseconds duration) {
  const int64_t ns = duration.count();
  for (size_t i = 0; i < kTimeUnits.size(); ++i) {
    if (std::abs(ns) < kTimeUnits[i].factor) {
      continue;
    }
    // Whole units only below a second, two units above.
    const int64_t keep = i < 3 ? kTimeUnits[i + 1].factor : kTimeUnits[i].factor;
    return FormatDuration(std::chrono::nanoseconds(ns / keep * keep));
  }
  return "0s";
}

}  // namespace heddle
