#include "tests/worker/trainer/job.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>

#include <bit>
#include <filesystem>
#include <fstream>

#include "base/rng/rng.h"
#include "checkpoint/catalog/lineage.h"
#include "checkpoint/format/verify.h"
#include "checkpoint/tensor_io/load.h"
#include "data/pack/prepare.h"
#include "tests/support/status_matchers.h"

namespace heddle::trainer {

using heddle::v1::CheckpointRecord;
using heddle::v1::MetricPoint;
using heddle::v1::RunConfig;

const std::string& DataFolder() {
  static checkpoint::TempDir folder;
  static const std::string path = [] {
    const std::string text = folder.path() + "/text";
    std::filesystem::create_directory(text);
    const Rng rng(7, "words");
    uint64_t at = 0;
    for (int document = 0; document < 200; ++document) {
      std::ofstream file(Str(text, "/", document, ".txt"));
      const uint64_t words = 20 + rng.At(at++) % 60;
      for (uint64_t w = 0; w < words; ++w) {
        file << "word" << rng.At(at++) % 40 << (w % 9 == 8 ? ".\n" : " ");
      }
    }
    pack::PrepareOptions options;
    options.source.inputs = {text};
    options.tokenizer = "bpe:300";
    options.out = folder.path() + "/data";
    options.eval_fraction = 0.2;
    options.threads = 1;
    EXPECT_OK(pack::Prepare(options).status());
    return options.out;
  }();
  return path;
}

RunConfig SmallConfig(int ranks, int64_t steps) {
  RunConfig config;
  heddle::v1::ModelConfig* model = config.mutable_model();
  model->set_vocab_size(300);
  model->set_d_model(64);
  model->set_n_layers(2);
  model->set_n_heads(2);
  model->set_n_kv_heads(1);
  model->set_d_ffn(128);
  heddle::v1::TrainingConfig* training = config.mutable_training();
  training->set_max_steps(steps);
  training->set_warmup_steps(4);
  training->set_learning_rate(3e-3);
  training->set_micro_batch_size(2);
  training->set_global_batch_size(8);
  training->set_max_seq_len(64);
  training->set_precision(heddle::v1::TrainingConfig::PRECISION_FP32);
  training->set_seed(11);
  config.mutable_data()->set_path(DataFolder());
  config.mutable_parallel()->mutable_ranks()->set_min(ranks);
  config.mutable_parallel()->mutable_ranks()->set_max(ranks);
  config.mutable_checkpoint()->set_save_interval(5);
  config.mutable_logging()->set_log_interval(1'000'000);
  return config;
}

Job::Job(RunConfig config, int ranks) : config_(std::move(config)), ranks_(ranks) {
  std::filesystem::create_directory(root());
}

FakeAttemptOptions Job::Next() {
  FakeAttemptOptions options;
  options.binary = Str(getenv("HEDDLE_BIN"), "/heddle-trainer");
  options.folder = folder_.path();
  options.checkpoint_root = root();
  options.config = config_;
  options.fence = ++fence_;
  options.attempt = static_cast<uint32_t>(fence_);
  options.ranks = static_cast<uint32_t>(ranks_);
  options.threads = threads_;
  for (const size_t i : checkpoint::RestoreCandidates(records_)) {
    options.restore.push_back(records_[i]);
  }
  return options;
}

void Job::Collect(FakeAttempt* attempt) {
  for (const CheckpointRecord& record : attempt->committed()) {
    records_.push_back(record);
  }
  for (const auto& [step, point] : attempt->points()) {
    series_[step] = point;
  }
}

void ExpectAll(FakeAttempt* attempt, const std::vector<FakeRankEnd>& ends, ExitCode code) {
  for (size_t rank = 0; rank < ends.size(); ++rank) {
    EXPECT_EQ(ends[rank].code, static_cast<int>(code))
        << "rank " << rank << ", signal " << ends[rank].signal << "\n"
        << attempt->Log(static_cast<uint32_t>(rank));
  }
}

void RunToEnd(Job* job) {
  FakeAttempt attempt(job->Next());
  ExpectAll(&attempt, attempt.Wait(), ExitCode::kDone);
  job->Collect(&attempt);
}

void ExpectSameBits(const std::map<uint64_t, MetricPoint>& a,
                    const std::map<uint64_t, MetricPoint>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (const auto& [step, point] : a) {
    const MetricPoint& other = b.at(step);
    EXPECT_EQ(std::bit_cast<uint64_t>(point.loss()), std::bit_cast<uint64_t>(other.loss()))
        << "step " << step << ": " << point.loss() << " " << other.loss();
    EXPECT_EQ(std::bit_cast<uint64_t>(point.grad_norm()),
              std::bit_cast<uint64_t>(other.grad_norm()))
        << "step " << step;
    EXPECT_EQ(point.batch_hash(), other.batch_hash()) << "step " << step;
    EXPECT_EQ(point.tokens(), other.tokens()) << "step " << step;
  }
}

void ExpectGood(const CheckpointRecord& record, const std::string& root) {
  const checkpoint::VerifyReport report = checkpoint::VerifyCheckpoint(record, root);
  EXPECT_TRUE(report.good()) << ToText(report.problems.front());
}

void KillAt(Job* job, uint64_t step, uint32_t rank) {
  FakeAttempt attempt(job->Next());
  ASSERT_TRUE(attempt.WaitForStep(step));
  attempt.Kill(rank, SIGKILL);
  attempt.Wait(30);
  job->Collect(&attempt);
}

std::map<std::string, std::vector<float>> NewestWeights(Job* job) {
  std::map<std::string, std::vector<float>> weights;
  const auto read = checkpoint::ReadModelWeights(job->records().back(), job->root());
  EXPECT_TRUE(read.ok()) << Message(read.status());
  if (!read.ok()) return weights;
  for (const checkpoint::Weight& weight : *read) weights[weight.name] = weight.values;
  return weights;
}

}  // namespace heddle::trainer
