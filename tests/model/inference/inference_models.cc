#include "tests/model/inference/inference_models.h"

#include "base/status/status.h"

namespace heddle::inference_test {
namespace {

using heddle::v1::AttentionKind;
using heddle::v1::DsaConfig;
using heddle::v1::GsaConfig;
using heddle::v1::ModelConfig;
using heddle::v1::NsaConfig;

ModelConfig OfKinds(const std::vector<AttentionKind>& kinds) {
  ModelConfig config = model_test::TinyConfig(model_test::Kind::kDense, true);
  heddle::v1::AttentionConfig* attention = config.mutable_attention();
  if (kinds.size() == 1) {
    attention->set_kind(kinds.front());
  } else {
    for (const AttentionKind kind : kinds) attention->add_pattern(kind);
  }
  for (const AttentionKind kind : kinds) {
    switch (kind) {
      case heddle::v1::ATTENTION_KIND_SWA:
        attention->mutable_swa()->set_window(5);
        attention->mutable_swa()->set_sink_size(2);
        break;
      case heddle::v1::ATTENTION_KIND_NSA:
        attention->mutable_nsa()->set_kernel_size(4);
        attention->mutable_nsa()->set_kernel_stride(2);
        attention->mutable_nsa()->set_block_size(8);
        attention->mutable_nsa()->set_topk(3);
        attention->mutable_nsa()->set_init_blocks(1);
        attention->mutable_nsa()->set_local_blocks(1);
        attention->mutable_nsa()->set_window_size(6);
        break;
      case heddle::v1::ATTENTION_KIND_DSA:
        attention->mutable_dsa()->set_n_indexer_heads(2);
        attention->mutable_dsa()->set_d_indexer(8);
        attention->mutable_dsa()->set_topk(7);
        break;
      case heddle::v1::ATTENTION_KIND_GSA:
        attention->mutable_gsa()->set_n_indexer_heads(2);
        attention->mutable_gsa()->set_d_indexer(8);
        attention->mutable_gsa()->set_k_min(3);
        attention->mutable_gsa()->set_k_base(6);
        attention->mutable_gsa()->set_k_max(9);
        break;
      case heddle::v1::ATTENTION_KIND_MLA:
        attention->mutable_mla()->set_kv_lora_rank(12);
        attention->mutable_mla()->set_qk_nope_head_dim(6);
        attention->mutable_mla()->set_qk_rope_head_dim(4);
        attention->mutable_mla()->set_v_head_dim(5);
        config.mutable_rope()->set_layout(heddle::v1::RopeConfig::LAYOUT_INTERLEAVED);
        config.set_n_kv_heads(config.n_heads());
        break;
      default:
        break;
    }
  }
  return config;
}

void AddNsa(std::vector<NamedConfig>* all) {
  const auto add = [&](const std::string& name, const auto& change) {
    ModelConfig config = OfKinds({heddle::v1::ATTENTION_KIND_NSA});
    change(config.mutable_attention()->mutable_nsa());
    all->push_back({name, config});
  };
  add("nsa", [](NsaConfig*) {});
  add("nsa separate linear", [](NsaConfig* nsa) {
    nsa->set_kv(NsaConfig::KV_SEPARATE);
    nsa->set_compress_type(NsaConfig::COMPRESS_TYPE_LINEAR);
    nsa->set_compress_init(NsaConfig::COMPRESS_INIT_XAVIER);
  });
  // Windows that do not overlap, no forced block: the newest block may be left out.
  add("nsa avgpool l=r", [](NsaConfig* nsa) {
    nsa->set_compress_type(NsaConfig::COMPRESS_TYPE_AVGPOOL);
    nsa->set_kernel_stride(4);
    nsa->set_init_blocks(0);
    nsa->set_local_blocks(0);
    nsa->set_topk(2);
  });
}

void AddIndexed(std::vector<NamedConfig>* all) {
  const ModelConfig dsa = OfKinds({heddle::v1::ATTENTION_KIND_DSA});
  const ModelConfig gsa = OfKinds({heddle::v1::ATTENTION_KIND_GSA});
  all->push_back({"dsa v32", dsa});
  all->push_back({"dsa seed", dsa});
  all->back().config.mutable_attention()->mutable_dsa()->set_profile(DsaConfig::PROFILE_SEED);
  all->push_back({"dsa shared selection", dsa});  // layers 0 and 2 select, layer 1 shares
  all->back().config.mutable_attention()->mutable_dsa()->set_index_share_every(2);
  // GSA between two DSA layers selects for itself: the third takes the first one's selection.
  all->push_back({"dsa shared around gsa",
                  OfKinds({heddle::v1::ATTENTION_KIND_DSA, heddle::v1::ATTENTION_KIND_GSA,
                           heddle::v1::ATTENTION_KIND_DSA})});
  all->back().config.mutable_attention()->mutable_dsa()->set_index_share_every(2);
  all->push_back({"gsa", gsa});
  all->push_back({"gsa blended per head", gsa});
  GsaConfig* blended = all->back().config.mutable_attention()->mutable_gsa();
  blended->set_dense_residual_alpha(0.25);
  blended->set_gate_form(GsaConfig::GATE_FORM_PER_HEAD);
  blended->set_adaptive_k(GsaConfig::ADAPTIVE_K_ENTROPY);
  all->push_back({"gsa fixed k relu no gates", gsa});
  GsaConfig* plain = all->back().config.mutable_attention()->mutable_gsa();
  plain->set_use_adaptive_k(false);
  plain->set_use_output_gate(false);
  plain->set_use_value_gate(false);
  plain->set_indexer_activation(GsaConfig::INDEXER_ACTIVATION_RELU);
}

void AddLatent(std::vector<NamedConfig>* all) {
  const ModelConfig mla = OfKinds({heddle::v1::ATTENTION_KIND_MLA});
  all->push_back({"mla", mla});
  all->push_back({"mla q lora", mla});
  all->back().config.mutable_attention()->mutable_mla()->set_q_lora_rank(10);
  all->push_back({"mla layernorm", mla});
  all->back().config.mutable_attention()->mutable_mla()->set_latent_norm(
      heddle::v1::MlaConfig::LATENT_NORM_LAYERNORM);
}

}  // namespace

std::vector<NamedConfig> EveryKind() {
  std::vector<NamedConfig> all = {
      {"dense", OfKinds({heddle::v1::ATTENTION_KIND_DENSE})},
      {"swa", OfKinds({heddle::v1::ATTENTION_KIND_SWA})},
      {"swa+dense", OfKinds({heddle::v1::ATTENTION_KIND_SWA, heddle::v1::ATTENTION_KIND_DENSE})}};
  AddNsa(&all);
  AddIndexed(&all);
  AddLatent(&all);
  all.push_back(
      {"swa+nsa+gsa", OfKinds({heddle::v1::ATTENTION_KIND_SWA, heddle::v1::ATTENTION_KIND_NSA,
                               heddle::v1::ATTENTION_KIND_GSA})});
  all.push_back({"experts", OfKinds({heddle::v1::ATTENTION_KIND_DENSE})});
  heddle::v1::MoeConfig* moe = all.back().config.mutable_moe();
  moe->set_n_experts(4);
  moe->set_top_k(2);
  moe->set_n_shared(1);
  moe->set_d_expert(10);
  moe->set_capacity_factor(1.0);
  moe->set_noise_std(0.1);
  all.back().config.set_norm(ModelConfig::NORM_LAYERNORM);
  return all;
}

ModelConfig ConfigOf(const std::string& name) {
  for (const NamedConfig& named : EveryKind()) {
    if (named.name == name) return named.config;
  }
  HEDDLE_CHECK(false, "no configuration ", name);
  return {};
}

model_test::Built BuildStrong(const ModelConfig& config, model::Precision precision) {
  model_test::Built built = model_test::Build(config, precision);
  const bool fp64 = precision == model::Precision::kFp64;
  for (const model::TensorSpec& tensor : built.store->plan().tensors) {
    // Matrices of N(0, 0.02), but the embedding, whose rows are normalised anyway. Xavier's are
    // large already: indexers and softmaxes that saturate give scores that tie but for rounding.
    if (tensor.shape.size() < 2 || tensor.unit == 0) continue;
    if (tensor.init != model::InitKind::kNormal && tensor.init != model::InitKind::kResidualOut) {
      continue;
    }
    for (int64_t i = tensor.offset; i < tensor.offset + tensor.elements; ++i) {
      if (fp64) {
        static_cast<double*>(built.store->master_data())[i] *= 6;
      } else {
        built.store->master()[static_cast<size_t>(i)] *= 6;
      }
    }
  }
  built.store->RefreshComputeWeights();
  if (!built.store->buffers().empty()) {
    const model_test::BatchData batch = model_test::RandomBatch({50}, config.vocab_size(), 17);
    layers::StepInfo step;
    step.loss_scale = step.row_scale = 1.0 / 50;
    HEDDLE_CHECK(built.model->ForwardBackward(batch.view(), step).ok());
    built.model->UpdateBuffers(/*frozen=*/false);
  }
  return built;
}

}  // namespace heddle::inference_test
