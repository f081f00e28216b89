#include "model/model_plan.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "heddle/v1/config.pb.h"

namespace heddle::model {
namespace {

using heddle::v1::AttentionKind;
using heddle::v1::ModelConfig;

constexpr double kInitStddev = 0.02;
// Flash backward recomputes the scores: 2.5 x the forward (attention-and-moe.md section 2).
constexpr double kCoreBackwardFactor = 2.5;

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

// Appends tensors to a plan while keeping the layout invariants.
class PlanBuilder {
 public:
  explicit PlanBuilder(const ModelConfig& config) : config_(config) {}

  void BeginUnit(const std::string& name) {
    Align();
    UnitSpec unit;
    unit.name = name;
    unit.first_tensor = static_cast<int>(plan_.tensors.size());
    unit.offset = plan_.flat_elements;
    plan_.units.push_back(unit);
  }

  // `joined`: follows the previous tensor without a gap (invariant 2).
  void Add(const std::string& name, std::vector<int64_t> shape, InitKind init,
           bool joined = false) {
    if (!joined) Align();
    TensorSpec tensor;
    tensor.name = name;
    tensor.shape = std::move(shape);
    tensor.elements = 1;
    for (const int64_t extent : tensor.shape) tensor.elements *= extent;
    tensor.offset = plan_.flat_elements;
    tensor.unit = static_cast<int>(plan_.units.size()) - 1;
    tensor.init = init;
    tensor.init_stddev = Stddev(init);
    tensor.decays =
        name.find("norm") == std::string::npos && name.find("bias") == std::string::npos;
    plan_.parameters += tensor.elements;
    plan_.flat_elements += tensor.elements;
    plan_.tensors.push_back(std::move(tensor));
    ++plan_.units.back().tensor_count;
  }

  ModelPlan Finish() {
    Align();
    for (size_t i = 0; i < plan_.units.size(); ++i) {
      const int64_t end =
          i + 1 < plan_.units.size() ? plan_.units[i + 1].offset : plan_.flat_elements;
      plan_.units[i].elements = end - plan_.units[i].offset;
    }
    return std::move(plan_);
  }

 private:
  void Align() { plan_.flat_elements = RoundUp(plan_.flat_elements, kFlatAlignment); }

  double Stddev(InitKind init) const {
    switch (init) {
      case InitKind::kOnes:
        return 0.0;
      case InitKind::kNormal:
        return kInitStddev;
      case InitKind::kResidualOut:
        return kInitStddev / std::sqrt(2.0 * config_.n_layers());
    }
    return 0.0;
  }

  const ModelConfig& config_;
  ModelPlan plan_;
};

void AddProblem(bool bad, const std::string& text, std::vector<std::string>* problems) {
  if (bad) problems->push_back(text);
}

void CheckLayers(const ModelConfig& c, std::vector<std::string>* problems) {
  for (int layer = 0; layer < std::max(1, c.attention().pattern_size()); ++layer) {
    const AttentionKind kind = LayerKind(c, layer);
    const bool known =
        kind == heddle::v1::ATTENTION_KIND_DENSE || kind == heddle::v1::ATTENTION_KIND_SWA;
    AddProblem(!known,
               Str("model.attention.kind: this build trains dense and swa layers, not ",
                   heddle::v1::AttentionKind_Name(kind)),
               problems);
    if (kind == heddle::v1::ATTENTION_KIND_SWA) {
      AddProblem(c.attention().swa().window() < 1, "model.attention.swa.window: must be >= 1",
                 problems);
      AddProblem(c.attention().swa().sink_size() < 0, "model.attention.swa.sink_size: must be >= 0",
                 problems);
    }
  }
}

void CheckSupported(const ModelConfig& c, std::vector<std::string>* problems) {
  AddProblem(c.ffn() != ModelConfig::FFN_SWIGLU, "model.ffn: this build trains swiglu only",
             problems);
  AddProblem(c.norm() != ModelConfig::NORM_RMSNORM, "model.norm: this build trains rmsnorm only",
             problems);
  AddProblem(c.has_moe() && c.moe().n_experts() > 0,
             "model.moe.n_experts: this build has no mixture of experts", problems);
  AddProblem(c.dropout() != 0.0, "model.dropout: this build trains without dropout", problems);
  AddProblem(c.attention().has_logit_scale(),
             "model.attention.logit_scale: this build has no logit temperature", problems);
}

std::vector<std::string> Problems(const ModelConfig& c) {
  std::vector<std::string> problems;
  AddProblem(c.vocab_size() < 1, "model.vocab_size: must be >= 1", &problems);
  AddProblem(c.d_model() < 1, "model.d_model: must be >= 1", &problems);
  AddProblem(c.n_layers() < 1, "model.n_layers: must be >= 1", &problems);
  AddProblem(c.n_heads() < 1, "model.n_heads: must be >= 1", &problems);
  AddProblem(c.d_ffn() < 1, "model.d_ffn: must be >= 1", &problems);
  AddProblem(!(c.norm_eps() > 0), "model.norm_eps: must be > 0", &problems);
  AddProblem(c.max_position_embeddings() < 1, "model.max_position_embeddings: must be >= 1",
             &problems);
  AddProblem(!(c.rope().theta() > 1), "model.rope.theta: must be > 1", &problems);
  AddProblem(!(c.rope().scaling().factor() >= 1), "model.rope.scaling.factor: must be >= 1",
             &problems);
  if (problems.empty()) {
    const Heads heads = HeadsOf(c);
    AddProblem(heads.kv < 1 || heads.query % heads.kv != 0,
               Str("model.n_kv_heads: must divide n_heads (", heads.query, " by ", heads.kv, ")"),
               &problems);
    AddProblem(c.head_dim() == 0 && c.d_model() % c.n_heads() != 0,
               "model.head_dim: give it, n_heads does not divide d_model", &problems);
    AddProblem(heads.dim % 2 != 0 || heads.dim < 2,
               Str("model.head_dim: rotary width must be even (is ", heads.dim, ")"), &problems);
    CheckLayers(c, &problems);
    CheckSupported(c, &problems);
  }
  return problems;
}

// Sum over positions 0..length-1 of the visible keys, in closed form.
double VisibleKeysSum(const ModelConfig& config, int layer, int64_t length) {
  const double t = static_cast<double>(length);
  const int64_t full = FullyVisible(config, layer);
  if (length <= full) return t * (t + 1) / 2;
  const int64_t sinks = WindowOf(config).sinks;
  const int64_t window = full - sinks;
  // Positions below `full` see everything before them; later ones see window + sinks keys.
  const double head = static_cast<double>(full) * (static_cast<double>(full) + 1) / 2;
  return head + (t - static_cast<double>(full)) * static_cast<double>(window + sinks);
}

}  // namespace

Heads HeadsOf(const ModelConfig& config) {
  Heads heads;
  heads.query = config.n_heads();
  heads.kv = config.n_kv_heads() > 0 ? config.n_kv_heads() : config.n_heads();
  heads.dim = config.head_dim() > 0 ? config.head_dim() : config.d_model() / config.n_heads();
  return heads;
}

AttentionKind LayerKind(const ModelConfig& config, int layer) {
  const heddle::v1::AttentionConfig& attention = config.attention();
  if (attention.pattern_size() == 0) return attention.kind();
  return attention.pattern(layer % attention.pattern_size());
}

Window WindowOf(const ModelConfig& config) {
  const heddle::v1::SwaConfig& swa = config.attention().swa();
  Window window;
  window.keys = swa.window() + (swa.window_inclusive() ? 1 : 0);
  window.sinks = swa.sink_size();
  return window;
}

int64_t FullyVisible(const ModelConfig& config, int layer) {
  if (LayerKind(config, layer) != heddle::v1::ATTENTION_KIND_SWA) return INT64_MAX;
  const Window window = WindowOf(config);
  return window.keys + window.sinks;
}

namespace {

const TensorSpec* FindByName(const std::vector<TensorSpec>& specs, const std::string& name) {
  for (const TensorSpec& spec : specs) {
    if (spec.name == name) return &spec;
  }
  return nullptr;
}

}  // namespace

const TensorSpec* ModelPlan::Find(const std::string& name) const {
  return FindByName(tensors, name);
}
const TensorSpec* ModelPlan::FindBuffer(const std::string& name) const {
  return FindByName(buffers, name);
}

StatusOr<ModelPlan> PlanModel(const ModelConfig& config) {
  const std::vector<std::string> problems = Problems(config);
  if (!problems.empty()) {
    std::string text;
    for (const std::string& problem : problems) {
      if (!text.empty()) text += "\n";
      text += problem;
    }
    return InvalidArgument(text);
  }
  const int64_t d = config.d_model();
  const int64_t ff = config.d_ffn();
  const Heads heads = HeadsOf(config);
  PlanBuilder plan(config);
  plan.BeginUnit("embedding");
  plan.Add("model.embed_tokens.weight", {config.vocab_size(), d}, InitKind::kNormal);
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    const std::string prefix = Str("model.layers.", layer, ".");
    plan.BeginUnit(Str("block.", layer));
    plan.Add(prefix + "input_layernorm.weight", {d}, InitKind::kOnes);
    plan.Add(prefix + "self_attn.q_proj.weight", {heads.query * heads.dim, d}, InitKind::kNormal);
    plan.Add(prefix + "self_attn.k_proj.weight", {heads.kv * heads.dim, d}, InitKind::kNormal,
             /*joined=*/true);
    plan.Add(prefix + "self_attn.v_proj.weight", {heads.kv * heads.dim, d}, InitKind::kNormal,
             /*joined=*/true);
    plan.Add(prefix + "self_attn.o_proj.weight", {d, heads.query * heads.dim},
             InitKind::kResidualOut);
    plan.Add(prefix + "post_attention_layernorm.weight", {d}, InitKind::kOnes);
    plan.Add(prefix + "mlp.gate_proj.weight", {ff, d}, InitKind::kNormal);
    plan.Add(prefix + "mlp.up_proj.weight", {ff, d}, InitKind::kNormal, /*joined=*/true);
    plan.Add(prefix + "mlp.down_proj.weight", {d, ff}, InitKind::kResidualOut);
  }
  plan.BeginUnit("head");
  plan.Add("model.norm.weight", {d}, InitKind::kOnes);
  if (!config.tie_embeddings()) {
    plan.Add("lm_head.weight", {config.vocab_size(), d}, InitKind::kNormal);
  }
  return plan.Finish();
}

int64_t VisibleKeys(const ModelConfig& config, int layer, int64_t position) {
  return std::min(position + 1, FullyVisible(config, layer));
}

TokenFlops FlopsPerToken(const ModelConfig& config, int64_t sequence_length) {
  const Heads heads = HeadsOf(config);
  const double d = config.d_model();
  const double width = static_cast<double>(heads.dim);
  const double projections = d * width * static_cast<double>(2 * heads.query + 2 * heads.kv);
  const double ffn = 3.0 * d * config.d_ffn();
  TokenFlops flops;
  flops.forward_weights = 2.0 * (config.n_layers() * (projections + ffn) + d * config.vocab_size());
  // C = 2 Hq (Dk + Dv) per visible key (attention-and-moe.md section 2).
  const double per_key = 2.0 * static_cast<double>(heads.query) * 2.0 * width;
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    flops.forward_core += per_key * VisibleKeysSum(config, layer, sequence_length) /
                          static_cast<double>(sequence_length);
  }
  flops.training = 3.0 * flops.forward_weights + (1.0 + kCoreBackwardFactor) * flops.forward_core;
  return flops;
}

MemoryEstimate EstimateMemory(const ModelConfig& model,
                              const heddle::v1::TrainingConfig& training) {
  using heddle::v1::TrainingConfig;
  const StatusOr<ModelPlan> plan = PlanModel(model);
  if (!plan.ok()) return {};
  const bool bf16 = training.precision() != TrainingConfig::PRECISION_FP32;
  const int64_t b = bf16 ? 2 : 4;
  const int64_t n = int64_t{training.micro_batch_size()} * training.max_seq_len();
  const int64_t d = model.d_model();
  const Heads heads = HeadsOf(model);
  const int64_t qkv = (heads.query + 2 * heads.kv) * heads.dim;

  MemoryEstimate memory;
  memory.compute_weights = bf16 ? 2 * plan->flat_elements : 0;
  memory.master = 4 * plan->flat_elements;
  const int64_t moments = training.optimizer() == TrainingConfig::OPTIMIZER_LION ? 1 : 2;
  const int64_t moment_bytes = training.moments() == TrainingConfig::MOMENTS_BF16 ? 2 : 4;
  memory.moments = moments * moment_bytes * plan->flat_elements;
  memory.gradients = 4 * plan->flat_elements;
  // Saved by a block: input, two normed inputs, q k v, attention output, middle, gate and up, in
  // the compute type; log-sum-exp per head and two reciprocal norms in fp32.
  const int64_t block =
      n * (b * (4 * d + qkv + heads.query * heads.dim + 2 * model.d_ffn()) + 4 * (heads.query + 2));
  const bool recompute =
      training.gradient_checkpointing() != TrainingConfig::GRADIENT_CHECKPOINTING_NONE;
  const int64_t blocks_held = recompute ? 1 : model.n_layers();
  const int64_t inputs_only = recompute ? (model.n_layers() - 1) * n * b * d : 0;
  memory.activations = block * blocks_held + inputs_only;
  const int64_t logits_rows = LogitsChunkRows(n, model.vocab_size(), b, kDefaultLogitsChunkBytes);
  const int64_t largest_matrix =
      d * std::max<int64_t>(model.vocab_size(), 2 * int64_t{model.d_ffn()});
  memory.workspace = b * (logits_rows * model.vocab_size() + 3 * n * d + 2 * n * model.d_ffn()) +
                     (bf16 ? 2 * largest_matrix : 0);
  return memory;
}

int64_t LogitsChunkRows(int64_t rows, int64_t vocabulary, int64_t element_bytes,
                        int64_t chunk_bytes) {
  const int64_t fit = chunk_bytes / (vocabulary * element_bytes) / 16 * 16;
  return std::max<int64_t>(1, std::min(rows, std::max<int64_t>(fit, 16)));
}

int64_t KvCacheBytes(const ModelConfig& config, int64_t length, int element_bytes) {
  const Heads heads = HeadsOf(config);
  int64_t tokens = 0;
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    // A window layer owns its ring and its sinks whatever the length (section 4).
    const int64_t limit = FullyVisible(config, layer);
    tokens += limit == INT64_MAX ? length : limit;
  }
  return tokens * heads.kv * 2 * heads.dim * element_bytes;
}

}  // namespace heddle::model
