#include "model/training_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <functional>
#include <utility>

#include "base/units/units.h"
#include "heddle/v1/config.pb.h"
#include "heddle/v1/jobs.pb.h"
#include "model/cost_formulas.h"
#include "model/model_plan_internal.h"

namespace heddle::model {
namespace {

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
  const bool counted = training->gradient_accumulation_steps() > 1;
  if (training->global_batch_size() > 0 && !counted) {
    return Str("training.micro_batch_size=", now / by);
  }
  training->set_gradient_accumulation_steps(training->gradient_accumulation_steps() * by);
  return Str("training.micro_batch_size=", now / by,
             " training.gradient_accumulation_steps=", training->gradient_accumulation_steps());
}

bool Offloads(const RunConfig& config) { return config.memory().expert_offloading().enabled(); }

// Experts over as many ranks as divide both; offloaded ones over all ranks or none.
std::string DivideExperts(RunConfig* config) {
  const int64_t ranks = RanksOf(*config);
  const int64_t experts = config->model().moe().n_experts();
  if (experts == 0 || config->parallel().expert() > 1) return "";
  int64_t degree = std::min(ranks, experts);
  while (ranks % degree != 0 || experts % degree != 0) --degree;
  if (degree == 1 || (Offloads(*config) && degree != ranks)) return "";
  config->mutable_parallel()->set_expert(static_cast<int32_t>(degree));
  return Str("parallel.expert=", degree);
}

// Half of the experts that are in memory go to disk. One rank must hold an expert
// (base/settings/checks.cc): several ranks divide them, where they can.
std::string SpillExperts(RunConfig* config) {
  const int64_t experts = config->model().moe().n_experts();
  const int64_t ranks = RanksOf(*config);
  if (experts == 0 || experts % ranks != 0) return "";
  if (ranks > 1) config->mutable_parallel()->set_expert(static_cast<int32_t>(ranks));
  heddle::v1::ExpertOffloadingConfig* offload =
      config->mutable_memory()->mutable_expert_offloading();
  offload->set_enabled(true);
  const RankMemory now = EstimateRank(*config);
  const int64_t in_memory = std::max(now.experts_resident, now.experts_host);
  const int64_t resident = std::max(in_memory / 2, LeastResidentBytes(*config)) / kMiB + 1;
  if (resident * kMiB >= in_memory) return "";
  offload->set_resident_mb(resident);
  if (offload->spill_dir().empty()) offload->set_spill_dir("DIR");
  return Str("memory.expert_offloading.enabled=true memory.expert_offloading.resident_mb=",
             resident, " memory.expert_offloading.spill_dir=", offload->spill_dir(),
             ranks > 1 ? Str(" parallel.expert=", ranks) : "");
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
      {"tokens sent to the ranks of their experts and back, twice a layer", DivideExperts},
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
      {"experts read from disk and written back every step", SpillExperts},
  };
  return steps;
}

}  // namespace

std::vector<NamedBytes> MemoryCategories(const RankMemory& rank) {
  const MemoryEstimate& memory = rank.compute;
  std::vector<NamedBytes> all = {
      {"weights", memory.compute_weights}, {"masters", memory.master},
      {"moments", memory.moments},         {"gradients", memory.gradients},
      {"gathered", memory.gathered},       {"checkpoint", memory.checkpoint},
      {"buffers", memory.buffers},         {"activations", memory.activations},
      {"workspace", memory.workspace},     {"experts", rank.experts_resident + rank.experts_host},
      {"runtime", kRuntimeBytes}};
  std::erase_if(all, [](const NamedBytes& one) { return one.bytes == 0; });
  return all;
}

int64_t BytesPerRank(const RunConfig& config) {
  return EstimateRank(config).Total() + kRuntimeBytes;
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
    return setting.empty() ||
           (!without.empty() && (" " + setting).find(" " + without + "=") != std::string::npos);
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

std::string SkewWarning(const RunConfig& config) {
  const int64_t degree = ExpertDegree(config.parallel());
  const bool bounded = config.model().moe().capacity_factor() > 0;
  if (degree <= 1 || config.model().moe().n_experts() == 0 || bounded) return "";
  RunConfig skewed = config;
  skewed.mutable_model()->mutable_moe()->set_capacity_factor(static_cast<double>(degree));
  const int64_t more = BytesPerRank(skewed) - BytesPerRank(config);
  return Str("parallel.expert: a rank whose experts get all tokens takes ", ApproximateBytes(more),
             " more than the plan, which counts a quarter over its share: "
             "model.moe.capacity_factor bounds it, or reserve parallel.memory_per_rank for it");
}

StorageEstimate EstimateStorage(const RunConfig& config, const StepEstimate& step,
                                double mean_time_to_failure) {
  const double step_seconds = step.step_seconds;
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
    const double saved = static_cast<double>(storage.checkpoint_bytes / RanksOf(config));
    // Spilled states go at the disk's rates, where those are known.
    const double copied =
        step.snapshot_seconds > 0 ? std::max(0.0, saved - step.snapshot_bytes) : saved;
    storage.save_seconds = SaveIntervalSeconds(copied / kCopyBytesPerSecond + step.snapshot_seconds,
                                               mean_time_to_failure);
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
  const int64_t ranks = RanksOf(config);
  storage.spill_bytes = EstimateRank(config).experts_disk * ranks;
  if (step_seconds > 0) {
    storage.spill_tb_per_day = TerabytesADay(
        (step.disk_written_bytes + step.snapshot_bytes / static_cast<double>(storage.save_steps)) *
            static_cast<double>(ranks),
        step_seconds);
    storage.checkpoint_tb_per_day =
        TerabytesADay(static_cast<double>(storage.checkpoint_bytes),
                      step_seconds * static_cast<double>(storage.save_steps));
  }
  return storage;
}

std::string EnduranceWarning(const StorageEstimate& storage) {
  constexpr double kFewTerabytes = 4;
  char text[32];
  const auto number = [&text](double value) {
    std::snprintf(text, sizeof(text), "%.3g", value);
    return text;
  };
  if (storage.spill_tb_per_day > 0) {
    return Str("spilled experts write ", number(storage.spill_tb_per_day),
               " TB a day to memory.expert_offloading.spill_dir: check what the drive is sold for");
  }
  if (storage.checkpoint_tb_per_day > kFewTerabytes) {
    return Str("checkpoints write ", number(storage.checkpoint_tb_per_day),
               " TB a day: check what the drive is sold for, or raise checkpoint.save_interval");
  }
  return "";
}

std::string VisitsWarning(const RunConfig& config) {
  if (MicroBatchesPerRank(config.training(), config.parallel()) < 2) return "";
  RunConfig merged = config;
  merged.mutable_training()->set_accumulation(TrainingConfig::ACCUMULATION_LAYER_MAJOR);
  const double now = EstimateStep(config, {}).disk_read_bytes;
  const double then = EstimateStep(merged, {}).disk_read_bytes;
  constexpr double kWorthwhile = 0.9;
  if (then >= kWorthwhile * now) return "";
  return Str(
      "each micro-batch reads spilled experts anew: training.accumulation=layer_major reads ",
      ApproximateBytes(static_cast<int64_t>(then)), " a step and rank instead of ",
      ApproximateBytes(static_cast<int64_t>(now)), ", with ",
      ApproximateBytes(BytesPerRank(merged)), " of memory instead of ",
      ApproximateBytes(BytesPerRank(config)));
}

std::string UntouchedWarning(const RunConfig& config) {
  if (!OffloadsExperts(config) || config.memory().expert_offloading().untouched() !=
                                      heddle::v1::ExpertOffloadingConfig::UNTOUCHED_SKIP) {
    return "";
  }
  return "memory.expert_offloading.untouched=skip is another optimizer than that of experts in "
         "memory: an expert without a token in a step keeps its weights and moments as they are, "
         "without decay; disk traffic is said for a step in which all have tokens";
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
  for (const NamedBytes& one : MemoryCategories(EstimateRank(config))) {
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

bool SelectsKeys(const heddle::v1::ModelConfig& model) {
  for (int layer = 0; layer < model.n_layers(); ++layer) {
    const heddle::v1::AttentionKind kind = LayerKind(model, layer);
    if (kind == heddle::v1::ATTENTION_KIND_NSA || kind == heddle::v1::ATTENTION_KIND_DSA ||
        kind == heddle::v1::ATTENTION_KIND_GSA) {
      return true;
    }
  }
  return false;
}

void FillThroughput(const RunConfig& config, const HostFigures& host, const StepEstimate& step,
                    heddle::v1::PlanReply* plan) {
  heddle::v1::PlanReply::Throughput* throughput = plan->mutable_throughput();
  throughput->set_flops_per_token(step.flops_per_token);
  throughput->set_accumulation(WordOf(AccumulationOf(config.training(), config.parallel())));
  if (host.matmul_flops > 0) throughput->set_matmul_flops(host.matmul_flops);
  if (step.tokens_per_second == 0) {
    plan->add_warnings(Str("tokens per second are not known: ", step.missing));
    return;
  }
  if (host.matmul_flops == 0 && SelectsKeys(config.model())) {
    plan->add_warnings(
        "tokens per second of layers that select keys (nsa, dsa, gsa) are fewer than said: half of "
        "it was measured for tiny-nsa and tiny-gsa at 2048 tokens");
  }
  throughput->set_tokens_per_second(step.tokens_per_second);
  throughput->set_step_seconds(step.step_seconds);
  throughput->set_communication_seconds(step.communication_seconds);
  throughput->set_bound(step.bound);
}

}  // namespace

Status CheckReservation(const RunConfig& config) {
  if (config.kind() == RunConfig::KIND_TRAIN) RETURN_IF_ERROR(CheckResidentBound(config));
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

void FillPlan(const RunConfig& config, const HostFigures& host, heddle::v1::PlanReply* plan,
              double mean_time_to_failure) {
  const StatusOr<ModelPlan> model = PlanModel(config.model());
  if (model.ok()) plan->set_parameters(static_cast<uint64_t>(model->parameters));
  FillMemory(config, plan->mutable_memory());
  LimitMemory(config, ReservedFor(config), plan);
  if (const Status bound = CheckResidentBound(config); !bound.ok()) {
    plan->mutable_memory()->set_fits(false);
    plan->add_warnings(Message(bound));
  }
  if (plan->memory().fits() &&
      plan->memory().reserved_per_rank() < plan->memory().bytes_per_rank() * (1 + kPlanError)) {
    plan->add_warnings("parallel.memory_per_rank leaves less than 5 % beside the plan");
  }
  for (const std::string& warning : {ArenaWarning(config), SkewWarning(config),
                                     VisitsWarning(config), UntouchedWarning(config)}) {
    if (!warning.empty()) plan->add_warnings(warning);
  }
  const StepEstimate step = EstimateStep(config, host);
  FillThroughput(config, host, step, plan);
  const StorageEstimate storage = EstimateStorage(config, step, mean_time_to_failure);
  const std::string endurance = EnduranceWarning(storage);
  if (!endurance.empty()) plan->add_warnings(endurance);
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
