// One seed from start to end: a coordinator, workers, users and faults; then faults stop and
// everything must settle.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "tests/simulation/plan.h"

namespace heddle::simulation {

struct Result {
  uint64_t seed = 0;
  uint64_t trace_hash = 0;
  uint64_t steps = 0;
  uint64_t events = 0;   // journal length
  uint64_t commits = 0;  // checkpoints committed
  uint64_t attempts = 0;
  int64_t simulated_ms = 0;
  std::vector<std::string> violations;
};

// Pure: the same arguments give the same result.
Result RunSeed(uint64_t seed, Mutant mutant,
               const std::function<void(const std::string&)>& log = nullptr);

struct Totals {
  uint64_t seeds = 0;
  uint64_t failed = 0;
  uint64_t first_failed = 0;
  std::string first_violation;
  std::vector<std::string> failures;  // one line per failed seed
  uint64_t steps = 0;
  uint64_t events = 0;
  uint64_t commits = 0;
  uint64_t attempts = 0;
  double simulated_hours = 0;
};
// Seeds first .. first + count - 1. Stops at the first violation if `stop_at_first`.
Totals RunSeeds(uint64_t first, uint64_t count, Mutant mutant, bool stop_at_first);

}  // namespace heddle::simulation
