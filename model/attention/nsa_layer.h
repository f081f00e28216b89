// Native sparse attention as a layer: three branches of one input, mixed by gates
// (attention-and-moe.md section 5).
//
//   q, k, v = h Wqkv      kc, vc = compress(k, v)      q, k and kc rotated (kc at j r)
//   o[n,h] = g0 cmp + g1 slc + g2 win,  g = sigmoid(h Wg)      out = residual + o Wo
//
// kv: shared gives all branches the same k, v; with kv: separate, k_proj and v_proj feed the
// compressed branch alone, and the others have projections of their own.
#pragma once

#include <memory>
#include <span>

#include "model/attention/gqa_layer.h"
#include "model/attention/nsa_branches.h"
#include "model/layers/rope.h"
#include "model/layers/sublayer.h"

namespace heddle::attention {

// What the projections make of N rows. Views of tensors of one pool.
struct NsaRows {
  at::Tensor qkv_NC;              // joined; what is rotated of it: q, and k if shared
  at::Tensor q;                   // [N, H, D] rotated
  at::Tensor raw_k, raw_v;        // [N, J, D] not rotated: what compression reads
  at::Tensor k, v;                // [N, J, D] of the selected branch, k rotated
  at::Tensor window_k, window_v;  // [N, J, D]; shared: k and v again
  at::Tensor gate_logits;         // [N, 3 H]
};

// Extra projections of kv: separate, k and v of a branch; or their gradients.
struct NsaKvProjection {
  at::Tensor k_KD;  // [J D, d]
  at::Tensor v_KD;
};

struct NsaParameters {
  NsaKvProjection slc, win;  // undefined if shared
  CompressionWeights k_compress, v_compress;
  at::Tensor gate_GD;  // [3 H, d]
  at::Tensor o_DC;     // [d, H D]
};

// The layer's parameters and what they do. A decoder makes one from the same storage and runs, per
// step: Project; CompressRows over OneWindow where l raw rows are there; AttendCompressed,
// SelectBlocks, AttendTokens, CombineBranches (nsa_branches.h, nsa_gates.h); Output.
class NsaWeights {
 public:
  // REQUIRES: PlanModel(config) made the storage's plan; `ropes` outlives this.
  NsaWeights(const heddle::v1::ModelConfig& config, const layers::LayerStorage& storage,
             layers::RopeSet* ropes);

  const NsaShape& shape() const { return shape_; }
  const QkvProjection& qkv() const { return qkv_; }
  const NsaParameters& weights() const { return weights_; }
  const NsaParameters& gradients() const { return gradients_; }

  // h [N, d] at `positions`.
  NsaRows Project(const at::Tensor& h_ND, std::span<const int32_t> positions,
                  layers::BufferPool* pool) const;
  // kc, vc [M, J, D] of the pool, kc rotated to the windows' positions.
  void CompressRows(const CompressionWindows& windows, const at::Tensor& raw_k_NJD,
                    const at::Tensor& raw_v_NJD, layers::BufferPool* pool,
                    layers::BufferPool* scratch, at::Tensor* kc_MJD, at::Tensor* vc_MJD) const;
  // out = residual + o Wo.
  void Output(const at::Tensor& residual_ND, const at::Tensor& o_NC,
              const at::Tensor& out_ND) const;

  // Rotates `heads` heads of each row in place, or back.
  void Rotate(std::span<const int32_t> positions, int64_t heads, bool inverse,
              const at::Tensor& rows_NC) const;

 private:
  NsaShape shape_;
  const layers::RopeTables* rope_;
  QkvProjection qkv_;
  NsaParameters weights_;
  NsaParameters gradients_;
};

// `ropes` outlives the layer. Rotary tables must reach the longest document (RopeSet::Ensure).
// The layer fills CacheRows: k, v of the selected branch; raw_k; and with kv: separate raw_v,
// window_k, window_v (shared: v is the raw v, and the window reads k and v).
std::unique_ptr<layers::Sublayer> MakeNsa(const heddle::v1::ModelConfig& config,
                                          const layers::LayerStorage& storage,
                                          layers::RopeSet* ropes);

}  // namespace heddle::attention
