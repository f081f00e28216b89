// Logs as one constant text and key/value pairs (architecture S37, S38):
//   HEDDLE_INFO("attempt started", {"job", id}, {"attempt", number});
//   2026-03-01T12:00:00.123Z I attempt started job=j-0000000000001 attempt=2
// error = a human must act, warn = degraded, info = a state changed, debug = for development.
// Values are evaluated only when the level is on. Thread-safe; lines are never mixed or cut.
#pragma once

#include <initializer_list>
#include <string>
#include <string_view>

#include "base/status/status.h"

namespace heddle::log {

enum class Level { kDebug = 0, kInfo = 1, kWarn = 2, kError = 3, kOff = 4 };

struct Field {
  template <typename T>
  Field(std::string_view key, const T& value) : key(key), value(Str(value)) {}
  std::string_view key;
  std::string value;
};

struct Options {
  Level level = Level::kInfo;
  // Appended to and created with mode 0640; stderr if empty.
  std::string file;
  // Printed after the level, such as "coordinator" or "rank 3"; nothing if empty.
  std::string name;
};

// "debug", "info", "warn", "error", "off"; INVALID_ARGUMENT otherwise.
StatusOr<Level> ParseLevel(std::string_view text);

// Replaces the process's log, which before the first call is stderr at info. Errors of opening the
// file leave the old log in place. Safe while other threads log.
Status Init(const Options& options);

// Opens the file again under its name, after a log rotation moved it. OK without a file.
Status Reopen();

bool Enabled(Level level);

// Writes one line and hands it to the kernel before returning. `text` is constant; values with
// blanks, quotes, '=' or control characters are quoted, with \n, \t, \", \\ and \xNN as escapes.
void Write(Level level, std::string_view text, std::initializer_list<Field> fields);

// The part of the line after time, level and name; for tests and for relays.
std::string FormatLine(std::string_view text, std::initializer_list<Field> fields);

}  // namespace heddle::log

#define HEDDLE_LOG_AT(level, text, ...)                 \
  do {                                                  \
    if (::heddle::log::Enabled(level)) {                \
      ::heddle::log::Write(level, text, {__VA_ARGS__}); \
    }                                                   \
  } while (false)
#define HEDDLE_DEBUG(text, ...) \
  HEDDLE_LOG_AT(::heddle::log::Level::kDebug, text __VA_OPT__(, ) __VA_ARGS__)
#define HEDDLE_INFO(text, ...) \
  HEDDLE_LOG_AT(::heddle::log::Level::kInfo, text __VA_OPT__(, ) __VA_ARGS__)
#define HEDDLE_WARN(text, ...) \
  HEDDLE_LOG_AT(::heddle::log::Level::kWarn, text __VA_OPT__(, ) __VA_ARGS__)
#define HEDDLE_ERROR(text, ...) \
  HEDDLE_LOG_AT(::heddle::log::Level::kError, text __VA_OPT__(, ) __VA_ARGS__)
