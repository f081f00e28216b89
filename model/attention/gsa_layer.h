// Gated sparse attention (attention-and-moe.md section 7): gates on values and outputs, an indexer
// with bounded scores and a key count that follows their spread.
#pragma once

#include <memory>

#include "model/attention/indexed_layer.h"

namespace heddle::attention {

// Tensors beside those of the projections and the indexer: self_attn.value_gate.{weight,bias} and
// self_attn.output_gate.{weight,bias}, each where its gate is used. REQUIRES: `ropes` outlives the
// layer.
std::unique_ptr<IndexedLayer> MakeGsa(const heddle::v1::ModelConfig& config,
                                      const layers::LayerStorage& storage, layers::RopeSet* ropes);

}  // namespace heddle::attention
