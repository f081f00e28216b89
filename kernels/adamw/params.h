// AdamW and Lion over flat ranges: one pass over master, moments and gradient that also writes the
// bf16 weights. Bytes a parameter with fp32 gradients: 28, and 2 for bf16 weights; 8 less with bf16
// moments. The result of an element depends on that element and its place in the model alone.
// AVX-512 and AVX2 give the same bits; the generic build does not fuse multiply-add (1 ulp).
// Source: training-runtime.md section 11.
//   AdamW  p *= 1 - lr wd; m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2;
//          p -= lr/(1-b1^t) m / (sqrt(v)/sqrt(1-b2^t) + eps)
//   Lion   u = sign(b1 m + (1-b1) g); p -= lr (u + wd p); m = b2 m + (1-b2) g
#pragma once

#include <cstdint>

namespace heddle::kernels::adamw {

// Which way moments are rounded to bf16: a pure function of these and the element. m and v of an
// element share their random bits; each is still rounded without bias, and as both magnitudes go up
// together the rounding moves m / sqrt(v) less than two independent draws would.
struct Rounding {
  uint64_t seed = 0;
  uint64_t stream = 0;  // of this update
  int64_t first = 0;    // place of element 0 in the whole model
};

struct Params {
  int64_t elements = 0;
  float* master = nullptr;          // [elements]
  float* m = nullptr;               // [elements]
  float* v = nullptr;               // [elements]; not read by Lion
  uint16_t* m_bf16 = nullptr;       // [elements] bf16 bits; in place of m and v, and rounded
  uint16_t* v_bf16 = nullptr;       // stochastically. The update uses them as they are before
  Rounding rounding;                // they are rounded.
  const float* gradient = nullptr;  // [elements]
  uint16_t* weights = nullptr;      // [elements] bf16 bits, nullable
  float gradient_factor = 1;        // multiplied into the gradient: 1 / grad_scale
  float learning_rate = 0;
  float weight_decay = 0;
  float beta1 = 0;
  float beta2 = 0;
  float eps = 0;                    // AdamW
  float bias_correction1 = 1;       // AdamW: 1 - beta1^t
  float bias_correction2_root = 1;  // AdamW: sqrt(1 - beta2^t)
};

struct Stats {
  double sum_of_squares = 0;  // of the finite values
  int64_t non_finite = 0;
};

struct Table {
  void (*adamw)(const Params&);
  void (*lion)(const Params&);
  Stats (*measure)(const float* values, int64_t elements);
};

const Table& Kernels();

struct NamedTable {
  const char* name;
  const Table* table;
};
// Every table this machine can run, for tests.
int AvailableTables(NamedTable out[4]);

}  // namespace heddle::kernels::adamw
