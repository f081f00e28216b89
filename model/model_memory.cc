// Memory of one training process, counted from shapes (training-runtime.md section 18).
#include <algorithm>
#include <deque>
#include <set>
#include <utility>
#include <vector>

#include "heddle/v1/config.pb.h"
#include "model/model_plan.h"
#include "model/model_plan_internal.h"

namespace heddle::model {
namespace {

using heddle::v1::ModelConfig;
using heddle::v1::NsaConfig;
using heddle::v1::TrainingConfig;

// Bytes per token: `kept` until the backward, `scratch` while the layer runs. Of what is kept,
// `replayed` stays where the layer is recomputed: selections and routing.
struct PerToken {
  double kept = 0;
  double scratch = 0;
  double replayed = 0;
};

class LayerMemory {
 public:
  // `element` bytes of the compute type, documents of at most `length` tokens.
  LayerMemory(const ModelConfig& config, int layer, int64_t element, int64_t length)
      : config_(config),
        attention_(config.attention()),
        layer_(layer),
        kind_(LayerKind(config, layer)),
        heads_(HeadsOf(config)),
        b_(static_cast<double>(element)),
        length_(length) {}

  PerToken Attention() const {
    PerToken bytes = LayerUsesLatent(config_, layer_) ? Latent() : Heads();
    switch (kind_) {
      case heddle::v1::ATTENTION_KIND_NSA:
        AddNsa(&bytes);
        break;
      case heddle::v1::ATTENTION_KIND_DSA:
        if (!LayerHasIndexer(config_, layer_)) break;
        AddIndexer(attention_.dsa().n_indexer_heads(), attention_.dsa().d_indexer(),
                   attention_.dsa().topk(), &bytes);
        break;
      case heddle::v1::ATTENTION_KIND_GSA: {
        const heddle::v1::GsaConfig& gsa = attention_.gsa();
        AddIndexer(gsa.n_indexer_heads(), gsa.d_indexer(), gsa.k_base(), &bytes);
        // Gates before their activation, values and outputs before their gate.
        if (gsa.use_value_gate()) bytes.kept += 2 * b_ * KvWidth();
        if (gsa.use_output_gate()) bytes.kept += 2 * b_ * QueryWidth();
        break;
      }
      default:
        break;
    }
    return bytes;
  }

  PerToken FeedForward() const {
    const bool gated = config_.ffn() == ModelConfig::FFN_SWIGLU;
    const double matrices = gated ? 2.0 : 1.0;
    if (!LayerHasExperts(config_, layer_)) {
      return {matrices * b_ * config_.d_ffn(), 2.0 * b_ * config_.d_ffn(), 0.0};
    }
    const heddle::v1::MoeConfig& moe = config_.moe();
    const double width = static_cast<double>(moe.top_k() + moe.n_shared()) * moe.d_expert();
    const double chosen = moe.top_k();
    // Expert, slot and row of an assignment; scores and weights; gate and up. The backward gathers
    // inputs and gradients.
    const double replayed = 12.0 * chosen;
    return {matrices * b_ * width + 4.0 * (moe.n_experts() + chosen) + replayed,
            b_ * (width + 2 * chosen * config_.d_model()) + 4.0 * moe.n_experts(), replayed};
  }

 private:
  double QueryWidth() const { return static_cast<double>(heads_.query * heads_.dim); }
  double KvWidth() const { return static_cast<double>(heads_.kv * heads_.dim); }

  // q, k, v, output, log-sum-exp.
  PerToken Heads() const {
    return {b_ * (2 * QueryWidth() + 2 * KvWidth()) + 4.0 * static_cast<double>(heads_.query), 0.0,
            0.0};
  }

  PerToken Latent() const {
    const heddle::v1::MlaConfig& mla = attention_.mla();
    const double h = static_cast<double>(heads_.query);
    const double qk = mla.qk_nope_head_dim() + mla.qk_rope_head_dim();
    const double dc = mla.kv_lora_rank();
    const double dr = mla.qk_rope_head_dim();
    const double dv = mla.v_head_dim();
    // Queries and their latent before and after its norm, latent before and after, rotary key.
    const double down = h * qk + 2.0 * mla.q_lora_rank() + 2 * dc + dr;
    // Keys, values and output of every head; the dense core pads them, and queries, to one width.
    const double width = std::max(qk, dv);
    double heads = h * 3 * width + (width > qk ? h * width : 0);
    if (kind_ == heddle::v1::ATTENTION_KIND_DSA) heads = h * (qk + 2 * dv);
    return {b_ * (down + heads) + 4.0 * h, b_ * h * (3 * width + qk + 2 * dv), 0.0};
  }

  void AddNsa(PerToken* bytes) const {
    const NsaConfig& nsa = attention_.nsa();
    const double compressed = 2 * KvWidth() / nsa.kernel_stride();
    const double projections = nsa.kv() == NsaConfig::KV_SEPARATE ? 4 * KvWidth() : KvWidth();
    // Outputs of three branches, gates, raw keys or further projections; fp32 around the kernels.
    bytes->kept += b_ * (3 * QueryWidth() + 3.0 * static_cast<double>(heads_.query) + projections +
                         compressed) +
                   8.0 * static_cast<double>(heads_.query);
    Select(static_cast<double>(heads_.kv * nsa.topk()), bytes);
    bytes->scratch += 4.0 * (4 * QueryWidth() + 4 * KvWidth() + 2 * compressed);
  }

  void AddIndexer(int heads, int width, int64_t k, PerToken* bytes) const {
    const double indexer = static_cast<double>(heads) * width + width + heads;
    bytes->kept += 4.0 * indexer;
    Select(static_cast<double>(std::min(k, length_)), bytes);
    bytes->scratch += 4.0 * (indexer + 4 * QueryWidth() + 4 * KvWidth());
  }

  static void Select(double indices, PerToken* bytes) {
    bytes->kept += 4.0 * indices;
    bytes->replayed += 4.0 * indices;
  }

  const ModelConfig& config_;
  const heddle::v1::AttentionConfig& attention_;
  const int layer_;
  const heddle::v1::AttentionKind kind_;
  const model::Heads heads_;
  const double b_;
  const int64_t length_;
};

// The matrix library compiles a kernel for each product and number of rows and keeps it. A dense
// model has a few tens, which are part of the runtime; experts get as many rows as the router gives
// them, and fill in some steps the cache that the trainer limits to these (worker/trainer/main.cc).
// Measured 0.58 MiB each, for any number of threads.
constexpr int64_t kExpertKernels = 128;
constexpr int64_t kKernelBytes = 600 << 10;

// In bf16 experts have kernels of ours (kernels/linear), which are there; without AVX-512 and its
// bf16 products they have not, and what this leaves out is within the reserve of a rank.
int64_t CompiledKernels(const ModelConfig& model, bool bf16) {
  if (bf16) return 0;
  for (int layer = 0; layer < model.n_layers(); ++layer) {
    if (LayerHasExperts(model, layer)) return kExpertKernels * kKernelBytes;
  }
  return 0;
}

// Copies that the library of fp32 products keeps of the matrices it packs; bf16 ones are packed in
// the kernel's own scratch. Measured 17 to 28 MiB, one thread.
constexpr int64_t kPackedBytes = 20 << 20;

// Largest matrix whose gradient is formed in bf16 before it is added in fp32.
int64_t LargestMatrix(const ModelPlan& plan, const ModelConfig& model) {
  const int64_t d = model.d_model();
  int64_t largest = d * std::max<int64_t>(model.vocab_size(), 2 * int64_t{model.d_ffn()});
  for (const TensorSpec& tensor : plan.tensors) {
    if (tensor.shape.size() == 2) largest = std::max(largest, tensor.elements);
  }
  return largest;
}

// Bytes per token of the blocks.
struct Blocks {
  double kept_sum = 0;
  double kept_max = 0;
  double scratch_max = 0;
  double experts_scratch = 0;  // of the feed-forward half of a layer with experts
  // Full recomputation: of all blocks.
  double replayed_sum = 0;
  // Selective recomputation: the attention halves with the stream before and behind them, and the
  // routing; the largest feed-forward half, which is there while its backward runs.
  double selective_sum = 0;
  double redone_max = 0;
};

Blocks MeasureBlocks(const ModelConfig& model, int64_t element, int64_t length) {
  Blocks blocks;
  for (int layer = 0; layer < model.n_layers(); ++layer) {
    const LayerMemory memory(model, layer, element, length);
    const PerToken attention = memory.Attention();
    const PerToken ffn = memory.FeedForward();
    // Input, two normed inputs, the stream between the halves; two reciprocal norms.
    const double stream = static_cast<double>(4 * element * model.d_model()) + 8.0;
    const double kept = stream + attention.kept + ffn.kept;
    blocks.kept_sum += kept;
    blocks.kept_max = std::max(blocks.kept_max, kept);
    const double row = static_cast<double>(element * model.d_model());
    blocks.replayed_sum += attention.replayed + ffn.replayed;
    blocks.selective_sum += 2 * row + attention.kept + ffn.replayed;
    blocks.redone_max = std::max(blocks.redone_max, ffn.kept + row + 4.0);
    blocks.scratch_max = std::max({blocks.scratch_max, attention.scratch, ffn.scratch});
    if (LayerHasExperts(model, layer)) {
      blocks.experts_scratch = std::max(blocks.experts_scratch, ffn.scratch);
    }
  }
  return blocks;
}

// The pool of worker/shard/unit_tensors.h: what it ever held at a time.
class UnitPool {
 public:
  explicit UnitPool(std::vector<int64_t> bytes)
      : bytes_(std::move(bytes)), capacity_(bytes_.size()) {}
  void Need(size_t unit) {
    if (capacity_[unit] > 0) return;
    const auto fits = spare_.lower_bound(bytes_[unit]);
    if (fits == spare_.end()) {
      capacity_[unit] = bytes_[unit];
      total_ += bytes_[unit];
      return;
    }
    capacity_[unit] = *fits;
    spare_.erase(fits);
  }
  void Drop(size_t unit) {
    if (capacity_[unit] == 0) return;
    spare_.insert(capacity_[unit]);
    capacity_[unit] = 0;
  }
  int64_t total() const { return total_; }

 private:
  const std::vector<int64_t> bytes_;
  std::vector<int64_t> capacity_;
  std::multiset<int64_t> spare_;
  int64_t total_ = 0;
};

std::vector<int64_t> UnitBytes(const ModelPlan& plan, int64_t ranks, int64_t element) {
  std::vector<int64_t> bytes;
  for (const UnitSpec& unit : plan.units)
    bytes.push_back(SliceElements(unit, ranks) * ranks * element);
  return bytes;
}

// Weights of a pass as worker/shard/sharded.cc gathers and drops them: a unit and the next one,
// tied embeddings until the head is done.
int64_t GatheredWeights(const ModelPlan& plan, int64_t ranks, int64_t element, bool tied) {
  const bool dense = plan.dense_units > 0;
  UnitPool pool(UnitBytes(plan, ranks, element));
  const size_t last = plan.units.size() - 1;
  const size_t stays = dense ? last - 1 : last;  // its backward comes next
  for (size_t u = 0; u <= last; ++u) {
    pool.Need(u);
    if (u < last) pool.Need(u + 1);
    if (u != stays && !(u == 0 && tied)) pool.Drop(u);
  }
  if (tied) pool.Drop(0);
  const size_t first = dense ? 1 : 0;
  for (size_t left = stays + 1; left > first; --left) {
    pool.Need(left - 1);
    if (left - 1 > first) pool.Need(left - 2);
    pool.Drop(left - 1);
  }
  return pool.total();
}

// Gradients of two passes: a unit's while its backward runs, two on their way to the ranks.
int64_t GatheredGradients(const ModelPlan& plan, int64_t ranks, bool tied) {
  UnitPool pool(UnitBytes(plan, ranks, 4));
  const size_t head = plan.units.size() - 1;  // of a plan of experts `tied` is false
  std::deque<size_t> reduces;
  const auto finish_oldest = [&] {
    pool.Drop(reduces.front());
    reduces.pop_front();
  };
  for (int pass = 0; pass < 2; ++pass) {
    for (size_t left = plan.units.size(); left > 0; --left) {
      const size_t u = left - 1;
      for (const size_t unit : {u, u == head && tied ? 0 : u}) {
        while (std::find(reduces.begin(), reduces.end(), unit) != reduces.end()) finish_oldest();
        pool.Need(unit);
      }
      while (reduces.size() >= 2) finish_oldest();
      reduces.push_back(u);
    }
  }
  return pool.total();
}

// What ranks of MPI and NCCL receive before they add it up: of two reductions in flight, as fp32
// or, rounded, as bf16 with the sent half beside it; of an all-reduce a bucket and its sum
// (worker/comm/ordered_group.cc). Ranks of one host need none of it over `auto` and `gloo`.
int64_t ExchangeBuffers(const ModelPlan& plan, const heddle::v1::ParallelConfig& parallel) {
  using heddle::v1::ParallelConfig;
  constexpr int64_t kBucketBytes = int64_t{16} << 20;
  const bool messages = parallel.backend() == ParallelConfig::BACKEND_MPI ||
                        parallel.backend() == ParallelConfig::BACKEND_NCCL;
  const int64_t ranks = std::max(1, parallel.ranks().max());
  if (!messages) return 0;
  if (parallel.shard() == ParallelConfig::SHARD_NONE) {
    const int64_t bucket = std::min(kBucketBytes, 4 * plan.flat_elements);
    return bucket + bucket / ranks;
  }
  int64_t largest = 0;
  for (const UnitSpec& unit : plan.units) {
    largest = std::max(largest, 4 * SliceElements(unit, ranks) * ranks);
  }
  return 2 * largest;
}

// Ranks that share experts are a part of all (worker/comm/subset.cc), and collectives among them go
// through buffers over every back end: what comes of two reductions in flight, fp32 (bf16: half,
// and half sent), and a gather's part once for every member, of two gathers.
int64_t SubsetBuffers(const ModelPlan& experts, const heddle::v1::ParallelConfig& parallel,
                      int64_t members, int64_t element) {
  if (parallel.shard() == heddle::v1::ParallelConfig::SHARD_NONE) {
    // Of an all-reduce: a bucket, its sum, and the sum for every member; once.
    const int64_t bucket = std::min(int64_t{16} << 20, 4 * experts.flat_elements);
    return 2 * bucket + bucket / members;
  }
  int64_t largest = 0;
  for (const UnitSpec& unit : experts.units) {
    largest = std::max(largest, SliceElements(unit, members) * members);
  }
  return 2 * (4 + element) * largest;
}

// Everything that a rank of `ranks` keeps of the parameters of one mesh.
void AddMesh(const ModelPlan& plan, int64_t ranks, bool tied, const TrainingConfig& training,
             heddle::v1::ParallelConfig parallel, MemoryEstimate* memory) {
  using heddle::v1::ParallelConfig;
  const bool bf16 = training.precision() != TrainingConfig::PRECISION_FP32;
  const int64_t element = bf16 ? 2 : 4;
  const int64_t moments = training.optimizer() == TrainingConfig::OPTIMIZER_LION ? 1 : 2;
  const int64_t moment_bytes = training.moments() == TrainingConfig::MOMENTS_BF16 ? 2 : 4;
  if (parallel.shard() == ParallelConfig::SHARD_NONE) {
    const int64_t flat = plan.flat_elements;
    memory->compute_weights += bf16 ? 2 * flat : 0;
    memory->master += 4 * flat;
    memory->moments += moments * moment_bytes * flat;
    memory->gradients += 4 * flat;
    memory->checkpoint += (4 + moments * moment_bytes) * flat / ranks;
    return;
  }
  int64_t owned = 0;
  for (const UnitSpec& unit : plan.units) owned += SliceElements(unit, ranks);
  memory->compute_weights += bf16 ? 2 * owned : 0;
  memory->master += 4 * owned;
  memory->moments += moments * moment_bytes * owned;
  memory->checkpoint += (4 + moments * moment_bytes) * owned;
  memory->gradients += 4 * owned;
  if (parallel.shard() == ParallelConfig::SHARD_OPTIMIZER) {
    memory->compute_weights += element * owned * ranks;
  } else {
    memory->gathered += GatheredWeights(plan, ranks, element, tied);
  }
  if (AccumulationOf(training, parallel) == TrainingConfig::ACCUMULATION_SYNC_LAST) {
    memory->gradients += 4 * owned * ranks;
  } else {
    memory->gathered += GatheredGradients(plan, ranks, tied);
  }
}

// Tokens' rows at the ranks of their experts (model/moe/routed_experts.cc). Routers are uneven:
// over all layers a rank may get half as much again as its share, in one of them twice as much, or
// what model.moe.capacity_factor lets through (training_plan.h, SkewWarning). Bytes of a token.
struct VisitingRows {
  double kept = 0;     // rows, and the hidden ones beyond the own share, of any layer
  double most = 0;     // of one layer, which is redone
  double copies = 0;   // while it exchanges: messages there and back at both ends, rows and results
  double scratch = 0;  // of a backward that waits for others: gradients of results and of rows
};
VisitingRows VisitorsOf(const ModelConfig& model, const heddle::v1::ParallelConfig& parallel,
                        double element) {
  constexpr double kMean = 1.5;
  constexpr double kMost = 2;
  constexpr double kCopies = 6;
  // What is redone, or waits, differs in size from layer to layer: the pool gives up to twice as
  // much as is asked for (model/layers/buffer_pool.cc).
  constexpr double kPool = 2;
  const double factor = model.moe().capacity_factor();
  const auto uneven = [&](double assumed) {
    return std::min(factor > 0 ? factor : assumed, static_cast<double>(ExpertDegree(parallel)));
  };
  const double rows = element * model.moe().top_k() * model.d_model();
  const double hidden = element * model.moe().top_k() * model.moe().d_expert();
  const auto kept = [&](double share, double matrices) {
    return share * rows + matrices * hidden * std::max(share - 1, 0.0);
  };
  const double most = uneven(kMost);
  VisitingRows visitors;
  visitors.kept = kept(uneven(kMean), 3);
  visitors.most = kPool * kept(most, 2);
  visitors.copies = kCopies * most * rows;
  visitors.scratch = kPool * ((3 * most - 1) * rows + std::max(most - 1, 0.0) * hidden);
  return visitors;
}

void AddExchangedRows(const VisitingRows& visitors, const ModelPlan& plan,
                      const TrainingConfig& training, int64_t tokens, int64_t lanes,
                      MemoryEstimate* memory) {
  const double rows = static_cast<double>(tokens);
  const bool keeps =
      training.gradient_checkpointing() == TrainingConfig::GRADIENT_CHECKPOINTING_NONE;
  const double layers = static_cast<double>(plan.expert_layers.size());
  memory->activations += static_cast<int64_t>(
      rows * (keeps ? layers * static_cast<double>(lanes) * visitors.kept : visitors.most));
  memory->workspace += static_cast<int64_t>(rows * visitors.copies);
}

// All micro-batches pass a layer whose experts come and go at a time (model/block.h): what each
// needs beside what it keeps, for all but the first.
void AddTogether(const Blocks& blocks, const VisitingRows& visitors, const ModelConfig& model,
                 const TrainingConfig& training, int64_t element, int64_t tokens,
                 MemoryEstimate* memory) {
  // Measured: experts' rows are padded, and buffers are not reused for much smaller ones.
  constexpr double kScratch = 1.25;
  constexpr double kRedone = 1.1;
  const double rows = static_cast<double>(tokens);
  const double row = static_cast<double>(element * model.d_model());
  // dh, and where the half is done again its normed input.
  double scratch = kScratch * (blocks.experts_scratch + row) + visitors.scratch;
  double kept = 0;
  switch (training.gradient_checkpointing()) {
    case TrainingConfig::GRADIENT_CHECKPOINTING_NONE:
      break;
    case TrainingConfig::GRADIENT_CHECKPOINTING_SELECTIVE:
      scratch += kScratch * row;
      kept = kRedone * blocks.redone_max + visitors.most;
      break;
    case TrainingConfig::GRADIENT_CHECKPOINTING_FULL:
      kept = kRedone * blocks.kept_max + visitors.most;
      break;
  }
  memory->activations += static_cast<int64_t>(rows * kept);
  memory->workspace += static_cast<int64_t>(rows * scratch);
}

// Everything that a rank keeps of the parameters: dense units over all ranks, experts over those
// that have the same ones.
void AddParameters(const ModelPlan& plan, const ModelConfig& model, const TrainingConfig& training,
                   const heddle::v1::ParallelConfig& parallel, bool experts_apart,
                   MemoryEstimate* memory) {
  const int64_t ranks = std::max(1, parallel.ranks().max());
  const int64_t degree = ExpertDegree(parallel);
  const ModelPlan dense = DensePart(plan);
  memory->gathered += ExchangeBuffers(dense, parallel);
  AddMesh(dense, ranks, model.tie_embeddings(), training, parallel, memory);
  if (plan.experts.count == 0 || experts_apart) return;
  const ModelPlan experts = ExpertPart(plan);
  const int64_t sharing = std::max<int64_t>(1, ranks / degree);
  heddle::v1::ParallelConfig mesh = parallel;
  if (sharing == 1 && degree > 1) mesh.set_shard(heddle::v1::ParallelConfig::SHARD_NONE);
  const bool bf16 = training.precision() != TrainingConfig::PRECISION_FP32;
  memory->gathered += degree > 1 && sharing > 1
                          ? SubsetBuffers(experts, parallel, sharing, bf16 ? 2 : 4)
                          : ExchangeBuffers(experts, mesh);
  AddMesh(experts, sharing, false, training, mesh, memory);
}

}  // namespace

int64_t MicroBatchesPerRank(const TrainingConfig& training,
                            const heddle::v1::ParallelConfig& parallel) {
  const int64_t ranks = std::max(1, parallel.ranks().max());
  const int64_t micro = std::max(1, training.micro_batch_size());
  const int64_t global = training.global_batch_size();
  if (global == 0) return std::max(1, training.gradient_accumulation_steps());
  return (global / micro + ranks - 1) / ranks;
}

TrainingConfig::Accumulation AccumulationOf(const TrainingConfig& training,
                                            const heddle::v1::ParallelConfig& parallel) {
  if (training.accumulation() != TrainingConfig::ACCUMULATION_AUTO) return training.accumulation();
  const bool whole = parallel.shard() == heddle::v1::ParallelConfig::SHARD_NONE;
  return whole || MicroBatchesPerRank(training, parallel) > 1
             ? TrainingConfig::ACCUMULATION_SYNC_LAST
             : TrainingConfig::ACCUMULATION_SYNC_EACH;
}

double KeptBytesPerToken(const ModelConfig& model, int64_t element, int64_t length) {
  // Logits and their gradient are kept for a chunk only, but written and read all the same.
  return MeasureBlocks(model, element, length).kept_sum +
         static_cast<double>(element * model.vocab_size());
}

int64_t ExpertDegree(const heddle::v1::ParallelConfig& parallel) {
  return std::max(1, parallel.expert());
}

std::vector<MeshUnit> MeshOf(const ModelConfig& model, const heddle::v1::ParallelConfig& parallel) {
  const int64_t ranks = std::max(1, parallel.ranks().max());
  const int64_t degree = ExpertDegree(parallel);
  const StatusOr<ModelPlan> plan =
      PlanModel(model, ExpertsOfRank(model, 0, static_cast<int>(degree)));
  std::vector<MeshUnit> units;
  if (!plan.ok()) return units;
  for (const UnitSpec& unit : DensePart(*plan).units) units.push_back({unit, ranks});
  if (plan->experts.count == 0) return units;
  for (const UnitSpec& unit : ExpertPart(*plan).units) {
    units.push_back({unit, std::max<int64_t>(1, ranks / degree)});
  }
  return units;
}

MemoryEstimate EstimateMemory(const ModelConfig& model, const TrainingConfig& training,
                              const heddle::v1::ParallelConfig& parallel) {
  return EstimateMemoryApart(model, training, parallel, false);
}

MemoryEstimate EstimateMemoryApart(const ModelConfig& model, const TrainingConfig& training,
                                   const heddle::v1::ParallelConfig& parallel, bool experts_apart) {
  const StatusOr<ModelPlan> plan =
      PlanModel(model, ExpertsOfRank(model, 0, static_cast<int>(ExpertDegree(parallel))));
  if (!plan.ok()) return {};
  const bool bf16 = training.precision() != TrainingConfig::PRECISION_FP32;
  const int64_t b = bf16 ? 2 : 4;
  const int64_t n = int64_t{training.micro_batch_size()} * training.max_seq_len();
  const int64_t d = model.d_model();

  MemoryEstimate memory;
  AddParameters(*plan, model, training, parallel, experts_apart, &memory);
  memory.buffers = 4 * plan->buffer_elements;
  const Blocks blocks = MeasureBlocks(model, b, training.max_seq_len());
  const double rows = static_cast<double>(n);
  // Micro-batches whose activations are held at a time.
  const int64_t lanes =
      AccumulationOf(training, parallel) == TrainingConfig::ACCUMULATION_LAYER_MAJOR
          ? MicroBatchesPerRank(training, parallel)
          : 1;
  switch (training.gradient_checkpointing()) {
    case TrainingConfig::GRADIENT_CHECKPOINTING_NONE:
      memory.activations = static_cast<int64_t>(rows * blocks.kept_sum) * lanes;
      break;
    case TrainingConfig::GRADIENT_CHECKPOINTING_SELECTIVE:
      memory.activations = static_cast<int64_t>(rows * blocks.selective_sum) * lanes +
                           static_cast<int64_t>(rows * blocks.redone_max);
      break;
    case TrainingConfig::GRADIENT_CHECKPOINTING_FULL:
      memory.activations = static_cast<int64_t>(rows * blocks.kept_max) +
                           static_cast<int64_t>(rows * blocks.replayed_sum) * lanes +
                           (model.n_layers() * lanes - 1) * n * b * d;
      break;
  }
  const int64_t logits_rows = LogitsChunkRows(n, model.vocab_size(), b, kDefaultLogitsChunkBytes);
  memory.workspace = b * (logits_rows * model.vocab_size() + (2 + lanes) * n * d) +
                     static_cast<int64_t>(rows * blocks.scratch_max) +
                     CompiledKernels(model, bf16) +
                     (bf16 ? 2 * LargestMatrix(*plan, model) : kPackedBytes);
  VisitingRows visitors;
  if (ExpertDegree(parallel) > 1) {
    visitors = VisitorsOf(model, parallel, static_cast<double>(b));
    AddExchangedRows(visitors, *plan, training, n, lanes, &memory);
  }
  if (experts_apart) {
    AddTogether(blocks, visitors, model, training, b, (lanes - 1) * n, &memory);
  }
  return memory;
}

int64_t LogitsChunkRows(int64_t rows, int64_t vocabulary, int64_t element_bytes,
                        int64_t chunk_bytes) {
  const int64_t fit = chunk_bytes / (vocabulary * element_bytes) / 16 * 16;
  return std::max<int64_t>(1, std::min(rows, std::max<int64_t>(fit, 16)));
}

}  // namespace heddle::model
