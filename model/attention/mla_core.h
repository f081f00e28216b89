// What an MLA layer's heads attend to: every earlier key of the document, or the keys that DSA's
// indexer selects. Works on keys and values of every head, projected up already (naive form).
//
// N tokens, H heads, K key width, E value width as the core wants them: at least those of the
// model, the rest zeros.
#pragma once

#include <cstdint>
#include <memory>

#include <ATen/core/Tensor.h>

#include "model/attention/mla_layer.h"
#include "model/attention/mla_projection.h"
#include "model/layers/sublayer.h"

namespace heddle::attention {

struct MlaInputs {
  const layers::PassContext* context = nullptr;
  at::Tensor h_ND;          // the layer's input
  at::Tensor indexer_u_NU;  // the query latent, or h
};

// Contiguous. Also the gradients of the four.
struct MlaHeads {
  at::Tensor q_NHK;  // rotated
  at::Tensor k_NHK;
  at::Tensor v_NHE;
  at::Tensor out_NHE;
};

class MlaCore {
 public:
  virtual ~MlaCore() = default;

  virtual int64_t KeyWidth(at::ScalarType type) const = 0;
  virtual int64_t ValueWidth(at::ScalarType type) const = 0;
  // As Sublayer::Begin.
  virtual void Begin(const layers::Documents& documents) = 0;
  // Writes heads.out. Keeps what Backward needs if the pass keeps.
  virtual void Forward(const MlaInputs& inputs, const MlaHeads& heads) = 0;
  // Overwrites d.q, d.k and d.v from d.out; adds to the gradients of weights of its own.
  virtual void Backward(const MlaInputs& inputs, const MlaHeads& heads, const MlaHeads& d) = 0;
  // Of the last forward that kept, until its backward; null where every key is seen.
  virtual const Selection* selection() const { return nullptr; }
};

// Causal attention through the dense core, which takes one width: the narrower of keys and values
// is padded with zeros. That is faster than a kernel for two widths, since the dense core has
// matrix instructions.
std::unique_ptr<MlaCore> MakeDenseMlaCore(const MlaShape& shape);

// The layer around a core.
std::unique_ptr<MlaSublayer> MakeMlaLayer(MlaProjection projection, std::unique_ptr<MlaCore> core);

}  // namespace heddle::attention
