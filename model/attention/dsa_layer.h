// Sparse attention of DSA with grouped queries (attention-and-moe.md section 6, core gqa; profiles
// seed and v32).
#pragma once

#include <memory>

#include "model/attention/indexed_layer.h"

namespace heddle::attention {

// `shared` belongs to the model; null is allowed where index_share_every is 1. REQUIRES: `ropes`
// and `shared` outlive the layer.
std::unique_ptr<IndexedLayer> MakeDsa(const heddle::v1::ModelConfig& config,
                                      const layers::LayerStorage& storage, layers::RopeSet* ropes,
                                      SharedSelection* shared);

}  // namespace heddle::attention
