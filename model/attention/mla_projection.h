// The projections of multi-head latent attention, shared by its naive form (training, prefill) and
// its absorbed form (decode). Source: attention-and-moe.md section 8.
//
//   q  = h Wq                 or  norm(h Wqa) Wqb     each head [qn; qr], qr rotated
//   c  = norm(h Wkva[:, :dc])                         the latent of keys and values
//   kr = rot(h Wkva[:, dc:])                          one rotated key part for all heads
//
// N tokens, D width, H heads, K = dn + dr key width, E = dv value width, C = dc latent, R = dr
// rotary width, Q = query latent.
#pragma once

#include <cstdint>
#include <optional>
#include <span>

#include <ATen/core/Tensor.h>

#include "model/layers/norm.h"
#include "model/layers/sublayer.h"

namespace heddle::v1 {
class ModelConfig;
}
namespace heddle::layers {
class RopeSet;
class RopeTables;
}  // namespace heddle::layers

namespace heddle::attention {

struct MlaShape {
  int64_t heads = 0;         // H
  int64_t nope = 0;          // dn
  int64_t rotary = 0;        // dr
  int64_t value = 0;         // dv
  int64_t latent = 0;        // dc
  int64_t query_latent = 0;  // rq, 0: none
  double norm_eps = 0;
  double scale = 0;  // of the softmax, with YaRN's factor

  int64_t key() const { return nope + rotary; }
  int64_t query_columns() const { return heads * key(); }
  int64_t kv_columns() const { return heads * (nope + value); }
  int64_t value_columns() const { return heads * value; }
};
MlaShape MlaShapeOf(const heddle::v1::ModelConfig& config, const layers::RopeTables& tables);

// Matrices of a layer, or their gradients. [out, in].
struct MlaMatrices {
  at::Tensor query;       // [H K, D], or [H K, Q] where there is a query latent
  at::Tensor query_down;  // [Q, D], undefined without
  at::Tensor latent;      // [C, D]: the first rows of kv_a_proj_with_mqa
  at::Tensor rotary;      // [R, D]: its last rows
  at::Tensor kv;          // [H (dn + dv), C]: per head Uk^T above Uv^T
  at::Tensor out;         // [D, H dv]
};

struct MlaProjected {
  at::Tensor query_down_NQ;  // before its norm; undefined without a query latent, like the next two
  at::Tensor query_rstd_N;
  at::Tensor query_latent_NQ;  // after its norm
  at::Tensor q_NHK;            // rotated
  at::Tensor latent_down_NC;   // before its norm
  at::Tensor latent_rstd_N;
  at::Tensor latent_NC;  // c, after its norm
  at::Tensor kr_NR;      // rotated
};

class MlaProjection {
 public:
  // `ropes` outlives this.
  MlaProjection(const heddle::v1::ModelConfig& config, const layers::LayerStorage& storage,
                layers::RopeSet* ropes);

  const MlaShape& shape() const { return shape_; }
  const MlaMatrices& weights() const { return weights_; }
  const MlaMatrices& gradients() const { return gradients_; }

  // c and kr come from `cached`, the rest from `pool`; the two may be one.
  MlaProjected Forward(const at::Tensor& h_ND, std::span<const int32_t> positions,
                       layers::BufferPool* pool, layers::BufferPool* cached) const;

  // Gradients of q (rotated), c (after its norm) and kr (rotated; the sum over heads) to dh, which
  // is overwritten, and to the gradients of weights, which are added to. Overwrites its three
  // inputs.
  struct Gradients {
    at::Tensor dq_NHK;
    at::Tensor dlatent_NC;
    at::Tensor dkr_NR;
  };
  void Backward(const MlaProjected& projected, const at::Tensor& h_ND,
                std::span<const int32_t> positions, const Gradients& d, layers::BufferPool* scratch,
                const at::Tensor& dh_ND) const;

 private:
  void Rotate(const at::Tensor& q_NHK, const at::Tensor& kr_NR, std::span<const int32_t> positions,
              bool inverse) const;

  const layers::RopeTables& tables_;
  MlaShape shape_;
  MlaMatrices weights_;
  MlaMatrices gradients_;
  std::optional<layers::Norm> query_norm_;
  layers::Norm latent_norm_;
};

}  // namespace heddle::attention
