// NSA's compression by pooling: each window of l rows becomes one weighted sum. Average pooling has
// no weights. Source: attention-and-moe.md section 5.1 (avgpool, weightedpool), 5.3.
//
//   out[j, g] = sum_m w[g, m] (x[first[j] + m, g] + pe[g, m])       m = 0 .. l - 1
//
// N rows, M windows, J heads, D width, l rows per window. T is float or double. Sums over m and
// over windows are in ascending order; results do not depend on how a caller cuts the work.
#pragma once

#include <cstdint>

namespace heddle::kernels::compression {

template <typename T>
struct Pool {
  int64_t heads = 0;               // J
  int64_t dim = 0;                 // D
  int64_t kernel_size = 0;         // l
  int64_t windows = 0;             // M
  const int32_t* first = nullptr;  // [M] first row of each window, ascending
  const T* x = nullptr;            // [N, J, D], first dimension strided by x_stride elements
  int64_t x_stride = 0;
  const T* weight = nullptr;  // [J, l]; null: 1 / l
  const T* pe = nullptr;      // [J, l, D]; null: 0
};

template <typename T>
struct Forward {
  Pool<T> pool;
  T* out = nullptr;  // [M, J, D] contiguous
};

// The windows that hold a row, for the gradient of x without atomics.
struct Holders {
  const int32_t* begin = nullptr;  // [N] first window that holds the row
  const int32_t* end = nullptr;    // [N] one behind the last; begin == end: none does
};

template <typename T>
struct Backward {
  Pool<T> pool;
  Holders holders;
  const T* dout = nullptr;  // [M, J, D] contiguous
  T* dx = nullptr;          // [N, J, D] strided by dx_stride: added to
  int64_t dx_stride = 0;
  T* dweight = nullptr;  // [J, l], nullable: added to
  T* dpe = nullptr;      // [J, l, D], nullable: added to
};

struct Range {
  int64_t begin = 0;
  int64_t end = 0;
};

template <typename T>
struct Table {
  void (*forward)(const Forward<T>&, Range windows);
  void (*backward_rows)(const Backward<T>&, Range rows);  // dx
  void (*backward_taps)(const Backward<T>&, Range taps);  // dweight, dpe of taps g l + m
};

// float: by instruction set. double: one portable version, the reference precision.
const Table<float>& FloatKernels();
const Table<double>& DoubleKernels();

// Every float table that this machine can run, for tests.
struct NamedTable {
  const char* name;
  const Table<float>* table;
};
int AvailableTables(NamedTable out[3]);

}  // namespace heddle::kernels::compression
