#include "tests/model/config_effect_tables.h"

namespace heddle::model_test {
namespace {

using Rows = std::vector<EffectRow>;

// Large enough a span for two words of yarn or llama3 to differ on 42 tokens and three frequencies.
const char kYarn[] =
    "max_position_embeddings: 4096 rope { scaling { type: TYPE_YARN factor: 4 "
    "original_max_position_embeddings: 16 beta_fast: 2 } }";
const char kLlama3[] =
    "rope { scaling { type: TYPE_LLAMA3 factor: 4 original_max_position_embeddings: 100 } }";

Rows ShapeRows() {
  return {
      {"vocab_size", "dense", "", {"38", "41"}, "shapes"},
      {"d_model", "dense", "", {"24"}, "shapes"},
      {"n_layers", "dense", "", {"2", "4"}, "shapes"},
      {"n_heads", "dense", "", {"2", "6"}, "shapes"},
      {"n_kv_heads", "dense", "", {"0", "1"}, "shapes"},
      {"head_dim", "dense", "d_model: 16", {"0", "8"}, "shapes"},
      {"d_ffn", "dense", "", {"29"}, "shapes"},
      {"ffn", "dense", "", {"FFN_GELU", "FFN_SILU"}, "logits"},
      {"norm", "dense", "", {"NORM_LAYERNORM", "NORM_DYT"}, "logits"},
      {"norm_eps", "dense", "", {"1e-5"}, "logits"},
      {"norm_eps", "experts", "", {"1e-5"}, "logits"},
      {"norm_eps", "mla", "", {"1e-5"}, "logits"},
      {"norm_eps", "dsa v32", "", {"1e-5"}, "logits"},
      {"tie_embeddings", "dense", "", {"false"}, "shapes"},
      // Yarn scales only where documents become longer than the original.
      {"max_position_embeddings", "dense", kYarn, {"16"}, "logits"},
  };
}

Rows RopeRows() {
  return {
      {"rope.theta", "dense", "", {"5e5"}, "logits"},
      {"rope.theta", "mla", "", {"5e5"}, "logits"},
      {"rope.theta", "nsa", "", {"5e5"}, "logits"},
      {"rope.layout", "dense", "", {"LAYOUT_INTERLEAVED"}, "logits"},
      {"rope.layout", "mla", "", {"LAYOUT_HALF"}, "logits"},
      {"rope.scaling.type",
       "dense",
       kYarn,
       {"TYPE_NONE", "TYPE_LINEAR", "TYPE_NTK", "TYPE_LLAMA3"},
       "logits"},
      {"rope.scaling.type",
       "mla",
       kYarn,
       {"TYPE_NONE", "TYPE_LINEAR", "TYPE_NTK", "TYPE_LLAMA3"},
       "logits"},
      {"rope.scaling.factor", "dense", kYarn, {"2"}, "logits"},
      {"rope.scaling.factor", "dense", kLlama3, {"2"}, "logits"},
      {"rope.scaling.factor",
       "dense",
       "rope { scaling { type: TYPE_LINEAR factor: 4 } }",
       {"2"},
       "logits"},
      {"rope.scaling.factor",
       "dense",
       "rope { scaling { type: TYPE_NTK factor: 4 } }",
       {"2"},
       "logits"},
      {"rope.scaling.low_freq_factor", "dense", kLlama3, {"0.5"}, "logits"},
      {"rope.scaling.high_freq_factor", "dense", kLlama3, {"40"}, "logits"},
      {"rope.scaling.original_max_position_embeddings", "dense", kLlama3, {"1000"}, "logits"},
      {"rope.scaling.original_max_position_embeddings", "dense", kYarn, {"1000"}, "logits"},
      {"rope.scaling.beta_fast", "dense", kYarn, {"0.1"}, "logits"},
      {"rope.scaling.beta_slow", "dense", kYarn, {"0.01"}, "logits"},
      {"rope.scaling.mscale", "dense", kYarn, {"0", "2"}, "logits"},
      {"rope.scaling.mscale", "mla", kYarn, {"0", "2"}, "logits"},
  };
}

Rows KindRows() {
  return {
      {"attention.kind",
       "dense",
       "attention { swa { window: 5 } }",
       {"ATTENTION_KIND_SWA", "ATTENTION_KIND_NSA", "ATTENTION_KIND_DSA", "ATTENTION_KIND_GSA",
        "ATTENTION_KIND_MLA"},
       "gradients"},
      {"attention.pattern",
       "dense",
       "attention { swa { window: 5 } }",
       {"ATTENTION_KIND_SWA", "ATTENTION_KIND_SWA ATTENTION_KIND_DENSE",
        "ATTENTION_KIND_DENSE ATTENTION_KIND_SWA"},
       "logits"},
      {"attention.qkv_bias", "dense", "", {"true"}, "shapes"},
      {"attention.qkv_bias", "swa", "", {"true"}, "shapes"},
      {"attention.swa.window", "swa", "", {"4", "6"}, "logits"},
      {"attention.swa.window", "swa", "", {"4", "6"}, "decoded"},
      {"attention.swa.sink_size", "swa", "", {"0", "3"}, "logits"},
      {"attention.swa.sink_size", "swa", "", {"0", "3"}, "decoded"},
      {"attention.swa.window_inclusive", "swa", "", {"true"}, "logits"},
      {"attention.swa.window_inclusive", "swa", "", {"true"}, "decoded"},
  };
}

Rows NsaRows() {
  return {
      {"attention.nsa.compress_type",
       "nsa",
       "",
       {"COMPRESS_TYPE_AVGPOOL", "COMPRESS_TYPE_LINEAR"},
       "shapes"},
      {"attention.nsa.compress_type",
       "nsa",
       "attention { nsa { compress_init: COMPRESS_INIT_XAVIER } }",
       {"COMPRESS_TYPE_AVGPOOL", "COMPRESS_TYPE_LINEAR"},
       "logits"},
      {"attention.nsa.kernel_size", "nsa", "", {"2", "8"}, "logits"},
      {"attention.nsa.kernel_stride", "nsa", "", {"1", "4"}, "logits"},
      {"attention.nsa.block_size", "nsa", "", {"4", "16"}, "logits"},
      {"attention.nsa.topk", "nsa", "", {"2", "4"}, "logits"},
      {"attention.nsa.topk", "nsa", "", {"2", "4"}, "decoded"},
      {"attention.nsa.init_blocks", "nsa", "", {"0", "2"}, "logits"},
      {"attention.nsa.local_blocks", "nsa", "", {"0", "2"}, "logits"},
      {"attention.nsa.window_size", "nsa", "", {"5", "9"}, "logits"},
      {"attention.nsa.window_size", "nsa", "", {"5", "9"}, "decoded"},
      {"attention.nsa.kv", "nsa", "", {"KV_SEPARATE"}, "logits"},
      {"attention.nsa.compress_init", "nsa", "", {"COMPRESS_INIT_XAVIER"}, "init"},
      {"attention.nsa.compress_init", "nsa separate linear", "", {"COMPRESS_INIT_MEAN"}, "init"},
  };
}

Rows DsaRows() {
  // One head whose scores relu makes 0 for half of the keys: many are equal.
  const std::string ties = "attention { dsa { n_indexer_heads: 1 topk: 16 } }";
  const std::string latent =
      "attention { mla { kv_lora_rank: 12 qk_nope_head_dim: 6 qk_rope_head_dim: 4 v_head_dim: 5 } "
      "}";
  return {
      {"attention.dsa.n_indexer_heads", "dsa v32", "", {"1", "3"}, "indexer loss"},
      {"attention.dsa.d_indexer", "dsa v32", "", {"4", "12"}, "indexer loss"},
      {"attention.dsa.topk", "dsa v32", "", {"6", "9"}, "logits"},
      {"attention.dsa.topk", "dsa v32", "", {"6", "9"}, "decoded"},
      {"attention.dsa.profile", "dsa v32", "", {"PROFILE_SEED"}, "logits"},
      {"attention.dsa.kl_weight", "dsa v32", "", {"0", "0.5"}, "indexer loss"},
      {"attention.dsa.kl_weight", "dsa v32", "", {"0", "0.5"}, "gradients"},
      {"attention.dsa.core", "dsa v32", latent, {"CORE_MLA"}, "logits"},
      {"attention.dsa.tie_break", "dsa v32", ties, {"TIE_BREAK_NEWEST"}, "logits"},
      {"attention.dsa.tie_break", "dsa v32", ties, {"TIE_BREAK_NEWEST"}, "decoded"},
      {"attention.dsa.index_share_every", "dsa v32", "", {"2", "3"}, "logits"},
  };
}

Rows GsaRows() {
  const std::string fixed = "attention { gsa { use_adaptive_k: false } }";
  const std::string learned = "attention { gsa { adaptive_k: ADAPTIVE_K_LEARNED } }";
  const std::string entropy = "attention { gsa { adaptive_k: ADAPTIVE_K_ENTROPY } }";
  return {
      {"attention.gsa.k_base", "gsa", "", {"5", "8"}, "logits"},
      {"attention.gsa.k_base", "gsa", fixed, {"5", "8"}, "logits"},
      {"attention.gsa.k_min", "gsa", learned, {"1", "5"}, "logits"},
      {"attention.gsa.k_max", "gsa", learned, {"7", "12"}, "logits"},
      {"attention.gsa.use_adaptive_k", "gsa", "", {"false"}, "logits"},
      {"attention.gsa.use_adaptive_k", "gsa", "", {"false"}, "decoded"},
      {"attention.gsa.use_value_gate", "gsa", "", {"false"}, "logits"},
      {"attention.gsa.use_output_gate", "gsa", "", {"false"}, "logits"},
      {"attention.gsa.n_indexer_heads", "gsa", "", {"1", "3"}, "indexer loss"},
      {"attention.gsa.d_indexer", "gsa", "", {"6", "12"}, "indexer loss"},
      {"attention.gsa.adaptive_k",
       "gsa",
       "",
       {"ADAPTIVE_K_VARIANCE", "ADAPTIVE_K_ENTROPY", "ADAPTIVE_K_LEARNED"},
       "logits"},
      {"attention.gsa.adaptive_k_temperature", "gsa", "", {"0.2", "4"}, "logits"},
      {"attention.gsa.adaptive_k_temperature", "gsa", entropy, {"0.2"}, "logits"},
      {"attention.gsa.indexer_activation", "gsa", "", {"INDEXER_ACTIVATION_RELU"}, "indexer loss"},
      {"attention.gsa.indexer_temperature", "gsa", "", {"0.25", "1"}, "indexer loss"},
      {"attention.gsa.indexer_temperature", "gsa", "", {"0.25", "1"}, "gradients"},
      {"attention.gsa.kl_weight", "gsa", "", {"0", "0.5"}, "indexer loss"},
      {"attention.gsa.kl_weight", "gsa", "", {"0", "0.5"}, "gradients"},
      {"attention.gsa.gate_activation",
       "gsa",
       "",
       {"GATE_ACTIVATION_TANH", "GATE_ACTIVATION_SILU"},
       "logits"},
      {"attention.gsa.gate_form", "gsa", "", {"GATE_FORM_PER_HEAD"}, "logits"},
      {"attention.gsa.gate_bias_init", "gsa", "", {"0", "1"}, "init"},
      {"attention.gsa.gate_bias_init", "gsa", "", {"0", "1"}, "logits"},
      {"attention.gsa.dense_residual_alpha", "gsa", "", {"0.25", "1"}, "logits"},
      {"attention.gsa.dense_residual_alpha", "gsa", "", {"0.25", "1"}, "decoded"},
  };
}

Rows MlaRows() {
  return {
      {"attention.mla.q_lora_rank", "mla", "", {"8", "10"}, "logits"},
      {"attention.mla.kv_lora_rank", "mla", "", {"10"}, "logits"},
      {"attention.mla.qk_nope_head_dim", "mla", "", {"8"}, "logits"},
      {"attention.mla.qk_rope_head_dim", "mla", "", {"2", "6"}, "logits"},
      {"attention.mla.v_head_dim", "mla", "", {"4", "7"}, "logits"},
      {"attention.mla.latent_norm", "mla", "", {"LATENT_NORM_LAYERNORM"}, "logits"},
      {"attention.mla.latent_norm", "mla q lora", "", {"LATENT_NORM_LAYERNORM"}, "decoded"},
  };
}

Rows MoeRows() {
  const std::string balanced = "moe { n_experts: 3 bias_update_rate: 0.125 }";  // an odd number
  const std::string groups = "moe { n_groups: 2 topk_groups: 2 }";
  return {
      {"moe.n_experts", "experts", "", {"0", "3", "6"}, "logits"},
      {"moe.top_k", "experts", "", {"1", "3"}, "logits"},
      {"moe.n_shared", "experts", "", {"0", "2"}, "logits"},
      {"moe.d_expert", "experts", "", {"9"}, "logits"},
      {"moe.router", "experts", "", {"ROUTER_SIGMOID"}, "logits"},
      {"moe.norm_topk", "experts", "", {"false"}, "logits"},
      {"moe.route_scale", "experts", "", {"2.5"}, "logits"},
      {"moe.aux_loss", "experts", "", {"0", "0.02"}, "balance loss"},
      {"moe.aux_loss", "experts", "", {"0", "0.02"}, "gradients"},
      {"moe.z_loss", "experts", "", {"0", "0.002"}, "router loss"},
      {"moe.z_loss", "experts", "", {"0", "0.002"}, "gradients"},
      {"moe.bias_update_rate", "experts", "", {"0.125", "0.25"}, "buffers"},
      {"moe.bias_update_rate", "experts", "", {"0.125", "0.25"}, "logits"},
      {"moe.every", "experts", "", {"2", "3"}, "logits"},
      {"moe.layers", "experts", "", {"0", "1 2"}, "logits"},
      {"moe.first_dense", "experts", "", {"1", "2"}, "logits"},
      {"moe.n_groups", "experts", "", {"2"}, "logits"},
      {"moe.topk_groups", "experts", groups, {"1"}, "logits"},
      {"moe.capacity_factor", "experts", "", {"0", "0.5"}, "loss"},
      {"moe.noise_std", "experts", "", {"0", "0.3"}, "loss"},
      {"moe.aux_form", "experts", "", {"AUX_FORM_SEQUENCE", "AUX_FORM_IMPORTANCE"}, "balance loss"},
      {"moe.aux_form", "experts", "", {"AUX_FORM_SEQUENCE", "AUX_FORM_IMPORTANCE"}, "gradients"},
      {"moe.bias_center", "experts", balanced, {"true"}, "buffers"},
      {"moe.force_balance", "experts", "", {"true"}, "logits"},
  };
}

}  // namespace

std::vector<EffectRow> EffectRows() {
  Rows all;
  for (const Rows& rows : {ShapeRows(), RopeRows(), KindRows(), NsaRows(), DsaRows(), GsaRows(),
                           MlaRows(), MoeRows()}) {
    all.insert(all.end(), rows.begin(), rows.end());
  }
  return all;
}

std::vector<OutsideRow> RowsOutsideTheModel() {
  const std::string kinds = "tests/worker/trainer/kinds_test.cc";
  const std::string stage = "the trainer counts the steps of stage 1";
  const std::string frozen = "the trainer leaves parameters out of the step";
  return {
      {"attention.dsa.warmup_steps", stage, kinds, "Kinds, D5FrozenWarmupTrainsIndexersAlone"},
      {"attention.gsa.warmup_steps", stage, kinds, "Kinds, D5FrozenWarmupTrainsIndexersAlone"},
      {"attention.dsa.freeze", frozen, kinds, "Kinds, D5FrozenWarmupTrainsIndexersAlone"},
      {"attention.gsa.freeze", frozen, kinds, "Kinds, D5FrozenWarmupTrainsIndexersAlone"},
      {"attention.gsa.indexer_lr_multiplier", "the optimizer scales the rate of a group", kinds,
       "Kinds, GsaIndexersLearnAtTheirOwnRate"},
  };
}

std::vector<RefusedRow> RefusedRows() {
  const std::string scale = "attention.logit_scale";
  return {
      {"dropout", "0.1", "dropout"},
      {"attention.logit_scale.base", "3", scale},
      {"attention.logit_scale.window", "64", scale},
      {"attention.logit_scale.offset", "1", scale},
      {"attention.logit_scale.min", "0.5", scale},
      {"attention.logit_scale.max", "3", scale},
  };
}

}  // namespace heddle::model_test
