// 8-bit rows of the key/value cache: one byte per element and one fp32 scale per group of
// neighbouring columns of a row, x ~ code * scale. Source: attention-and-moe.md section 10.
//
//   e4m3 (e4m3fn)  1-4-3 bits, bias 7, largest 448, least normal 2^-6, least subnormal 2^-9, NaN
//                  0x7F and 0xFF, no infinities; scale = max(amax, 1e-4) / 448
//   int8           symmetric, codes -127 .. 127;  scale = max(amax, 1e-4) / 127
//
// Values become fp32, are divided by their scale and clamped before they are converted; rounding is
// to nearest even. A group that holds a NaN or an infinity gives NaN when it is read: errors of the
// model stay visible. Every instruction set gives the same bits.
#pragma once

#include <cstdint>

namespace heddle::kernels::kv_quant {

enum class Format { kE4m3, kInt8 };

// Columns of a row: groups of `group` neighbours, the last one may be narrower. A group is a head
// (GQA) or 128 values of the latent (MLA).
struct Layout {
  Format format = Format::kE4m3;
  int64_t columns = 0;
  int64_t group = 0;  // in [1, columns]
  int64_t groups() const { return (columns + group - 1) / group; }
  // Of a quantised row, its scales included.
  int64_t row_bytes() const { return columns + 4 * groups(); }
};

template <typename T>
struct Quantize {
  Layout layout;
  bool power_of_two = false;  // scales are rounded up to a power of two (ue8m0)
  const T* x = nullptr;       // [rows, columns], columns contiguous
  int64_t x_stride = 0;       // elements from row to row
  uint8_t* codes = nullptr;   // [rows, columns] contiguous
  float* scales = nullptr;    // [rows, groups] contiguous
};

template <typename T>
struct Dequantize {
  Layout layout;
  const uint8_t* codes = nullptr;  // [rows, columns]
  const float* scales = nullptr;   // [rows, groups]
  T* out = nullptr;                // [rows, columns], columns contiguous
  int64_t out_stride = 0;          // elements from row to row
};

struct Rows {
  int64_t begin = 0;
  int64_t end = 0;
};

// Rows are independent of each other. bf16 is given as raw bits.
struct Table {
  void (*quantize_f32)(const Quantize<float>&, Rows);
  void (*quantize_bf16)(const Quantize<uint16_t>&, Rows);
  void (*dequantize_f32)(const Dequantize<float>&, Rows);
};
const Table& Kernels();

// The reference precision: plain loops, the oracle of the tables.
void QuantizeReference(const Quantize<double>&, Rows);
void DequantizeReference(const Dequantize<double>&, Rows);

// Nearest e4m3 code (ties to even), clamped to +-448; NaN gives 0x7F with the sign of x. By search
// over the table of all codes.
uint8_t E4m3Of(float x);
// Value of a code; exact in fp32.
float E4m3Value(uint8_t code);

// All tables that this machine can run, for the tests.
struct NamedTable {
  const char* name;
  const Table* table;
};
int AvailableTables(NamedTable out[4]);

}  // namespace heddle::kernels::kv_quant
