// Tensors and buffers of one block: names of product.md section 5, sizes and initial values of
// attention-and-moe.md sections 2 (dense), 5.2 (NSA), 6.1 (DSA), 7.1 (GSA), 8 (MLA) and 9 (MoE).
#include <cmath>
#include <numbers>

#include "heddle/v1/config.pb.h"
#include "model/model_plan_internal.h"

namespace heddle::model {
namespace {

using heddle::v1::AttentionKind;
using heddle::v1::GsaConfig;
using heddle::v1::MlaConfig;
using heddle::v1::ModelConfig;
using heddle::v1::MoeConfig;
using heddle::v1::NsaConfig;

using Shape = std::vector<int64_t>;

constexpr double kDytAlpha = 0.5;
constexpr double kGsaProjectionGain = std::numbers::sqrt2 / 2;  // 1/sqrt(2)
constexpr double kGsaGateGain = 0.1;
// Hidden width of the network that gives GSA's learned k from (mean, deviation, maximum).
constexpr int64_t kLearnedKInputs = 3;
constexpr int64_t kLearnedKHidden = 32;

constexpr Init kOnes = {InitKind::kOnes, 0.0};
constexpr Init kNormal = {InitKind::kNormal, 0.0};
constexpr Init kResidualOut = {InitKind::kResidualOut, 0.0};
constexpr Placement kJoined = {.joined = true};

class BlockPlanner {
 public:
  BlockPlanner(const ModelConfig& config, int layer, PlanBuilder* plan)
      : config_(config),
        layer_(layer),
        kind_(LayerKind(config, layer)),
        heads_(HeadsOf(config)),
        d_(config.d_model()),
        prefix_(Str("model.layers.", layer, ".")),
        plan_(plan) {}

  void Run() {
    AddNorm(config_, prefix_ + "input_layernorm", plan_);
    if (LayerUsesLatent(config_, layer_)) {
      Latent();
    } else {
      Projections();
    }
    if (kind_ == heddle::v1::ATTENTION_KIND_NSA) Nsa();
    if (kind_ == heddle::v1::ATTENTION_KIND_DSA) DsaIndexer();
    if (kind_ == heddle::v1::ATTENTION_KIND_GSA) Gsa();
    AddNorm(config_, prefix_ + "post_attention_layernorm", plan_);
    if (LayerHasExperts(config_, layer_)) {
      Router();
    } else {
      FeedForward("mlp.", config_.d_ffn());
    }
  }

  void Expert(int64_t expert) {
    FeedForward(Str("mlp.experts.", expert, "."), config_.moe().d_expert());
  }

 private:
  void Add(const std::string& name, Shape shape, Init init, Placement placement = {}) {
    plan_->Add(prefix_ + name, std::move(shape), init, placement);
  }

  bool NsaXavier() const {
    return kind_ == heddle::v1::ATTENTION_KIND_NSA &&
           config_.attention().nsa().compress_init() == NsaConfig::COMPRESS_INIT_XAVIER;
  }

  // Initial values of the projections around grouped-query attention.
  Init ProjectionInit(const Shape& shape) const {
    if (kind_ == heddle::v1::ATTENTION_KIND_GSA) return Xavier(shape, kGsaProjectionGain);
    return NsaXavier() ? Xavier(shape, 1.0) : kNormal;
  }
  Init OutputInit(const Shape& shape) const {
    if (kind_ == heddle::v1::ATTENTION_KIND_GSA) {
      return Xavier(shape, 1.0 / std::sqrt(2.0 * config_.n_layers()));
    }
    return NsaXavier() ? Xavier(shape, 1.0) : kResidualOut;
  }

  void Projections() {
    const Shape q = {heads_.query * heads_.dim, d_};
    const Shape kv = {heads_.kv * heads_.dim, d_};
    Add("self_attn.q_proj.weight", q, ProjectionInit(q));
    std::vector<std::string> names = {"k_proj", "v_proj"};
    if (kind_ == heddle::v1::ATTENTION_KIND_NSA &&
        config_.attention().nsa().kv() == NsaConfig::KV_SEPARATE) {
      names.insert(names.end(), {"k_proj_slc", "v_proj_slc", "k_proj_win", "v_proj_win"});
    }
    for (const std::string& name : names) {
      Add("self_attn." + name + ".weight", kv, ProjectionInit(kv), kJoined);
    }
    if (config_.attention().qkv_bias()) {
      Add("self_attn.q_proj.bias", {q[0]}, Constant(0));
      Add("self_attn.k_proj.bias", {kv[0]}, Constant(0), kJoined);
      Add("self_attn.v_proj.bias", {kv[0]}, Constant(0), kJoined);
    }
    const Shape out = {d_, heads_.query * heads_.dim};
    Add("self_attn.o_proj.weight", out, OutputInit(out));
  }

  void Nsa() {
    const NsaConfig& nsa = config_.attention().nsa();
    const int64_t l = nsa.kernel_size();
    const bool xavier = NsaXavier();
    const double mean = 1.0 / static_cast<double>(l);
    const Shape pe = {heads_.kv, l, heads_.dim};
    if (nsa.compress_type() != NsaConfig::COMPRESS_TYPE_AVGPOOL) {
      const bool linear = nsa.compress_type() == NsaConfig::COMPRESS_TYPE_LINEAR;
      const Shape shape =
          linear ? Shape{heads_.kv, l * heads_.dim, heads_.dim} : Shape{heads_.kv, l};
      const Init start = {linear ? InitKind::kDiagonal : InitKind::kConstant, mean};
      for (const char* name : {"self_attn.compress.k_weight", "self_attn.compress.v_weight"}) {
        Add(name, shape, xavier ? Xavier(shape, 1.0) : start);
      }
    }
    Add("self_attn.compress.k_pe", pe, xavier ? Xavier(pe, 1.0) : Constant(0));
    const Shape gate = {3 * heads_.query, d_};
    Add("self_attn.gate_proj.weight", gate, xavier ? Xavier(gate, 1.0) : kNormal);
  }

  // Width of what the indexer's queries read.
  int64_t IndexerInput() const {
    const bool latent = LayerUsesLatent(config_, layer_);
    const int64_t rank = config_.attention().mla().q_lora_rank();
    return latent && rank > 0 ? rank : d_;
  }

  void DsaIndexer() {
    if (!LayerHasIndexer(config_, layer_)) return;
    const heddle::v1::DsaConfig& dsa = config_.attention().dsa();
    const int64_t inputs = IndexerInput();
    const Placement joined = {.joined = true, .indexer = true};
    const Placement own = {.indexer = true};
    Add("self_attn.indexer.q_proj.weight",
        {int64_t{dsa.n_indexer_heads()} * dsa.d_indexer(), inputs}, TorchLinear(inputs), own);
    Add("self_attn.indexer.k_proj.weight", {dsa.d_indexer(), d_}, TorchLinear(d_),
        inputs == d_ ? joined : own);
    Add("self_attn.indexer.weights_proj.weight", {dsa.n_indexer_heads(), d_}, TorchLinear(d_),
        joined);
    if (dsa.profile() == heddle::v1::DsaConfig::PROFILE_V32) {
      Add("self_attn.indexer.k_norm.weight", {dsa.d_indexer()}, kOnes, own);
      Add("self_attn.indexer.k_norm.bias", {dsa.d_indexer()}, Constant(0), own);
    }
  }

  void Gsa() {
    const GsaConfig& gsa = config_.attention().gsa();
    const int64_t hi = gsa.n_indexer_heads();
    const Placement joined = {.joined = true, .indexer = true};
    const Placement own = {.indexer = true};
    const Shape q = {hi * gsa.d_indexer(), d_};
    const Shape k = {gsa.d_indexer(), d_};
    const Shape w = {hi, d_};
    Add("self_attn.indexer.q_proj.weight", q, Xavier(q, 1.0), own);
    Add("self_attn.indexer.k_proj.weight", k, Xavier(k, 1.0), joined);
    Add("self_attn.indexer.weights_proj.weight", w, Xavier(w, kGsaGateGain), joined);
    Add("self_attn.indexer.weights_proj.bias", {hi}, Constant(0), own);
    Add("self_attn.indexer.bias", {hi}, Constant(0), own);
    if (gsa.use_adaptive_k()) {
      if (gsa.adaptive_k() == GsaConfig::ADAPTIVE_K_LEARNED) LearnedK();
      plan_->AddBuffer(prefix_ + "self_attn.indexer.vref", {1});
    }
    Gates(gsa);
  }

  // The choice of k has no derivative and no loss is about k: the network computes what its weights
  // say and never learns.
  void LearnedK() {
    const Placement own = {.indexer = true, .trained = false};
    const std::string at = "self_attn.indexer.adaptive_k.";
    Add(at + "fc1.weight", {kLearnedKHidden, kLearnedKInputs}, TorchLinear(kLearnedKInputs), own);
    Add(at + "fc1.bias", {kLearnedKHidden}, TorchLinear(kLearnedKInputs), own);
    Add(at + "fc2.weight", {1, kLearnedKHidden}, TorchLinear(kLearnedKHidden), own);
    Add(at + "fc2.bias", {1}, TorchLinear(kLearnedKHidden), own);
  }

  // The form concerns the output gate; the value gate is elementwise always (section 7.1).
  void Gates(const GsaConfig& gsa) {
    const bool per_head = gsa.gate_form() == GsaConfig::GATE_FORM_PER_HEAD;
    const Shape value = {heads_.kv * heads_.dim, d_};
    const Shape output = {per_head ? heads_.query : heads_.query * heads_.dim, d_};
    const Init bias = Constant(gsa.gate_bias_init());
    const bool both = gsa.use_value_gate() && gsa.use_output_gate();
    const auto add = [&](const char* part, bool is_weight) {
      if (gsa.use_value_gate()) {
        Add(Str("self_attn.value_gate.", part), is_weight ? value : Shape{value[0]},
            is_weight ? Xavier(value, kGsaGateGain) : bias);
      }
      if (gsa.use_output_gate()) {
        Add(Str("self_attn.output_gate.", part), is_weight ? output : Shape{output[0]},
            is_weight ? Xavier(output, kGsaGateGain) : bias, {.joined = both});
      }
    };
    add("weight", true);
    add("bias", false);
  }

  void Latent() {
    const MlaConfig& mla = config_.attention().mla();
    const int64_t rq = mla.q_lora_rank();
    const int64_t dc = mla.kv_lora_rank();
    const int64_t dn = mla.qk_nope_head_dim();
    const int64_t dr = mla.qk_rope_head_dim();
    const int64_t dv = mla.v_head_dim();
    const int64_t q_rows = heads_.query * (dn + dr);
    if (rq == 0) {
      Add("self_attn.q_proj.weight", {q_rows, d_}, kNormal);
    } else {
      Add("self_attn.q_a_proj.weight", {rq, d_}, kNormal);
    }
    Add("self_attn.kv_a_proj_with_mqa.weight", {dc + dr, d_}, kNormal, kJoined);
    if (rq > 0) {
      Add("self_attn.q_a_layernorm.weight", {rq}, kOnes);
      Add("self_attn.q_b_proj.weight", {q_rows, rq}, kNormal);
    }
    Add("self_attn.kv_a_layernorm.weight", {dc}, kOnes);
    if (mla.latent_norm() == MlaConfig::LATENT_NORM_LAYERNORM) {
      Add("self_attn.kv_a_layernorm.bias", {dc}, Constant(0));
    }
    Add("self_attn.kv_b_proj.weight", {heads_.query * (dn + dv), dc}, kNormal);
    Add("self_attn.o_proj.weight", {d_, heads_.query * dv}, kNormal);
  }

  // `gelu` and `silu` have no gate: up_proj and down_proj alone.
  void FeedForward(const std::string& at, int64_t width) {
    const bool gated = config_.ffn() == ModelConfig::FFN_SWIGLU;
    const bool torch = kind_ == heddle::v1::ATTENTION_KIND_GSA;  // section 7.1
    const Init in = torch ? TorchLinear(d_) : kNormal;
    if (gated) Add(at + "gate_proj.weight", {width, d_}, in);
    Add(at + "up_proj.weight", {width, d_}, in, {.joined = gated});
    Add(at + "down_proj.weight", {d_, width}, torch ? TorchLinear(width) : kResidualOut);
  }

  void Router() {
    const MoeConfig& moe = config_.moe();
    Add("mlp.gate.weight", {moe.n_experts(), d_}, kNormal);
    plan_->AddBuffer(prefix_ + "mlp.gate.e_score_correction_bias", {moe.n_experts()});
    if (moe.n_shared() > 0) {
      FeedForward("mlp.shared_experts.", int64_t{moe.n_shared()} * moe.d_expert());
    }
  }

  const ModelConfig& config_;
  const int layer_;
  const AttentionKind kind_;
  const Heads heads_;
  const int64_t d_;
  const std::string prefix_;
  PlanBuilder* plan_;
};

}  // namespace

void AddNorm(const ModelConfig& config, const std::string& name, PlanBuilder* plan) {
  const int64_t d = config.d_model();
  if (config.norm() == ModelConfig::NORM_DYT) plan->Add(name + ".alpha", {1}, Constant(kDytAlpha));
  plan->Add(name + ".weight", {d}, kOnes);
  if (config.norm() != ModelConfig::NORM_RMSNORM) plan->Add(name + ".bias", {d}, Constant(0));
}

void AddBlock(const ModelConfig& config, int layer, PlanBuilder* plan) {
  BlockPlanner(config, layer, plan).Run();
}

void AddExpert(const ModelConfig& config, int layer, int64_t expert, PlanBuilder* plan) {
  BlockPlanner(config, layer, plan).Expert(expert);
}

}  // namespace heddle::model
