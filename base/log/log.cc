#include "base/log/log.h"

#include <fcntl.h>
#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/basic_file_sink.h>
#include <spdlog/sinks/stdout_sinks.h>
#include <spdlog/spdlog.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <memory>
#include <mutex>
#include <utility>

namespace heddle::log {

namespace {

constexpr std::array<std::pair<std::string_view, Level>, 5> kNames = {{{"debug", Level::kDebug},
                                                                       {"info", Level::kInfo},
                                                                       {"warn", Level::kWarn},
                                                                       {"error", Level::kError},
                                                                       {"off", Level::kOff}}};

spdlog::level::level_enum ToSpdlog(Level level) {
  switch (level) {
    case Level::kDebug:
      return spdlog::level::debug;
    case Level::kInfo:
      return spdlog::level::info;
    case Level::kWarn:
      return spdlog::level::warn;
    case Level::kError:
      return spdlog::level::err;
    case Level::kOff:
      break;
  }
  return spdlog::level::off;
}

// The one log of the process. It is never destroyed, so that threads may log until the very end.
struct Process {
  std::mutex mutex;  // guards logger and options
  std::shared_ptr<spdlog::logger> logger;
  Options options;
  std::atomic<Level> level = Level::kInfo;
};

std::shared_ptr<spdlog::logger> MakeLogger(const Options& options, spdlog::sink_ptr sink) {
  auto logger = std::make_shared<spdlog::logger>(options.name, std::move(sink));
  const std::string name = options.name.empty() ? "" : "%n: ";
  logger->set_formatter(std::make_unique<spdlog::pattern_formatter>(
      "%Y-%m-%dT%H:%M:%S.%eZ %L " + name + "%v", spdlog::pattern_time_type::utc));
  logger->set_level(spdlog::level::trace);
  logger->flush_on(spdlog::level::trace);
  return logger;
}

Process& TheProcess() {
  static Process* const process = [] {
    auto* made = new Process;
    made->logger = MakeLogger({}, std::make_shared<spdlog::sinks::stderr_sink_mt>());
    return made;
  }();
  return *process;
}

StatusOr<std::shared_ptr<spdlog::logger>> OpenLogger(const Options& options) {
  if (options.file.empty()) {
    return MakeLogger(options, std::make_shared<spdlog::sinks::stderr_sink_mt>());
  }
  // spdlog reports a failed open by an exception; opening first gives errno and the mode.
  const int fd = open(options.file.c_str(), O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0640);
  if (fd < 0) {
    return FromErrno("open log file", options.file);
  }
  close(fd);
  try {
    return MakeLogger(options, std::make_shared<spdlog::sinks::basic_file_sink_mt>(options.file));
  } catch (const spdlog::spdlog_ex& error) {
    return Unavailable(Str("open log file ", options.file, ": ", error.what()));
  }
}

bool NeedsQuotes(std::string_view value) {
  if (value.empty()) {
    return true;
  }
  for (const char c : value) {
    if (static_cast<unsigned char>(c) <= ' ' || c == '"' || c == '=' || c == '\\' || c == 0x7f) {
      return true;
    }
  }
  return false;
}

void AppendValue(std::string& out, std::string_view value) {
  if (!NeedsQuotes(value)) {
    out += value;
    return;
  }
  out += '"';
  for (const char c : value) {
    if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n') {
      out += "\\n";
    } else if (c == '\t') {
      out += "\\t";
    } else if (static_cast<unsigned char>(c) < ' ' || c == 0x7f) {
      char buffer[8];
      std::snprintf(buffer, sizeof(buffer), "\\x%02x", static_cast<unsigned char>(c));
      out += buffer;
    } else {
      out += c;
    }
  }
  out += '"';
}

}  // namespace

StatusOr<Level> ParseLevel(std::string_view text) {
  for (const auto& [name, level] : kNames) {
    if (name == text) {
      return level;
    }
  }
  return InvalidArgument(Str("\"", text, "\" is not a log level (debug, info, warn, error, off)"));
}

Status Init(const Options& options) {
  ASSIGN_OR_RETURN(std::shared_ptr<spdlog::logger> logger, OpenLogger(options));
  Process& process = TheProcess();
  const std::lock_guard lock(process.mutex);
  process.logger = std::move(logger);
  process.options = options;
  process.level = options.level;
  return OkStatus();
}

Status Reopen() {
  Process& process = TheProcess();
  const std::lock_guard lock(process.mutex);
  ASSIGN_OR_RETURN(process.logger, OpenLogger(process.options));
  return OkStatus();
}

bool Enabled(Level level) { return level >= TheProcess().level.load(std::memory_order_relaxed); }

std::string FormatLine(std::string_view text, std::initializer_list<Field> fields) {
  std::string line(text);
  for (const Field& field : fields) {
    line += ' ';
    line += field.key;
    line += '=';
    AppendValue(line, field.value);
  }
  return line;
}

void Write(Level level, std::string_view text, std::initializer_list<Field> fields) {
  const std::string line = FormatLine(text, fields);
  Process& process = TheProcess();
  std::shared_ptr<spdlog::logger> logger;
  {
    const std::lock_guard lock(process.mutex);
    logger = process.logger;
  }
  logger->log(ToSpdlog(level), spdlog::string_view_t(line.data(), line.size()));
}

}  // namespace heddle::log
