// What to change where memory does not suffice (training-runtime.md 18.2, 18.3): by computed
// effect, the cheapest first. Torch-free: coordinator and plan use it.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace heddle::v1 {
class RunConfig;
}

namespace heddle::model {

struct MemoryEstimate;

// Categories of an estimate by the names that reports use, in the order of the struct.
std::vector<std::pair<const char*, int64_t>> Categories(const MemoryEstimate& estimate);

struct MemoryChange {
  std::vector<std::string> settings;  // "training.micro_batch_size=4"; what --set takes
  int64_t bytes = 0;                  // EstimateMemory().Total() with them
};
// Changes with which the plan of a rank is at most `limit_bytes`: single ones that suffice, else
// the shortest sequence of them that does, else none. In order of what they cost: sharding the
// optimizer, smaller micro-batches with as many more of them, selective and full recomputation,
// sharding everything, bf16 moments. At most three. REQUIRES: PlanModel(config.model()).ok().
std::vector<MemoryChange> ChangesThatFit(const heddle::v1::RunConfig& config, int64_t limit_bytes);

// "5.1 GiB", "12.0 MiB".
std::string BytesText(int64_t bytes);

}  // namespace heddle::model
