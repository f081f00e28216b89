// Flash attention for bf16 on CPUs with bf16 matrix instructions: causal, with or without window
// and sinks or over explicit key sets, over packed documents of any length, forward and backward.
// Key blocks that no query of a tile sees are skipped, so dense costs O(T^2 / 2) and a window
// O(T (W + A + tile)).
#pragma once

#include <cstdint>
#include <vector>

#include "model/attention/attention.h"
#include "model/attention/document_groups.h"
#include "model/attention/key_sets.h"

namespace heddle::attention {

class Flash {
 public:
  // window.keys = 0: dense.
  Flash(double scale, model::Window window);

  // bf16, head_dim a multiple of 32 up to 256, and a processor that LibTorch has matrix kernels
  // for.
  static bool Supports(const at::Tensor& q_NHD);

  void Begin(const std::vector<Document>& documents, int64_t rows);
  // As AttentionCore. `saved` gets one tensor: lse [H, N] fp32.
  void Forward(const at::Tensor& q_NHD, const at::Tensor& k_NJD, const at::Tensor& v_NJD,
               const at::Tensor& out_NHD, Saved* saved) const;
  void Backward(const at::Tensor& q_NHD, const at::Tensor& k_NJD, const at::Tensor& v_NJD,
                const at::Tensor& out_NHD, const Saved& saved, const at::Tensor& dout_NHD,
                const at::Tensor& dq_NHD, const at::Tensor& dk_NJD, const at::Tensor& dv_NJD) const;

 private:
  double scale_;
  model::Window window_;
  std::vector<Document> documents_;
  int64_t rows_ = 0;
};

// The same tiles over explicit key sets: dense products, and of them only the pairs of the sets.
class MaskedFlash {
 public:
  using Rows = KeyDocuments::Rows;
  // `sets` outlives this. Calls read and write only the rows of `documents`. REQUIRES: their sets
  // lie within their keys.
  MaskedFlash(double scale, const KeySets* sets, std::vector<Rows> documents);

  // As SparseAttention, of what Flash::Supports: out [N, H, D] and lse [N, H] fp32. A row without
  // keys gets output 0 and lse -inf.
  void Forward(const at::Tensor& q_NHD, const at::Tensor& k_MJD, const at::Tensor& v_MJD,
               const at::Tensor& out_NHD, const at::Tensor& lse_NH) const;
  // Overwrites dq, dk, dv: bf16, or all fp32.
  void Backward(const at::Tensor& q_NHD, const at::Tensor& k_MJD, const at::Tensor& v_MJD,
                const at::Tensor& out_NHD, const at::Tensor& lse_NH, const at::Tensor& dout_NHD,
                const at::Tensor& dq_NHD, const at::Tensor& dk_MJD, const at::Tensor& dv_MJD) const;

 private:
  double scale_;
  const KeySets* sets_;
  std::vector<Rows> documents_;
};

}  // namespace heddle::attention
