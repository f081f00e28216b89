// The memory plan against what real trainer processes take (training-runtime.md 18.1, 20.6): within
// five percent of the measured peak, for runs whose own memory is most of it.
//
// What is measured: the peak of memory that is the process's alone. VmHWM also counts pages of
// libraries and of mapped data, which the kernel drops when it needs room, and shared memory. It
// stands at the end of the run with the file pages that are there then; those only grow in a run,
// so that the difference is the peak of the rest, or a little less.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/rng/rng.h"
#include "data/pack/prepare.h"
#include "model/model_plan.h"
#include "model/training_plan.h"
#include "tests/support/status_matchers.h"
#include "tests/support/worker/disk_dir.h"
#include "tests/worker/trainer/job.h"

namespace heddle::trainer {
namespace {

using heddle::v1::ParallelConfig;
using heddle::v1::RunConfig;
using heddle::v1::TrainingConfig;

constexpr double kMiB = 1 << 20;

// Documents longer than any sequence: every batch is full.
const std::string& LongDocuments() {
  static checkpoint::TempDir folder;
  static const std::string path = [] {
    const std::string text = folder.path() + "/text";
    std::filesystem::create_directory(text);
    const Rng rng(8, "words");
    uint64_t at = 0;
    for (int document = 0; document < 4; ++document) {
      std::ofstream file(Str(text, "/", document, ".txt"));
      for (int w = 0; w < 60'000; ++w) {
        file << "word" << rng.At(at++) % 40 << (w % 9 == 8 ? ".\n" : " ");
      }
    }
    pack::PrepareOptions options;
    options.source.inputs = {text};
    options.tokenizer = "bpe:300";
    options.out = folder.path() + "/data";
    options.threads = 1;
    EXPECT_OK(pack::Prepare(options).status());
    return options.out;
  }();
  return path;
}

// kB of a line of /proc/PID/status; 0 when the process is gone.
std::map<std::string, int64_t> StatusOf(int pid) {
  std::ifstream file(Str("/proc/", pid, "/status"));
  std::map<std::string, int64_t> values;
  for (std::string line; std::getline(file, line);) {
    std::istringstream words(line);
    std::string key;
    int64_t value = 0;
    if (words >> key >> value) values[key] = value * 1024;
  }
  return values;
}

struct Measured {
  int64_t peak = 0;  // of the process's own memory
  int64_t sampled = 0;
  int64_t file = 0;
  int64_t shared = 0;
};

// Runs to the end; the largest of the ranks.
Measured Measure(RunConfig config) {
  Job job(config, config.parallel().ranks().max());
  FakeAttempt attempt(job.Next());
  std::atomic<bool> done = false;
  Measured most;
  std::thread watcher([&] {
    while (!done) {
      for (int rank = 0; rank < config.parallel().ranks().max(); ++rank) {
        std::map<std::string, int64_t> status = StatusOf(attempt.pid(static_cast<uint32_t>(rank)));
        if (!status.contains("VmHWM:") || status["VmRSS:"] == 0) continue;
        const int64_t own = status["VmHWM:"] - status["RssFile:"] - status["RssShmem:"];
        most.sampled = std::max(most.sampled, status["RssAnon:"]);
        if (status["RssFile:"] >= most.file) {
          most.file = status["RssFile:"];
          most.peak = own;
        }
        most.peak = std::max(most.peak, status["RssAnon:"]);
        most.shared = std::max(most.shared, status["RssShmem:"]);
      }
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
  });
  ExpectAll(&attempt, attempt.Wait(300), ExitCode::kDone);
  done = true;
  watcher.join();
  return most;
}

RunConfig Base(int ranks, int64_t length) {
  RunConfig config = SmallConfig(ranks, 3);
  heddle::v1::ModelConfig* model = config.mutable_model();
  model->set_vocab_size(8192);
  model->set_d_model(512);
  model->set_n_layers(4);
  model->set_n_heads(8);
  model->set_n_kv_heads(2);
  model->set_head_dim(64);
  model->set_d_ffn(1376);
  model->set_tie_embeddings(false);
  model->set_max_position_embeddings(16384);
  heddle::v1::TrainingConfig* training = config.mutable_training();
  training->set_precision(TrainingConfig::PRECISION_BF16);
  training->set_max_seq_len(static_cast<int32_t>(length));
  training->set_micro_batch_size(1);
  training->set_global_batch_size(ranks);
  config.mutable_checkpoint()->set_save_interval(2);
  config.mutable_data()->set_path(LongDocuments());
  config.mutable_data()->set_num_workers(1);
  return config;
}

// The preset spill-moe, but for the bound and the folder: 16 small experts, which get another
// number of rows in every step. Long enough for what grows with them, and through two saves.
RunConfig SmallExperts(int64_t resident_mb) {
  RunConfig config = SmallConfig(1, 45);
  heddle::v1::ModelConfig* model = config.mutable_model();
  model->set_vocab_size(8192);
  model->set_d_model(256);
  model->set_n_layers(4);
  model->set_n_heads(4);
  model->set_n_kv_heads(2);
  model->set_head_dim(64);
  model->set_d_ffn(688);
  model->set_tie_embeddings(true);
  model->set_max_position_embeddings(16384);
  model->mutable_moe()->set_n_experts(16);
  model->mutable_moe()->set_top_k(2);
  model->mutable_moe()->set_n_shared(1);
  model->mutable_moe()->set_d_expert(256);
  TrainingConfig* training = config.mutable_training();
  training->set_precision(TrainingConfig::PRECISION_BF16);
  training->set_max_seq_len(256);
  training->set_micro_batch_size(8);
  training->set_global_batch_size(8);
  config.mutable_checkpoint()->set_save_interval(20);
  config.mutable_data()->set_path(LongDocuments());
  config.mutable_data()->set_num_workers(1);
  if (resident_mb == 0) return config;
  auto* offloading = config.mutable_memory()->mutable_expert_offloading();
  offloading->set_enabled(true);
  offloading->set_resident_mb(resident_mb);
  offloading->set_spill_dir(test::DiskFolder());
  return config;
}

struct Setting {
  std::string name;
  RunConfig config;
};

std::vector<Setting> DenseSettings() {
  std::vector<Setting> all;
  all.push_back({"dense", Base(1, 2048)});
  all.push_back({"dense_full_2_ranks", Base(2, 2048)});
  all.back().config.mutable_parallel()->set_shard(ParallelConfig::SHARD_FULL);
  all.push_back({"dense_recompute_fp32", Base(1, 2048)});
  all.back().config.mutable_training()->set_precision(TrainingConfig::PRECISION_FP32);
  all.back().config.mutable_training()->set_gradient_checkpointing(
      TrainingConfig::GRADIENT_CHECKPOINTING_FULL);
  all.push_back({"dense_layer_major_2_ranks", Base(2, 1024)});
  all.back().config.mutable_parallel()->set_shard(ParallelConfig::SHARD_FULL);
  all.back().config.mutable_training()->set_global_batch_size(6);
  all.back().config.mutable_training()->set_accumulation(TrainingConfig::ACCUMULATION_LAYER_MAJOR);
  all.push_back({"nsa", Base(1, 2048)});
  {
    heddle::v1::AttentionConfig* attention = all.back().config.mutable_model()->mutable_attention();
    attention->clear_pattern();
    attention->set_kind(heddle::v1::ATTENTION_KIND_NSA);
    attention->mutable_nsa()->set_topk(8);
  }
  all.push_back({"dsa", Base(1, 2048)});
  {
    heddle::v1::AttentionConfig* attention = all.back().config.mutable_model()->mutable_attention();
    attention->clear_pattern();
    attention->set_kind(heddle::v1::ATTENTION_KIND_DSA);
    attention->mutable_dsa()->set_n_indexer_heads(4);
    attention->mutable_dsa()->set_d_indexer(64);
    attention->mutable_dsa()->set_topk(256);
  }
  all.push_back({"selective_bf16_moments", Base(1, 2048)});
  all.back().config.mutable_training()->set_gradient_checkpointing(
      TrainingConfig::GRADIENT_CHECKPOINTING_SELECTIVE);
  all.back().config.mutable_training()->set_moments(TrainingConfig::MOMENTS_BF16);
  return all;
}

// Several micro-batches visit an expert at a time, on one rank or on two, which hold rows of each
// other's for all of them. `offloaded` is of one rank.
std::vector<Setting> MergedSettings(const RunConfig& offloaded) {
  std::vector<Setting> all;
  all.push_back({"moe_merged", offloaded});
  all.back().config.mutable_training()->set_max_seq_len(1024);
  all.back().config.mutable_training()->set_global_batch_size(4);
  all.back().config.mutable_training()->set_accumulation(TrainingConfig::ACCUMULATION_LAYER_MAJOR);
  all.push_back({"moe_merged_recomputed", all.back().config});
  all.back().config.mutable_training()->set_global_batch_size(8);
  all.back().config.mutable_training()->set_gradient_checkpointing(
      TrainingConfig::GRADIENT_CHECKPOINTING_FULL);
  all.push_back({"moe_merged_divided", all.front().config});
  RunConfig& config = all.back().config;
  config.mutable_parallel()->set_expert(2);
  config.mutable_parallel()->mutable_ranks()->set_min(2);
  config.mutable_parallel()->mutable_ranks()->set_max(2);
  config.mutable_parallel()->set_shard(ParallelConfig::SHARD_FULL);
  config.mutable_training()->set_global_batch_size(8);
  config.mutable_training()->set_gradient_checkpointing(
      TrainingConfig::GRADIENT_CHECKPOINTING_SELECTIVE);
  config.mutable_memory()->mutable_expert_offloading()->set_resident_mb(37);
  all.push_back({"moe_merged_divided_full", config});
  all.back().config.mutable_training()->set_gradient_checkpointing(
      TrainingConfig::GRADIENT_CHECKPOINTING_FULL);
  return all;
}

std::vector<Setting> ExpertSettings() {
  std::vector<Setting> all;
  all.push_back({"moe", Base(1, 2048)});
  {
    heddle::v1::MoeConfig* moe = all.back().config.mutable_model()->mutable_moe();
    moe->set_n_experts(8);
    moe->set_top_k(2);
    moe->set_n_shared(1);
    moe->set_d_expert(344);
  }
  // Experts of 148 MiB; half of them in memory, then the other half on each of two ranks.
  all.push_back({"moe_offloaded", all.back().config});
  {
    heddle::v1::ExpertOffloadingConfig* offloading =
        all.back().config.mutable_memory()->mutable_expert_offloading();
    offloading->set_enabled(true);
    offloading->set_resident_mb(74);
    offloading->set_spill_dir(test::DiskFolder());
  }
  for (Setting& one : MergedSettings(all.back().config)) all.push_back(std::move(one));
  all.push_back({"moe_divided", all[1].config});
  all.back().config.clear_memory();
  all.back().config.mutable_parallel()->set_expert(2);
  all.back().config.mutable_parallel()->mutable_ranks()->set_min(2);
  all.back().config.mutable_parallel()->mutable_ranks()->set_max(2);
  all.back().config.mutable_parallel()->set_shard(ParallelConfig::SHARD_FULL);
  all.back().config.mutable_training()->set_global_batch_size(2);
  all.push_back({"small_experts", SmallExperts(0)});
  all.push_back({"small_experts_spilled", SmallExperts(72)});
  // Copies of blocks that left the resident set stay in host memory, beside it.
  all.push_back({"small_experts_in_an_arena", SmallExperts(72)});
  all.back().config.mutable_memory()->mutable_expert_offloading()->clear_spill_dir();
  all.back().config.mutable_training()->set_max_steps(4);
  // Two of four ranks share an expert: their collectives go through buffers of their own.
  all.push_back({"shared_experts", Base(4, 256)});
  {
    RunConfig& config = all.back().config;
    config.mutable_model()->set_n_layers(2);
    config.mutable_training()->set_max_steps(
        14);  // until kernels for all numbers of rows are there
    heddle::v1::MoeConfig* moe = config.mutable_model()->mutable_moe();
    moe->set_n_experts(4);
    moe->set_top_k(2);
    moe->set_d_expert(2752);
    config.mutable_parallel()->set_expert(2);
    config.mutable_parallel()->set_shard(ParallelConfig::SHARD_FULL);
  }
  return all;
}

std::vector<Setting> Settings() {
  std::vector<Setting> all = DenseSettings();
  for (Setting& one : ExpertSettings()) all.push_back(std::move(one));
  return all;
}

class Memory : public testing::TestWithParam<Setting> {};

TEST_P(Memory, PlanIsWithinFivePercentOfThePeak) {
  const Setting& setting = GetParam();
  const model::RankMemory plan = model::EstimateRank(setting.config);
  const Measured measured = Measure(setting.config);
  std::printf("%-28s peak %.1f MiB, plan %.1f (%+.1f %%)\n", setting.name.c_str(),
              measured.peak / kMiB, model::BytesPerRank(setting.config) / kMiB,
              100.0 * model::BytesPerRank(setting.config) / measured.peak - 100);
  for (const model::NamedBytes& one : model::MemoryCategories(plan)) {
    std::printf("  %s %.1f", one.name, one.bytes / kMiB);
  }
  std::printf("\n  beside it: files %.1f, shared %.1f\n", measured.file / kMiB,
              measured.shared / kMiB);
  const double peak = static_cast<double>(measured.peak);
  EXPECT_NEAR(static_cast<double>(model::BytesPerRank(setting.config)), peak, 0.05 * peak);
}

INSTANTIATE_TEST_SUITE_P(Runs, Memory, testing::ValuesIn(Settings()),
                         [](const auto& info) { return info.param.name; });

}  // namespace
}  // namespace heddle::trainer
