#include "cli/commands/context.h"

#include <sys/stat.h>
#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>

#include "cli/commands/verb.h"

namespace heddle::cli {
namespace {

std::string ContextPath(const std::string& home) { return Str(home, "/context.json"); }

std::string Environment(const char* name) {
  const char* value = std::getenv(name);
  return value == nullptr ? "" : value;
}

}  // namespace

std::string HomeFolder() {
  if (std::string home = Environment("HEDDLE_HOME"); !home.empty()) {
    return home;
  }
  if (const std::string home = Environment("HOME"); !home.empty()) {
    return Str(home, "/.heddle");
  }
  return Str("/tmp/heddle-", getuid());
}

StatusOr<LocalContext> ReadContext(const std::string& home) {
  std::ifstream file(ContextPath(home));
  if (!file) {
    return NotFound(Str("no context in ", home, ": start a cluster with `heddle up`"));
  }
  std::stringstream text;
  text << file.rdbuf();
  const nlohmann::json json = nlohmann::json::parse(text.str(), nullptr, false);
  if (!json.is_object() || !json.contains("coordinator") || !json["coordinator"].is_string()) {
    return DataLoss(Str(ContextPath(home), ": not a context file: remove it and call `heddle up`"));
  }
  return LocalContext{.coordinator = json["coordinator"].get<std::string>(),
                      .state = json.value("state", "")};
}

Status WriteContext(const std::string& home, const LocalContext& local) {
  if (mkdir(home.c_str(), 0700) != 0 && errno != EEXIST) {
    return FromErrno("cannot make", home);
  }
  const std::string path = ContextPath(home);
  const std::string temporary = Str(path, ".tmp");
  {
    std::ofstream file(temporary, std::ios::trunc);
    file << nlohmann::json{{"coordinator", local.coordinator}, {"state", local.state}}.dump()
         << "\n";
    if (!file.flush()) {
      return FromErrno("cannot write", temporary);
    }
  }
  if (rename(temporary.c_str(), path.c_str()) != 0) {
    return FromErrno("cannot write", path);
  }
  return OkStatus();
}

Status RemoveContext(const std::string& home) {
  if (unlink(ContextPath(home).c_str()) != 0 && errno != ENOENT) {
    return FromErrno("cannot remove", ContextPath(home));
  }
  return OkStatus();
}

bool CoordinatorNamed(const CommandContext& context) {
  return !context.coordinator.empty() || !Environment("HEDDLE_COORDINATOR").empty();
}

std::map<std::string, std::string> EnvironmentMap() {
  std::map<std::string, std::string> environment;
  for (char** entry = environ; *entry != nullptr; ++entry) {
    const std::string text = *entry;
    if (const size_t equals = text.find('='); equals != std::string::npos) {
      environment[text.substr(0, equals)] = text.substr(equals + 1);
    }
  }
  return environment;
}

StatusOr<std::string> CoordinatorAddress(const CommandContext& context) {
  if (!context.coordinator.empty()) {
    return context.coordinator;
  }
  if (const std::string address = Environment("HEDDLE_COORDINATOR"); !address.empty()) {
    return address;
  }
  const StatusOr<LocalContext> local = ReadContext(context.home);
  if (!local.ok()) {
    return Unavailable(
        Str("no coordinator: give --coordinator, set HEDDLE_COORDINATOR or start a local cluster "
            "with `heddle up` (",
            Message(local.status()), ")"));
  }
  return local->coordinator;
}

}  // namespace heddle::cli
