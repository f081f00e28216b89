// Flash attention for bf16 on CPUs with bf16 matrix instructions: causal, with or without window
// and sinks, over packed documents of any length, forward and backward. Key blocks that no query of
// a tile sees are skipped, so dense costs O(T^2 / 2) and a window O(T (W + A + tile)).
#pragma once

#include <cstdint>
#include <vector>

#include "model/attention/attention.h"
#include "model/attention/document_groups.h"

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
  struct Unit;
  // One (document, key head) per unit, longest first; bins balance them over threads. A unit's
  // result does not depend on its bin.
  std::vector<std::vector<Unit>> Bins(int64_t kv_heads) const;

  double scale_;
  model::Window window_;
  std::vector<Document> documents_;
  int64_t rows_ = 0;
};

}  // namespace heddle::attention
