// Multi-head latent attention as half a block, in naive form: keys and values of every head are
// projected up from the latent. Decoding uses the absorbed form (mla_absorbed.h) on the same
// weights. Source: attention-and-moe.md section 8.
//
// Tensors: self_attn.q_proj.weight, or self_attn.{q_a_proj,q_a_layernorm,q_b_proj}.weight where
// mla.q_lora_rank > 0; self_attn.kv_a_proj_with_mqa.weight, self_attn.kv_a_layernorm.weight (and
// .bias where mla.latent_norm is layernorm), self_attn.kv_b_proj.weight, self_attn.o_proj.weight.
#pragma once

#include <memory>

#include <ATen/core/Tensor.h>

#include "model/layers/sublayer.h"

namespace heddle::v1 {
class ModelConfig;
}
namespace heddle::layers {
class RopeSet;
}

namespace heddle::attention {

struct Selection;
struct SharedSelection;

// What the heads of a layer attended to, in naive form: N tokens, H heads, K key and E value width.
struct MlaAttended {
  at::Tensor q_NHK;  // rotated
  at::Tensor k_NHK;
  at::Tensor v_NHE;
  double scale = 0;
  const Selection* selection = nullptr;  // null where every key is seen
};

class MlaSublayer : public layers::Sublayer {
 public:
  // Of the last forward that kept, until its backward: to look at (model/recall.h).
  virtual MlaAttended attended() const = 0;
};

// Causal attention over whole documents. `ropes` outlives the layer and covers every document.
// Cache rows: latent, rotary_k.
std::unique_ptr<MlaSublayer> MakeMla(const heddle::v1::ModelConfig& config,
                                     const layers::LayerStorage& storage, layers::RopeSet* ropes);

// With DSA's indexer, dsa.core: mla (section 6): all heads of a token attend to one selection of
// keys. The indexer's queries come from the query latent where there is one. Adds the tensors
// self_attn.indexer.* and the cache row index_k. `shared` as DsaIndexer's.
std::unique_ptr<MlaSublayer> MakeDsaMla(const heddle::v1::ModelConfig& config,
                                        const layers::LayerStorage& storage, layers::RopeSet* ropes,
                                        SharedSelection* shared);

}  // namespace heddle::attention
