// The three products of a linear layer y = x W^T on bf16 with sums in fp32, each computed by the
// calling thread. W lies as the model stores it, [out, in]: no product packs a copy of it that
// outlives the call, so that weights may come and go (training-runtime.md 12.12).
//
// The sum of an element runs in one order that depends on nothing but the depth: not on the number
// of rows, on the row's place among them, nor on other values. Orders of two tables differ.
//
// Any sizes >= 0. Strides are elements between rows, at least the width. The memory of an operand
// does not overlap that of the result. Source: attention-and-moe.md section 9.
#pragma once

#include <cstdint>

namespace heddle::kernels::linear {

// y[r, o] = sum over i of x[r, i] weight[o, i], rounded once.
struct Forward {
  int64_t rows = 0;
  int64_t in = 0;
  int64_t out = 0;
  const uint16_t* x = nullptr;  // [rows, in]
  int64_t x_stride = 0;
  const uint16_t* weight = nullptr;  // [out, in]
  int64_t weight_stride = 0;
  uint16_t* y = nullptr;  // [rows, out]
  int64_t y_stride = 0;
};
// dx[r, i] = sum over o of dy[r, o] weight[o, i], rounded once.
struct InputGradient {
  int64_t rows = 0;
  int64_t in = 0;
  int64_t out = 0;
  const uint16_t* dy = nullptr;  // [rows, out]
  int64_t dy_stride = 0;
  const uint16_t* weight = nullptr;  // [out, in]
  int64_t weight_stride = 0;
  uint16_t* dx = nullptr;  // [rows, in]
  int64_t dx_stride = 0;
};
// gradient[o, i] += sum over r of dy[r, o] x[r, i], in ascending order of blocks of 32 rows.
struct WeightGradient {
  int64_t rows = 0;
  int64_t in = 0;
  int64_t out = 0;
  const uint16_t* dy = nullptr;  // [rows, out]
  int64_t dy_stride = 0;
  const uint16_t* x = nullptr;  // [rows, in]
  int64_t x_stride = 0;
  float* gradient = nullptr;  // [out, in]
  int64_t gradient_stride = 0;
};

// Bytes of memory that a product works in: aligned to 64, contents never matter. Stays in L2 for
// widths up to 2048 and 256 rows.
int64_t WorkspaceBytes(const Forward& p);
int64_t WorkspaceBytes(const InputGradient& p);
int64_t WorkspaceBytes(const WeightGradient& p);

struct Table {
  void (*forward)(const Forward&, void* workspace);
  void (*input_gradient)(const InputGradient&, void* workspace);
  void (*weight_gradient)(const WeightGradient&, void* workspace);
};

const Table& Kernels();
// Whether the chosen table multiplies pairs of bf16 in one instruction. Others widen, which is no
// faster than a library that does so.
bool HasPairProducts();

struct NamedTable {
  const char* name;
  const Table* table;
};
// Every table this machine can run, for tests.
int AvailableTables(NamedTable out[5]);

}  // namespace heddle::kernels::linear
