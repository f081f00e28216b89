#include "worker/trainer/run_plan.h"

#include <google/protobuf/io/coded_stream.h>
#include <google/protobuf/io/zero_copy_stream_impl_lite.h>
#include <xxhash.h>

#include <array>
#include <cstdio>
#include <vector>

namespace heddle::trainer {

namespace {

using heddle::v1::ParallelConfig;
using heddle::v1::RunConfig;
using heddle::v1::TrainingConfig;

std::string HashOf(const RunConfig& config) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);
    config.SerializeToCodedStream(&coded);
  }
  std::array<char, 17> text{};
  std::snprintf(text.data(), text.size(), "%016llx",
                static_cast<unsigned long long>(XXH3_64bits(bytes.data(), bytes.size())));
  return text.data();
}

// Settings of the schema whose code is not in this build: refused by name, never ignored.
void RefuseWhatIsNotHere(const RunConfig& config, std::vector<std::string>* problems) {
  const TrainingConfig& training = config.training();
  const ParallelConfig& parallel = config.parallel();
  const auto refuse = [&](bool wrong, const char* what) {
    if (wrong) {
      problems->push_back(Str(what, " is not in this build"));
    }
  };
  refuse(config.kind() != RunConfig::KIND_TRAIN, "kind: a kind other than train");
  refuse(training.precision() == TrainingConfig::PRECISION_FP8, "training.precision: fp8");
  refuse(training.moments() != TrainingConfig::MOMENTS_FP32, "training.moments: bf16");
  refuse(training.gradient_checkpointing() == TrainingConfig::GRADIENT_CHECKPOINTING_SELECTIVE,
         "training.gradient_checkpointing: selective");
  refuse(training.nan_policy() == TrainingConfig::NAN_POLICY_ROLLBACK,
         "training.nan_policy: rollback");
  refuse(training.accumulation() == TrainingConfig::ACCUMULATION_SYNC_EACH ||
             training.accumulation() == TrainingConfig::ACCUMULATION_LAYER_MAJOR,
         "training.accumulation: a mode other than auto and sync_last");
  refuse(parallel.shard() != ParallelConfig::SHARD_NONE, "parallel.shard: optimizer and full");
  refuse(parallel.expert() != 1, "parallel.expert: more than 1");
  refuse(parallel.backend() == ParallelConfig::BACKEND_MPI, "parallel.backend: mpi");
  refuse(parallel.reduce_dtype() != ParallelConfig::REDUCE_DTYPE_FP32,
         "parallel.reduce_dtype: bf16");
  refuse(config.memory().expert_offloading().enabled(), "memory.expert_offloading");
  refuse(config.model().dropout() > 0, "model.dropout");
}

}  // namespace

StatusOr<RunPlan> PlanRun(const RunConfig& config) {
  const TrainingConfig& training = config.training();
  std::vector<std::string> problems;
  RefuseWhatIsNotHere(config, &problems);

  RunPlan plan;
  plan.max_steps = training.max_steps();
  plan.micro_batch = training.micro_batch_size();
  plan.global_batch = training.global_batch_size();
  if (plan.global_batch == 0) {
    plan.global_batch = int64_t{training.micro_batch_size()} *
                        training.gradient_accumulation_steps() * config.parallel().ranks().max();
  }
  if (plan.global_batch % plan.micro_batch != 0) {
    problems.push_back(Str("training.global_batch_size: ", plan.global_batch,
                           " is no multiple of micro_batch_size ", plan.micro_batch));
  }
  plan.save_interval = config.checkpoint().save_interval();
  plan.eval_interval = config.data().has_eval_path() ? training.eval_interval() : 0;
  if (training.eval_interval() > 0 && !config.data().has_eval_path()) {
    problems.push_back("training.eval_interval: needs data.eval_path");
  }
  plan.log_interval = config.logging().log_interval();
  plan.skip_nonfinite = training.nan_policy() == TrainingConfig::NAN_POLICY_SKIP;
  plan.precision = training.precision() == TrainingConfig::PRECISION_FP32 ? model::Precision::kFp32
                                                                          : model::Precision::kBf16;
  plan.grad_clip = training.grad_clip();
  plan.seed = static_cast<uint64_t>(training.seed());
  plan.schedule = optim::ScheduleOf(training);
  const StatusOr<optim::Hyperparameters> optimizer = optim::HyperparametersOf(training);
  if (optimizer.ok()) {
    plan.optimizer = *optimizer;
  } else {
    problems.push_back(Message(optimizer.status()));
  }
  plan.config_hash = HashOf(config);
  if (problems.empty()) {
    return plan;
  }
  std::string text;
  for (const std::string& problem : problems) {
    text += Str(text.empty() ? "" : "; ", problem);
  }
  return InvalidArgument(text);
}

}  // namespace heddle::trainer
