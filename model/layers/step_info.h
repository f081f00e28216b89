// What a training step decides for all layers, and the losses and counts that layers add to it.
// Torch-free.
#pragma once

#include <cstdint>

namespace heddle::layers {

// Equal on all ranks but for first_token.
struct StepInfo {
  // 1 / global number of valid labels of the step, known before its first micro-batch
  // (training-runtime.md 7.2). 0 where the losses of layers alone are trained.
  double loss_scale = 0;
  // 1 / global number of rows of the step: scale of the losses that are means over rows (the
  // indexer's KL, balancing, router z). 0 where no loss of a layer is wanted.
  double row_scale = 0;
  int64_t step = 0;   // 0-based, keys the router's noise
  uint64_t seed = 0;  // training.seed
  // Global index of the micro-batch's first row in the step: keys the router's noise.
  int64_t first_token = 0;
  // Stage 1 of sparse training (attention-and-moe.md 6.3): indexers learn, attention is dense.
  bool indexer_warmup = false;
};

// Already scaled by StepInfo::row_scale and their coefficients: they add up over micro-batches and
// ranks.
struct LayerLosses {
  double indexer = 0;  // KL of DSA and GSA
  double balance = 0;  // MoE auxiliary loss
  double router_z = 0;
  double Total() const { return indexer + balance + router_z; }
};

// What layers count in passes that count; adds up over micro-batches and ranks.
struct LayerCounts {
  int64_t dropped = 0;  // MoE: (token, expert) pairs beyond the capacity of the expert
  // Rows whose choice of keys met a NaN: of NSA (row, key head) pairs, of DSA and GSA rows.
  int64_t nan_rows = 0;
};

}  // namespace heddle::layers
