#include "model/step_estimate.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "heddle/v1/config.pb.h"
#include "model/cost_formulas.h"
#include "model/model_plan_internal.h"
#include "model/rank_memory.h"

namespace heddle::model {
namespace {

using heddle::v1::ModelConfig;
using heddle::v1::ParallelConfig;
using heddle::v1::RunConfig;
using heddle::v1::TrainingConfig;

// Fitted to bench_model_step, processor time of one thread with AMX, where a product of 2048 cubed
// ran at 0.64 TFLOP/s in bf16 and 0.185 in fp32, and memory at 25 GB/s. Microseconds a token,
// measured and computed:
//            tiny-dense 512  tiny 2048  small-dense 512  small 2048
//     bf16        95 /  95  115 / 124        414 / 390   526 / 505
//     fp32       299 / 272  379 / 371      1397 / 1197  1609 / 1595
constexpr double kCoreShare = 0.6;
constexpr double kPasses = 23;
// Experts see a part of the rows each, in products as narrow as they are. Fitted to steps of two
// threads, said / measured in ms: tiny-moe bf16 85 / 92, fp32 246 / 232, small-moe 386 / 379,
// spill-moe 107 / 118.
constexpr double kExpertShare = 0.45;
// The gradients' norm reads them and the next step clears them.
constexpr double kGradientBytes = 8;

int64_t RanksOf(const RunConfig& config) { return std::max(1, config.parallel().ranks().max()); }

double ElementBytes(const TrainingConfig& training) {
  return training.precision() == TrainingConfig::PRECISION_FP32 ? 4 : 2;
}

// Multiply-adds of the feed-forward layers that one token visits, times 2.
struct FeedForwardFlops {
  double all = 0;
  double routed = 0;  // of its experts
};
FeedForwardFlops CountFeedForward(const ModelConfig& model, const ModelPlan& plan) {
  const heddle::v1::MoeConfig& moe = model.moe();
  FeedForwardFlops flops;
  for (const TensorSpec& tensor : plan.tensors) {
    if (tensor.shape.size() != 2 || tensor.name.find(".mlp.") == std::string::npos) continue;
    const double weights = 2 * static_cast<double>(tensor.elements);
    const bool routed =
        moe.n_experts() > 0 && tensor.name.find(".mlp.experts.") != std::string::npos;
    const double visited = routed ? weights * moe.top_k() / moe.n_experts() : weights;
    flops.all += visited;
    flops.routed += routed ? visited : 0;
  }
  return flops;
}

// Of one token, with what is computed again.
struct Work {
  double products = 0;
  double routed = 0;  // of the products, those of experts
  double core = 0;
  double repeated = 1;  // over what it is without recomputation
  double Total() const { return products + core; }
};
Work WorkPerToken(const RunConfig& config, const ModelPlan& plan) {
  const TokenFlops flops = FlopsPerToken(config.model(), config.training().max_seq_len());
  Work work{.products = 3 * flops.forward_weights,
            .core = flops.training - 3 * flops.forward_weights};
  const FeedForwardFlops ffn = CountFeedForward(config.model(), plan);
  work.routed = 3 * ffn.routed;
  const double once = work.Total();
  switch (config.training().gradient_checkpointing()) {
    case TrainingConfig::GRADIENT_CHECKPOINTING_FULL:
      work.products += flops.forward_weights;
      work.routed += ffn.routed;
      work.core += flops.forward_core;
      break;
    case TrainingConfig::GRADIENT_CHECKPOINTING_SELECTIVE:
      work.products += ffn.all;
      work.routed += ffn.routed;
      break;
    default:
      break;
  }
  work.repeated = work.Total() / once;
  return work;
}

// Passes over the weights of a step: how often they are gathered, or read from disk.
double VisitsOf(const RunConfig& config) {
  const bool merged = AccumulationOf(config.training(), config.parallel()) ==
                      TrainingConfig::ACCUMULATION_LAYER_MAJOR;
  return merged ? 1.0
                : static_cast<double>(MicroBatchesPerRank(config.training(), config.parallel()));
}

// Rows of the tokens' experts that leave the rank (model/moe/routed_experts.cc): to them and back,
// forward and backward; with recomputation to them once more. The backward sends weights of rows
// and returns their gradients, fp32.
double ExpertRowBytes(const RunConfig& config) {
  const double degree = static_cast<double>(ExpertDegree(config.parallel()));
  const ModelConfig& model = config.model();
  double layers = 0;
  for (int layer = 0; layer < model.n_layers(); ++layer) layers += LayerHasExperts(model, layer);
  const TrainingConfig& training = config.training();
  const double tokens = static_cast<double>(MicroBatchesPerRank(training, config.parallel())) *
                        training.micro_batch_size() * training.max_seq_len();
  const bool again =
      training.gradient_checkpointing() != TrainingConfig::GRADIENT_CHECKPOINTING_NONE;
  const double row = (again ? 5 : 4) * model.d_model() * ElementBytes(training) + 2 * 4;
  return layers * tokens * model.moe().top_k() * row * (degree - 1) / degree;
}

// That a rank sends in a step (formula 1, for all its micro-batches).
double CommunicationBytes(const RunConfig& config) {
  const double element = ElementBytes(config.training());
  const double reduce =
      config.parallel().reduce_dtype() == ParallelConfig::REDUCE_DTYPE_BF16 ? 2 : 4;
  const auto accumulation = AccumulationOf(config.training(), config.parallel());
  const double reductions =
      accumulation == TrainingConfig::ACCUMULATION_SYNC_EACH
          ? static_cast<double>(MicroBatchesPerRank(config.training(), config.parallel()))
          : 1;
  double sent = 0;  // elements of a collective that reach the other ranks
  for (const MeshUnit& one : MeshOf(config.model(), config.parallel())) {
    const double ranks = static_cast<double>(one.ranks);
    sent += static_cast<double>(one.unit.elements) * (ranks - 1) / ranks;
  }
  const double rows = ExpertRowBytes(config);
  switch (config.parallel().shard()) {
    case ParallelConfig::SHARD_NONE:  // reduced and gathered in fp32, once
      return 2 * 4 * sent + rows;
    case ParallelConfig::SHARD_OPTIMIZER:
      return (element + reduce * reductions) * sent + rows;
    case ParallelConfig::SHARD_FULL:
    default:
      return (2 * element * VisitsOf(config) + reduce * reductions) * sent + rows;
  }
}

// What a rank gets of the host that was measured: ranks of a job fill hosts like it.
struct RankRates {
  double products = 0;
  double dram = 0;
  double update = 0;
  double link = 0;
  double disk_read = 0;
  double disk_write = 0;
};
RankRates RatesOf(const RunConfig& config, const HostFigures& host) {
  RankRates rates;
  const double threads = static_cast<double>(std::max<int64_t>(1, host.threads));
  const double own = std::min<double>(threads, std::max(1, config.parallel().cpus_per_rank()));
  const double on_host =
      std::min<double>(static_cast<double>(RanksOf(config)), std::floor(threads / own));
  const bool fp32 = config.training().precision() == TrainingConfig::PRECISION_FP32;
  rates.products = (fp32 ? host.fp32_flops : host.bf16_flops) * own / threads;
  rates.dram = std::min(host.dram_thread_bytes * own, host.dram_bytes / on_host);
  rates.update = std::min(host.update_bytes, host.update_bytes * own / threads);
  if (rates.update == 0) rates.update = rates.dram;
  rates.link = host.link_bytes;
  // Shared memory joins only ranks of one host.
  if (rates.link == 0 && on_host >= static_cast<double>(RanksOf(config))) {
    rates.link = host.exchange_bytes * std::min(1.0, 2 / on_host);
  }
  rates.disk_read = host.disk_read_bytes / on_host;
  rates.disk_write = host.disk_write_bytes / on_host;
  return rates;
}

// Of the experts of a rank, what a step moves between memory and disk. The set knows the order of
// uses until the next update and evicts what is needed last (worker/offload/resident_owner.cc): of
// the states, which an update goes through in one order, the same part stays. Gradients are written
// only where they do not fit beside weights between the backward, which measures them, and the
// update, which reads them, or between two micro-batches; weights only where they do not fit.
struct Spill {
  DiskTraffic weights;  // bytes; beside the computation
  DiskTraffic states;   // and gradients; beside the update
};
Spill SpillOf(const RunConfig& config) {
  Spill spill;
  const RankMemory memory = EstimateRank(config);
  const bool fits = memory.experts_resident >= memory.ExpertBytes();
  if (memory.experts_disk == 0 || fits) return spill;
  const TrainingConfig& training = config.training();
  const double parameters = static_cast<double>(memory.expert_parameters);
  const double resident = static_cast<double>(memory.experts_resident);
  const bool fp32 = training.precision() == TrainingConfig::PRECISION_FP32;
  const double all = static_cast<double>(memory.bytes_per_expert_parameter);
  // In fp32 the masters are the weights.
  const double weights = parameters * (fp32 ? 4 : 2);
  const double gradients = parameters * 4;
  const double states = parameters * all - weights - gradients;
  const double out = parameters * all - resident;
  const double states_out = std::min(states, out);
  const double gradients_out = std::clamp(out - states, 0.0, gradients);
  spill.states = {.read = states_out + gradients_out, .written = states_out + gradients_out};
  // Every pass, forward and backward, reads what does not fit: the order turns around each time.
  // The update writes all anew.
  const double weights_out = std::max(0.0, weights - resident);
  const double visits = VisitsOf(config);
  // Sums of gradients that wait for the next micro-batch.
  const double sums_out = std::clamp(weights + gradients - resident, 0.0, gradients);
  spill.weights = {.read = 2 * visits * weights_out + (visits - 1) * sums_out,
                   .written = weights_out + (visits - 1) * sums_out};
  return spill;
}

double Over(const DiskTraffic& traffic, const RankRates& rates) {
  if (traffic.read == 0 && traffic.written == 0) return 0;
  // One disk does both: steps of tiny-moe waited for the sum of the two, not for the longer.
  return traffic.read / rates.disk_read + traffic.written / rates.disk_write;
}

double OptimizerBytes(const RunConfig& config) {
  const TrainingConfig& training = config.training();
  const bool fp32 = training.precision() == TrainingConfig::PRECISION_FP32;
  const double update = BytesPerUpdate(
      {.moments = training.optimizer() == TrainingConfig::OPTIMIZER_LION ? 1.0 : 2.0,
       .moment_bytes = training.moments() == TrainingConfig::MOMENTS_BF16 ? 2.0 : 4.0,
       .gradient = 4,
       .weights = fp32 ? 0.0 : 2.0});
  const bool whole = config.parallel().shard() == ParallelConfig::SHARD_NONE;
  double elements = 0;
  for (const MeshUnit& one : MeshOf(config.model(), config.parallel())) {
    elements += static_cast<double>(one.unit.elements) / static_cast<double>(whole ? 1 : one.ranks);
  }
  return elements * (update + kGradientBytes);
}

// The figure without which nothing can be said, and how to come by it.
std::string MissingFigure(const RunConfig& config, const HostFigures& host, const RankRates& rates,
                          bool spills) {
  if (host.matmul_flops <= 0 && (rates.products <= 0 || rates.dram <= 0)) {
    return RanksOf(config) > 1
               ? "no figures of this host: run heddle bench-host, or give --matmul-tflops and "
                 "--link-gbs"
               : "no figures of this host: run heddle bench-host, or give --matmul-tflops";
  }
  if (RanksOf(config) > 1 && rates.link <= 0) {
    return "no figure of the link between the hosts: give --link-gbs";
  }
  if (spills && (rates.disk_read <= 0 || rates.disk_write <= 0)) {
    return "no figures of the disk that experts are spilled to: run heddle bench-host --dir DIR";
  }
  return "";
}

// What the configuration alone says.
StepEstimate CountStep(const RunConfig& config, const Work& work) {
  StepEstimate step;
  const TrainingConfig& training = config.training();
  const int64_t ranks = RanksOf(config);
  const int64_t batches = MicroBatchesPerRank(training, config.parallel());
  const int64_t sequences = training.global_batch_size() > 0
                                ? training.global_batch_size()
                                : batches * training.micro_batch_size() * ranks;
  step.tokens = sequences * training.max_seq_len();
  step.flops_per_token = work.Total();
  step.communication_bytes = ranks > 1 ? CommunicationBytes(config) : 0;
  step.micro_batch_tokens = static_cast<double>(training.micro_batch_size()) *
                            static_cast<double>(training.max_seq_len());
  const heddle::v1::MoeConfig& moe = config.model().moe();
  if (moe.n_experts() > 0) {
    const double degree = static_cast<double>(ExpertDegree(config.parallel()));
    step.tokens_per_expert = TokensPerExpert({.tokens = step.micro_batch_tokens * degree,
                                              .top_k = static_cast<double>(moe.top_k()),
                                              .experts = static_cast<double>(moe.n_experts())},
                                             static_cast<double>(batches) / VisitsOf(config));
  }
  return step;
}

double ComputeSeconds(const RunConfig& config, const HostFigures& host, const RankRates& rates,
                      const Work& work) {
  const TrainingConfig& training = config.training();
  // The rank with most micro-batches holds the others up.
  const double tokens = static_cast<double>(MicroBatchesPerRank(training, config.parallel())) *
                        static_cast<double>(training.micro_batch_size()) *
                        static_cast<double>(training.max_seq_len());
  if (host.matmul_flops > 0) return tokens * work.Total() / host.matmul_flops;
  const double kept = KeptBytesPerToken(
      config.model(), static_cast<int64_t>(ElementBytes(training)), training.max_seq_len());
  const double products = work.products - work.routed + work.routed / kExpertShare;
  return tokens * (products / rates.products + work.core / (kCoreShare * rates.products) +
                   work.repeated * kPasses * kept / rates.dram);
}

void NameBound(StepEstimate* step) {
  const struct {
    const char* name;
    double seconds;
  } parts[] = {{"compute", step->compute_seconds},
               {"communication", step->communication_seconds},
               {"host memory", step->optimizer_seconds},
               {"disk", step->disk_seconds}};
  const auto* most = std::max_element(std::begin(parts), std::end(parts),
                                      [](auto& a, auto& b) { return a.seconds < b.seconds; });
  step->bound = most->name;
}

}  // namespace

StepEstimate EstimateStep(const RunConfig& config, const HostFigures& host) {
  const StatusOr<ModelPlan> plan = PlanModel(config.model());
  if (!plan.ok()) return {};
  const Work work = WorkPerToken(config, *plan);
  StepEstimate step = CountStep(config, work);
  const RankRates rates = RatesOf(config, host);
  const Spill spill = SpillOf(config);
  step.disk_read_bytes = spill.weights.read + spill.states.read;
  step.disk_written_bytes = spill.weights.written + spill.states.written;
  const bool spills = step.disk_read_bytes > 0;
  const RankMemory memory = EstimateRank(config);
  if (memory.experts_disk > 0) {
    step.snapshot_bytes = static_cast<double>(memory.experts_disk - memory.ExpertBytes());
  }
  step.missing = MissingFigure(config, host, rates, spills);
  if (!step.missing.empty()) return step;
  step.compute_seconds = ComputeSeconds(config, host, rates, work);
  const bool shares = RanksOf(config) > 1;
  step.communication_seconds = shares ? step.communication_bytes / rates.link : 0;
  step.optimizer_seconds = rates.update > 0 ? OptimizerBytes(config) / rates.update : 0;
  // A save reads the states that are not in memory and writes all of them.
  step.snapshot_seconds = step.snapshot_bytes > 0 && rates.disk_read > 0 && rates.disk_write > 0
                              ? Over({.read = std::min(step.snapshot_bytes, spill.states.read),
                                      .written = step.snapshot_bytes},
                                     rates)
                              : 0;
  const double weights_disk = Over(spill.weights, rates);
  const double states_disk = Over(spill.states, rates);
  step.disk_seconds = weights_disk + states_disk;
  const bool beside = config.parallel().shard() != ParallelConfig::SHARD_NONE;
  const double rows = shares ? ExpertRowBytes(config) / rates.link : 0;
  const double collectives = step.communication_seconds - rows;
  const double hidden = std::max({step.compute_seconds, beside ? collectives : 0, weights_disk});
  step.step_seconds =
      hidden + rows + (beside ? 0 : collectives) + std::max(step.optimizer_seconds, states_disk);
  step.exposed_seconds = step.step_seconds - step.compute_seconds - step.optimizer_seconds;
  step.tokens_per_second = static_cast<double>(step.tokens) / step.step_seconds;
  const double sustained =
      step.tokens_per_second > 0 && step.compute_seconds > 0
          ? work.Total() * step.micro_batch_tokens *
                static_cast<double>(MicroBatchesPerRank(config.training(), config.parallel())) /
                step.compute_seconds
          : 0;
  if (shares && config.parallel().shard() == ParallelConfig::SHARD_FULL) {
    const double reduce =
        config.parallel().reduce_dtype() == ParallelConfig::REDUCE_DTYPE_BF16 ? 2 : 4;
    step.tokens_that_hide_collectives =
        TokensThatHideCollectives(reduce, {.flops = sustained, .link = rates.link});
  }
  if (spills) {
    const double bytes =
        step.disk_written_bytes / static_cast<double>(EstimateRank(config).expert_parameters);
    step.tokens_that_hide_disk = TokensThatHideDisk(bytes, sustained, rates.disk_write);
  }
  NameBound(&step);
  return step;
}

}  // namespace heddle::model
