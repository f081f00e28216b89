// The figures of this host that `heddle bench-host` keeps in $HEDDLE_HOME/host_bench.json and
// `heddle plan` uses.
#pragma once

#include <cstdint>
#include <string>

#include "base/status/status.h"
#include "model/training_plan.h"

namespace heddle::cli {

struct KeptFigures {
  model::HostFigures rates;
  std::string host;  // name; empty: nothing was kept
  std::string cpu;
  int64_t measured_at = 0;  // milliseconds since 1970 UTC
  std::string disk_dir;
};

std::string HostFiguresPath(const std::string& home);

// NOT_FOUND: nothing was measured yet; DATA_LOSS: the file is no such record, or of another
// version.
StatusOr<KeptFigures> ReadHostFigures(const std::string& home);

}  // namespace heddle::cli
