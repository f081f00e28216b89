// The ranks of an attempt as threads of the test's process, with the trainer's own parts, so that a
// test can damage one rank's numbers without a hook in the product: a decorator of its communicator
// for gradients, of its control for parameters, of its data for a batch. Commits are decided by the
// real coverage check, as in fake_worker.h.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "heddle/v1/checkpoints.pb.h"
#include "heddle/v1/config.pb.h"
#include "heddle/v1/control.pb.h"
#include "worker/trainer/run_state.h"
#include "worker/trainer/train_loop.h"

namespace heddle::trainer {

// Called in one rank's thread; all may be empty. `step` counts steps done before this one.
struct Injection {
  // This rank's own share of gradients before a sum over ranks.
  std::function<void(int rank, int64_t step, std::span<float> gradients)> gradients;
  // Before a step's data are read.
  std::function<void(int rank, int64_t step, RunState* state)> parameters;
  // Before global sequence `index` is read.
  std::function<void(int rank, int64_t index, RunState* state)> sequence;
};

struct AttemptInput {
  heddle::v1::RunConfig config;
  std::string root;  // of checkpoints
  uint64_t fence = 1;
  std::vector<heddle::v1::CheckpointRecord> restore;  // best first
  std::vector<heddle::v1::DataWindow> skipped;
  Injection injection;
};

struct AttemptResult {
  std::vector<StatusOr<LoopEnd>> ends;                 // per rank
  std::map<uint64_t, heddle::v1::MetricPoint> points;  // of rank 0, by step
  std::vector<heddle::v1::CheckpointRecord> committed;
  uint64_t start_step = 0;
};

AttemptResult RunAttempt(const AttemptInput& input);

}  // namespace heddle::trainer
