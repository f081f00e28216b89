// A trained model under another attention kind (formats.md F17): tensors that both models have are
// copied, those that the new kind adds get values with which its dense-limit settings
// (attention-and-moe.md 16.2 (a)) give the logits of the original. README.md lists them by kind.
// Every added value learns: none of these points has a vanishing gradient.
//
// Heads that are rotated whole cannot become an MLA latent, whose rotated part all heads share, nor
// the other way: refused. `rope.layout` may change: rows of rotated projections are permuted
// (formats.md F16).
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
