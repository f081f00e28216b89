// Where the command line finds its cluster: $HEDDLE_HOME and the context file that `heddle up`
// writes there ({"coordinator": "unix:...", "state": "..."}).
#pragma once

#include <map>
#include <string>

#include "base/status/status.h"

namespace heddle::cli {

struct CommandContext;

struct LocalContext {
  std::string coordinator;  // address
  std::string state;        // folder of a local cluster
};

// $HEDDLE_HOME, else ~/.heddle, else /tmp/heddle-<uid> without a home.
std::string HomeFolder();

// NOT_FOUND: no context was written yet; DATA_LOSS: the file cannot be read as one.
StatusOr<LocalContext> ReadContext(const std::string& home);

// Written to a temporary name and renamed.
Status WriteContext(const std::string& home, const LocalContext& local);
// Absent is fine.
Status RemoveContext(const std::string& home);

// Whether the user named a coordinator: --coordinator or HEDDLE_COORDINATOR.
bool CoordinatorNamed(const CommandContext& context);

// The process's environment, for ${oc.env:NAME} of configurations.
std::map<std::string, std::string> EnvironmentMap();

// --coordinator, else HEDDLE_COORDINATOR, else the context. UNAVAILABLE says what to do when none
// is known.
StatusOr<std::string> CoordinatorAddress(const CommandContext& context);

}  // namespace heddle::cli
