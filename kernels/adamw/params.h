// AdamW and Lion over flat ranges: one pass over master, moments and gradient that also writes the
// bf16 weights; 28 bytes a parameter. The result of an element depends on that element alone.
// AVX-512 and AVX2 give the same bits; the generic build does not fuse multiply-add (1 ulp).
// Source: training-runtime.md section 11.
//   AdamW  p *= 1 - lr wd; m = b1 m + (1-b1) g; v = b2 v + (1-b2) g^2;
//          p -= lr/(1-b1^t) m / (sqrt(v)/sqrt(1-b2^t) + eps)
//   Lion   u = sign(b1 m + (1-b1) g); p -= lr (u + wd p); m = b2 m + (1-b2) g
#pragma once

#include <cstdint>

namespace heddle::kernels::adamw {

struct Params {
  int64_t elements = 0;
  float* master = nullptr;          // [elements]
  float* m = nullptr;               // [elements]
  float* v = nullptr;               // [elements]; not read by Lion
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
