// Attention over packed documents in double, with plain loops over every (query, key) pair: the
// oracle of all attention code. Slow and memory-frugal on purpose.
// Source: attention-and-moe.md sections 1, 2 and 4 (visible set, masked softmax, flash backward).
#pragma once

#include <cstdint>

namespace heddle::kernels::attention {

struct Shape {
  int64_t heads = 0;     // H
  int64_t kv_heads = 0;  // J, divides H
  int64_t key_dim = 0;
  int64_t value_dim = 0;
  int64_t documents = 0;
  const int32_t* cu_seqlens = nullptr;  // [documents + 1]
  double scale = 0;
  int64_t window = 0;  // 0: no window. Else key s is visible iff t - s < window or s < sinks
  int64_t sinks = 0;
};

bool Visible(const Shape& shape, int64_t query, int64_t key);

// out [N, H, value_dim], lse [N, H] (natural log).
void ReferenceForward(const Shape& shape, const double* q_NHD, const double* k_NJD,
                      const double* v_NJE, double* out_NHE, double* lse_NH);

// Overwrites dq, dk, dv.
void ReferenceBackward(const Shape& shape, const double* q_NHD, const double* k_NJD,
                       const double* v_NJE, const double* out_NHE, const double* lse_NH,
                       const double* dout_NHE, double* dq_NHD, double* dk_NJD, double* dv_NJE);

}  // namespace heddle::kernels::attention
