// A small training job for the tests of heddle-trainer: tiny data, tiny model, attempts that follow
// each other and hand on their checkpoints.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "heddle/v1/checkpoints.pb.h"
#include "heddle/v1/config.pb.h"
#include "tests/checkpoint/temp_dir.h"
#include "tests/worker/trainer/fake_worker.h"
#include "worker/trainer/exit_code.h"

namespace heddle::trainer {

// One small packed set for all tests of the process (with an eval set in /eval): random words, a
// tokenizer of 300 entries.
const std::string& DataFolder();

// Two layers of width 64, global batch 8, a save every 5 steps, fp32.
heddle::v1::RunConfig SmallConfig(int ranks, int64_t steps);

class Job {
 public:
  Job(heddle::v1::RunConfig config, int ranks);

  // Options of the next attempt: a higher fence, restored from what was committed so far.
  FakeAttemptOptions Next();
  // Takes over what an attempt left: committed checkpoints and its metric series.
  void Collect(FakeAttempt* attempt);

  std::string root() const { return folder_.path() + "/ckpt"; }
  heddle::v1::RunConfig& config() { return config_; }
  void set_ranks(int ranks) { ranks_ = ranks; }
  void set_threads(uint32_t threads) { threads_ = threads; }
  std::vector<heddle::v1::CheckpointRecord>& records() { return records_; }
  const std::map<uint64_t, heddle::v1::MetricPoint>& series() const { return series_; }
  uint64_t saved_step() const { return records_.empty() ? 0 : records_.back().step(); }

 private:
  checkpoint::TempDir folder_;
  heddle::v1::RunConfig config_;
  int ranks_;
  uint32_t threads_ = 1;
  uint64_t fence_ = 0;
  std::vector<heddle::v1::CheckpointRecord> records_;
  std::map<uint64_t, heddle::v1::MetricPoint> series_;
};

// Every rank ended with this code; prints the ranks' logs otherwise.
void ExpectAll(FakeAttempt* attempt, const std::vector<FakeRankEnd>& ends, ExitCode code);
// Runs one attempt to its end.
void RunToEnd(Job* job);
// Loss, gradient norm, batch hash and token count of every step are equal bit for bit.
void ExpectSameBits(const std::map<uint64_t, heddle::v1::MetricPoint>& a,
                    const std::map<uint64_t, heddle::v1::MetricPoint>& b);
// Runs one attempt until `rank` has done `step` steps, and ends it there with SIGKILL.
void KillAt(Job* job, uint64_t step, uint32_t rank);
// Weights and buffers of the newest checkpoint.
std::map<std::string, std::vector<float>> NewestWeights(Job* job);
// The checkpoint verifies.
void ExpectGood(const heddle::v1::CheckpointRecord& record, const std::string& root);

}  // namespace heddle::trainer
