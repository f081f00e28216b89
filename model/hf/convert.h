// A trained model under another attention kind (formats.md F17): tensors that both models have are
// copied, those that the new kind adds get values with which its dense-limit settings (section 16.2
// (a) of attention-and-moe.md) give the logits of the original:
//
//   swa                nothing is added; equal where W >= T
//   dsa                indexer as at the start of training; equal where k >= T
//   gsa                indexer as at the start of training; gate weights 0, gate biases
//                      gate_bias_init, so that a gate is the constant c; o_proj is divided by the
//                      product of the gates (property G1 gives c^2). Equal where k_t >= T
//   nsa                gate_proj 0: every branch counts half. k_weight the mean, k_pe 0, v_weight
//   0:
//                      the compressed branch ranks blocks from the start but adds nothing yet.
//                      Equal where n >= nb and W >= T. `avgpool` has no weights: o_proj is divided
//                      by 3/2 instead, equal where also l = r = 1 (property N4).
//                      Separate projections start as copies of k_proj and v_proj
//   mla <-> dsa on mla the indexer is added
//
// Every added value learns: none of these points has a vanishing gradient. Heads that are rotated
// whole cannot become an MLA latent, whose rotated part all heads share, nor the other way:
// refused. `rope.layout` may change: rows of rotated projections are permuted (formats.md F16).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status/status.h"

namespace heddle::v1 {
class ModelConfig;
}
namespace heddle::model {
class ParameterStore;
}

namespace heddle::hf {

struct ConvertOptions {
  uint64_t seed = 0;  // of values that are drawn
  // Sparse layers may become dense or swa ones: what those lack is dropped. The logits change
  // unless the selection held everything and the gates were those above.
  bool drop_sparse = false;
};

struct Converted {
  std::unique_ptr<model::ParameterStore> store;  // fp32
  std::vector<std::string> added;                // tensors and buffers with values of their own
  std::vector<std::string> rescaled;
  std::vector<std::string> dropped;
};

// INVALID_ARGUMENT: a plan that is refused; or lists every tensor that differs for another reason
// than the attention kind, every layer whose kind cannot become the other.
// REQUIRES: `source` was made for `from` and is not kFp64; it is unchanged afterwards.
StatusOr<Converted> ConvertModel(const heddle::v1::ModelConfig& from, model::ParameterStore* source,
                                 const heddle::v1::ModelConfig& to, const ConvertOptions& options);

}  // namespace heddle::hf
