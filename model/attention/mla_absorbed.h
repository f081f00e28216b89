// Multi-head latent attention in absorbed form, for decoding: the up-projection of the keys moves
// to the query and that of the values to the output, so that attention works on the cached rows
// themselves, one row for all heads, and no key is ever projected up. Source: attention-and-moe.md
// section 8.
//
//   a_h = Uk_h qn_h   score = scale (a_h . c[s] + qr_h . kr[s])   z_h = sum_s P c[s]   o_h = z_h
//   Uv_h
//
// B tokens (one of each sequence, or several of one), H heads, C = dc, R = dr; L = C + R values
// [c; kr] of a cache row.
#pragma once

#include <cstdint>
#include <span>

#include <ATen/core/Tensor.h>

#include "model/attention/mla_projection.h"
#include "model/layers/sublayer.h"

namespace heddle::attention {

class AbsorbedMla {
 public:
  // `ropes` must outlive this and cover the positions of each call.
  AbsorbedMla(const heddle::v1::ModelConfig& config, const layers::LayerStorage& storage,
              layers::RopeSet* ropes);

  const MlaShape& shape() const { return projection_.shape(); }
  // Values of a cache row: dc + dr, whatever the number of heads.
  int64_t row_width() const { return shape().latent + shape().rotary; }

  // What a token brings: its query, and the row that the cache has to store before the token
  // attends. From `pool`.
  struct Tokens {
    at::Tensor query_BHL;     // [a_h; qr_h]
    at::Tensor latent_BC;     // c
    at::Tensor rotary_BR;     // kr
    at::Tensor indexer_u_BU;  // input of an indexer's queries: the query latent, or h
  };
  Tokens Project(const at::Tensor& h_BD, std::span<const int32_t> positions,
                 layers::BufferPool* pool) const;

  // z = softmax over all T given rows: those of one sequence, the token's own included, or the ones
  // an indexer selected. T >= 1. query [H, L] and z [H, C] of one token, contiguous; rows [T, L]
  // [c; kr] may be strided in the first dimension. Scores and sums are fp32 (fp64 for fp64).
  void Attend(const at::Tensor& query_HL, const at::Tensor& rows_TL, const at::Tensor& z_HC) const;

  // out = residual + concat_h(z_h Uv_h) Wo; out may be residual.
  void Output(const at::Tensor& z_BHC, const at::Tensor& residual_BD, layers::BufferPool* pool,
              const at::Tensor& out_BD) const;

 private:
  MlaProjection projection_;
  at::Tensor key_up_HNC_;    // Uk_h^T [dn, C]
  at::Tensor value_up_HCE_;  // Uv_h [C, dv]
};

}  // namespace heddle::attention
