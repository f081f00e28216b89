#include "model/training_plan.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <utility>

#include "base/units/units.h"
#include "heddle/v1/config.pb.h"
#include "heddle/v1/jobs.pb.h"

namespace heddle::model {
namespace {

using heddle::v1::ModelConfig;
using heddle::v1::ParallelConfig;
using heddle::v1::RunConfig;
using heddle::v1::TrainingConfig;

// Of the copy that a save makes while training waits, one thread; measured 5.6.
constexpr double kCopyBytesPerSecond = 5e9;
// Pages of libraries and of mapped data, which the kernel drops when it needs room.
constexpr int64_t kReclaimableBytes = int64_t{128} << 20;
// Between a plan and the peak that was measured.
constexpr double kPlanError = 0.05;

int64_t RanksOf(const RunConfig& config) { return std::max(1, config.parallel().ranks().max()); }

int64_t ElementBytes(const TrainingConfig& training) {
  return training.precision() == TrainingConfig::PRECISION_FP32 ? 4 : 2;
}

// Multiply-adds of the feed-forward layers that one token visits, times 2.
double FeedForwardFlops(const ModelConfig& model, const ModelPlan& plan) {
  const heddle::v1::MoeConfig& moe = model.moe();
  double weights = 0;
  for (const TensorSpec& tensor : plan.tensors) {
    if (tensor.shape.size() != 2 || tensor.name.find(".mlp.") == std::string::npos) continue;
    const bool routed = tensor.name.find(".experts.") != std::string::npos;
    const double share =
        routed && moe.n_experts() > 0 ? static_cast<double>(moe.top_k()) / moe.n_experts() : 1.0;
    weights += share * static_cast<double>(tensor.elements);
  }
  return 2 * weights;
}

double FlopsPerTokenOf(const RunConfig& config, const ModelPlan& plan) {
  const TokenFlops flops = FlopsPerToken(config.model(), config.training().max_seq_len());
  switch (config.training().gradient_checkpointing()) {
    case TrainingConfig::GRADIENT_CHECKPOINTING_FULL:
      return flops.training + flops.forward_weights + flops.forward_core;
    case TrainingConfig::GRADIENT_CHECKPOINTING_SELECTIVE:
      return flops.training + FeedForwardFlops(config.model(), plan);
    default:
      return flops.training;
  }
}

// That a rank sends in a step (formula 1, for all its micro-batches).
double CommunicationBytes(const RunConfig& config, const ModelPlan& plan) {
  const double ranks = static_cast<double>(RanksOf(config));
  const double others = (ranks - 1) / ranks;
  const double parameters = static_cast<double>(plan.flat_elements);
  const double element = static_cast<double>(ElementBytes(config.training()));
  const double reduce =
      config.parallel().reduce_dtype() == ParallelConfig::REDUCE_DTYPE_BF16 ? 2 : 4;
  const auto accumulation = AccumulationOf(config.training(), config.parallel());
  const double batches =
      static_cast<double>(MicroBatchesPerRank(config.training(), config.parallel()));
  const double passes = accumulation == TrainingConfig::ACCUMULATION_LAYER_MAJOR ? 1 : batches;
  const double reductions = accumulation == TrainingConfig::ACCUMULATION_SYNC_EACH ? batches : 1;
  switch (config.parallel().shard()) {
    case ParallelConfig::SHARD_NONE:  // reduced and gathered in fp32, once
      return 2 * 4 * parameters * others;
    case ParallelConfig::SHARD_OPTIMIZER:
      return (element + reduce * reductions) * parameters * others;
    case ParallelConfig::SHARD_FULL:
    default:
      return (2 * element * passes + reduce * reductions) * parameters * others;
  }
}

// ---- changes ----

struct Step {
  const char* price;
  // Changes the configuration and returns "key=value"; empty where it has no effect.
  std::function<std::string(RunConfig*)> apply;
};

std::string Shard(RunConfig* config, ParallelConfig::Shard shard, const char* word) {
  if (RanksOf(*config) == 1 || config->parallel().shard() >= shard) return "";
  config->mutable_parallel()->set_shard(shard);
  return Str("parallel.shard=", word);
}

std::string Recompute(RunConfig* config, TrainingConfig::GradientCheckpointing how,
                      const char* word) {
  TrainingConfig* training = config->mutable_training();
  const auto now = training->gradient_checkpointing();
  const bool less = now == TrainingConfig::GRADIENT_CHECKPOINTING_NONE ||
                    (now == TrainingConfig::GRADIENT_CHECKPOINTING_SELECTIVE &&
                     how == TrainingConfig::GRADIENT_CHECKPOINTING_FULL);
  if (!less) return "";
  training->set_gradient_checkpointing(how);
  return Str("training.gradient_checkpointing=", word);
}

// The same sequences a step, fewer at a time.
std::string DivideMicroBatch(RunConfig* config) {
  TrainingConfig* training = config->mutable_training();
  const int32_t now = training->micro_batch_size();
  int32_t by = 2;
  while (by < now && now % by != 0) ++by;
  if (now < 2) return "";
  training->set_micro_batch_size(now / by);
  if (training->global_batch_size() > 0) return Str("training.micro_batch_size=", now / by);
  training->set_gradient_accumulation_steps(training->gradient_accumulation_steps() * by);
  return Str("training.micro_batch_size=", now / by,
             " training.gradient_accumulation_steps=", training->gradient_accumulation_steps());
}

// By what they cost: nothing but rounding, then communication, then computation.
const std::vector<Step>& Steps() {
  static const std::vector<Step> steps = {
      {"a little more communication",
       [](RunConfig* config) {
         return Shard(config, ParallelConfig::SHARD_OPTIMIZER, "optimizer");
       }},
      {"smaller matrix products", DivideMicroBatch},
      {"moments rounded stochastically",
       [](RunConfig* config) -> std::string {
         if (config->training().moments() == TrainingConfig::MOMENTS_BF16) return "";
         config->mutable_training()->set_moments(TrainingConfig::MOMENTS_BF16);
         return "training.moments=bf16";
       }},
      {"the feed-forward layers computed twice",
       [](RunConfig* config) {
         return Recompute(config, TrainingConfig::GRADIENT_CHECKPOINTING_SELECTIVE, "selective");
       }},
      {"weights gathered twice a micro-batch",
       [](RunConfig* config) { return Shard(config, ParallelConfig::SHARD_FULL, "full"); }},
      {"about a third more computation",
       [](RunConfig* config) {
         return Recompute(config, TrainingConfig::GRADIENT_CHECKPOINTING_FULL, "full");
       }},
      {"other arithmetic",
       [](RunConfig* config) -> std::string {
         if (config->training().precision() != TrainingConfig::PRECISION_FP32) return "";
         config->mutable_training()->set_precision(TrainingConfig::PRECISION_BF16);
         return "training.precision=bf16";
       }},
  };
  return steps;
}

}  // namespace

std::vector<NamedBytes> MemoryCategories(const MemoryEstimate& memory) {
  std::vector<NamedBytes> all = {
      {"weights", memory.compute_weights}, {"masters", memory.master},
      {"moments", memory.moments},         {"gradients", memory.gradients},
      {"gathered", memory.gathered},       {"checkpoint", memory.checkpoint},
      {"buffers", memory.buffers},         {"activations", memory.activations},
      {"workspace", memory.workspace},     {"runtime", kRuntimeBytes}};
  std::erase_if(all, [](const NamedBytes& one) { return one.bytes == 0; });
  return all;
}

int64_t BytesPerRank(const RunConfig& config) {
  return EstimateMemory(config.model(), config.training(), config.parallel()).Total() +
         kRuntimeBytes;
}

std::string SettingsText(const Change& change) {
  std::string text;
  for (const std::string& setting : change.settings) text += Str(text.empty() ? "" : " ", setting);
  return text;
}

std::vector<Change> ChangesThatFit(const RunConfig& config, int64_t limit,
                                   const std::string& without) {
  const int64_t now = BytesPerRank(config);
  const auto is_left_out = [&without](const std::string& setting) {
    return setting.empty() || (!without.empty() && setting.rfind(without + "=", 0) == 0);
  };
  std::vector<Change> fits;
  for (const Step& step : Steps()) {
    RunConfig changed = config;
    std::string setting = step.apply(&changed);
    if (is_left_out(setting)) continue;
    const int64_t bytes = BytesPerRank(changed);
    if (bytes <= limit && bytes < now) fits.push_back({{std::move(setting)}, bytes, step.price});
  }
  if (!fits.empty()) return fits;
  // One on top of the other, those without effect left out; micro-batches as small as they go.
  RunConfig changed = config;
  Change row;
  row.bytes = now;
  for (const Step& step : Steps()) {
    for (bool again = true; again;) {
      RunConfig next = changed;
      const std::string setting = step.apply(&next);
      const int64_t bytes = is_left_out(setting) ? row.bytes : BytesPerRank(next);
      again = bytes < row.bytes;
      if (!again) break;
      // A second halving replaces the first.
      const std::string key = setting.substr(0, setting.find('='));
      std::erase_if(row.settings,
                    [&key](const std::string& one) { return one.rfind(key + "=", 0) == 0; });
      row.settings.push_back(setting);
      if (row.price.find(step.price) == std::string::npos) {
        row.price += Str(row.price.empty() ? "" : ", ", step.price);
      }
      row.bytes = bytes;
      changed = std::move(next);
      if (bytes <= limit) return {row};
    }
  }
  return {};
}

StepEstimate EstimateStep(const RunConfig& config, const HostFigures& host) {
  StepEstimate step;
  const StatusOr<ModelPlan> plan = PlanModel(config.model());
  if (!plan.ok()) return step;
  const TrainingConfig& training = config.training();
  const int64_t ranks = RanksOf(config);
  const int64_t batches = MicroBatchesPerRank(training, config.parallel());
  const int64_t sequences = training.global_batch_size() > 0
                                ? training.global_batch_size()
                                : batches * training.micro_batch_size() * ranks;
  step.tokens = sequences * training.max_seq_len();
  step.flops_per_token = FlopsPerTokenOf(config, *plan);
  step.communication_bytes = ranks > 1 ? CommunicationBytes(config, *plan) : 0;
  if (host.matmul_flops <= 0 || (ranks > 1 && host.link_bytes <= 0)) return step;
  // The rank with most micro-batches holds the others up.
  const double most = static_cast<double>(batches * training.micro_batch_size()) *
                      static_cast<double>(training.max_seq_len());
  step.compute_seconds = most * step.flops_per_token / host.matmul_flops;
  step.communication_seconds = ranks > 1 ? step.communication_bytes / host.link_bytes : 0;
  const bool beside = config.parallel().shard() != ParallelConfig::SHARD_NONE;
  step.step_seconds = beside ? std::max(step.compute_seconds, step.communication_seconds)
                             : step.compute_seconds + step.communication_seconds;
  step.tokens_per_second = static_cast<double>(step.tokens) / step.step_seconds;
  step.bound = step.communication_seconds > step.compute_seconds ? "communication" : "compute";
  return step;
}

StorageEstimate EstimateStorage(const RunConfig& config, double step_seconds) {
  StorageEstimate storage;
  const StatusOr<ModelPlan> plan = PlanModel(config.model());
  if (!plan.ok()) return storage;
  const TrainingConfig& training = config.training();
  const int64_t moments = training.optimizer() == TrainingConfig::OPTIMIZER_LION ? 1 : 2;
  const int64_t moment_bytes = training.moments() == TrainingConfig::MOMENTS_BF16 ? 2 : 4;
  storage.checkpoint_bytes =
      plan->parameters * (4 + moments * moment_bytes) + 4 * plan->buffer_elements;
  storage.save_steps = config.checkpoint().save_interval();
  if (storage.save_steps > 0) {
    storage.save_seconds = step_seconds * static_cast<double>(storage.save_steps);
  } else {
    const double copied = static_cast<double>(storage.checkpoint_bytes / RanksOf(config));
    storage.save_seconds =
        SaveIntervalSeconds(copied / kCopyBytesPerSecond, kMeanTimeToFailureSeconds);
    if (step_seconds > 0) {
      storage.save_steps = std::max<int64_t>(1, std::llround(storage.save_seconds / step_seconds));
    }
  }
  int64_t kept = std::max(2, config.checkpoint().keep_last());
  if (storage.save_steps > 0) {
    kept = std::min(kept, training.max_steps() / storage.save_steps + 1);
  }
  if (config.checkpoint().keep_every() > 0) {
    kept += training.max_steps() / config.checkpoint().keep_every();
  }
  storage.kept_bytes = (kept + 1) * storage.checkpoint_bytes;
  return storage;
}

int64_t DefaultReservation(const RunConfig& config) {
  const int64_t plan = BytesPerRank(config);
  return plan + plan / 10 + kReclaimableBytes;
}

namespace {

int64_t ReservedFor(const RunConfig& config) {
  return config.parallel().memory_per_rank() > 0 ? config.parallel().memory_per_rank()
                                                 : DefaultReservation(config);
}

std::vector<std::string> ChangeLines(const RunConfig& config, int64_t limit) {
  std::vector<std::string> lines;
  for (const Change& change : ChangesThatFit(config, limit)) {
    lines.push_back(
        Str(SettingsText(change), ": ", ApproximateBytes(change.bytes), " (", change.price, ")"));
  }
  return lines;
}

void FillMemory(const RunConfig& config, heddle::v1::PlanReply::Memory* memory) {
  int64_t sum = 0;
  for (const NamedBytes& one :
       MemoryCategories(EstimateMemory(config.model(), config.training(), config.parallel()))) {
    heddle::v1::MemoryUse* use = memory->add_categories();
    use->set_name(one.name);
    use->set_planned(static_cast<uint64_t>(one.bytes));
    sum += one.bytes;
  }
  memory->set_bytes_per_rank(static_cast<uint64_t>(sum));
  memory->set_reserved_per_rank(static_cast<uint64_t>(ReservedFor(config)));
  memory->set_fits(true);
}

const char* WordOf(TrainingConfig::Accumulation accumulation) {
  switch (accumulation) {
    case TrainingConfig::ACCUMULATION_SYNC_EACH:
      return "sync_each";
    case TrainingConfig::ACCUMULATION_LAYER_MAJOR:
      return "layer_major";
    default:
      return "sync_last";
  }
}

void FillThroughput(const RunConfig& config, const HostFigures& host, const StepEstimate& step,
                    heddle::v1::PlanReply* plan) {
  heddle::v1::PlanReply::Throughput* throughput = plan->mutable_throughput();
  throughput->set_flops_per_token(step.flops_per_token);
  throughput->set_accumulation(WordOf(AccumulationOf(config.training(), config.parallel())));
  if (host.matmul_flops > 0) throughput->set_matmul_flops(host.matmul_flops);
  if (step.tokens_per_second == 0) {
    plan->add_warnings(
        RanksOf(config) > 1
            ? "tokens per second are not known without figures of the hosts: give --matmul-tflops "
              "and --link-gbs"
            : "tokens per second are not known without a figure of the host: give --matmul-tflops");
    return;
  }
  throughput->set_tokens_per_second(step.tokens_per_second);
  throughput->set_step_seconds(step.step_seconds);
  throughput->set_communication_seconds(step.communication_seconds);
  throughput->set_bound(step.bound);
}

}  // namespace

Status CheckReservation(const RunConfig& config) {
  const int64_t given = config.parallel().memory_per_rank();
  const int64_t plan = BytesPerRank(config);
  if (config.kind() != RunConfig::KIND_TRAIN || given == 0 ||
      static_cast<double>(given) >= (1 - kPlanError) * static_cast<double>(plan)) {
    return OkStatus();
  }
  std::string changes;
  for (const std::string& line : ChangeLines(config, given)) {
    changes += Str(changes.empty() ? "; any of these fits: " : ", ", line);
  }
  if (changes.empty()) changes = "; no setting of this version brings it below that";
  return InvalidArgument(Str("parallel.memory_per_rank: ", ApproximateBytes(given),
                             " are less than the ", ApproximateBytes(plan),
                             " that a rank of this run takes (heddle plan shows the parts)",
                             changes));
}

void FillPlan(const RunConfig& config, const HostFigures& host, heddle::v1::PlanReply* plan) {
  const StatusOr<ModelPlan> model = PlanModel(config.model());
  if (model.ok()) plan->set_parameters(static_cast<uint64_t>(model->parameters));
  FillMemory(config, plan->mutable_memory());
  LimitMemory(config, ReservedFor(config), plan);
  if (plan->memory().fits() &&
      plan->memory().reserved_per_rank() < plan->memory().bytes_per_rank() * (1 + kPlanError)) {
    plan->add_warnings("parallel.memory_per_rank leaves less than 5 % beside the plan");
  }
  const StepEstimate step = EstimateStep(config, host);
  FillThroughput(config, host, step, plan);
  const StorageEstimate storage = EstimateStorage(config, step.step_seconds);
  plan->mutable_storage()->set_checkpoint_bytes(static_cast<uint64_t>(storage.checkpoint_bytes));
  if (storage.save_steps > 0) plan->mutable_storage()->set_save_interval_steps(storage.save_steps);
  if (storage.save_seconds > 0) {
    plan->mutable_storage()->set_save_interval_seconds(storage.save_seconds);
  }
  plan->mutable_storage()->set_kept_bytes(static_cast<uint64_t>(storage.kept_bytes));
}

void LimitMemory(const RunConfig& config, int64_t limit, heddle::v1::PlanReply* plan) {
  heddle::v1::PlanReply::Memory* memory = plan->mutable_memory();
  if (memory->bytes_per_rank() <= static_cast<uint64_t>(limit)) return;
  memory->set_fits(false);
  memory->clear_changes();
  for (const std::string& line : ChangeLines(config, limit)) memory->add_changes(line);
}

}  // namespace heddle::model
