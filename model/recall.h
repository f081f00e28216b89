// How good a model's selections are: the share of dense attention's mass that lies on the keys an
// indexer selects, beside that of as many keys drawn at random (attention-and-moe.md D8). A trained
// indexer is far above random; one that never learnt is not.
#pragma once

#include <cstdint>
#include <vector>

#include "base/status/status.h"
#include "model/language_model.h"

namespace heddle::model {

struct LayerRecall {
  int layer = 0;
  int64_t rows = 0;   // that see more keys than they select: the others recall everything
  double keys = 0;    // mean selected keys of these rows
  double recall = 0;  // mean attention mass on them, over rows and heads
  double random = 0;  // of a random selection of the same sizes
};

// One entry per layer that attends to an indexer's selection (dsa, gsa), in order; heads of MLA in
// naive form. FAILED_PRECONDITION: the model has none, or no row of the batch sees more keys than
// it selects. INVALID_ARGUMENT as ForwardBackward. `seed` draws the random selections. `store` was
// made for `config` and is not changed. LibTorch's exceptions pass through.
StatusOr<std::vector<LayerRecall>> MeasureRecall(const heddle::v1::ModelConfig& config,
                                                 ParameterStore* store, const PackedBatch& batch,
                                                 uint64_t seed);

}  // namespace heddle::model
