// Bodies of the kernels of 8-bit cache rows, compiled once per instruction set.
//
// Quantising walks a group twice: largest magnitude, then codes. e4m3 is made by integer arithmetic
// on the bits of the quotient: with the exponent bias moved from 127 to 7 (a difference of 120
// steps of 8 codes) the code is the upper bits, rounded at bit 20; below 2^-6 codes are multiples
// of 2^-9 and come from adding 1.5 x 2^23. Reading is a look-up in a table of all 256 codes.
// Included by generic.cc, avx2.cc and avx512.cc only.
#pragma once

#include "kernels/common/simd.h"
#include "kernels/kv_quant/params.h"

namespace heddle::kernels::kv_quant {
namespace {  // NOLINT: ISA file (architecture.md T12)

using B16 = uint8_t __attribute__((vector_size(16)));

constexpr float kLeastAmax = 1e-4f;
constexpr float kMagic = 12582912.0f;  // 1.5 x 2^23: adding it rounds to an integer

struct DecodeTable {
  float value[256];
};
constexpr DecodeTable MakeDecodeTable() {
  DecodeTable table{};
  for (int code = 0; code < 256; ++code) {
    const int exponent = (code >> 3) & 15;
    const int mantissa = code & 7;
    float value = exponent == 0 ? static_cast<float>(mantissa) : static_cast<float>(8 + mantissa);
    // Normal: (8 + m) 2^(e - 10); subnormal: m 2^-9.
    for (int e = exponent == 0 ? 1 : exponent; e < 10; ++e) value *= 0.5f;
    for (int e = exponent; e > 10; --e) value *= 2.0f;
    if ((code & 0x7f) == 0x7f) value = __builtin_nanf("");
    table.value[code] = code >= 128 ? -value : value;
  }
  return table;
}
constexpr DecodeTable kDecode = MakeDecodeTable();

inline U16 BitsOf(F16 x) {
  U16 bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
inline F16 FromBits(U16 bits) {
  F16 x;
  std::memcpy(&x, &bits, sizeof(x));
  return x;
}
inline F16 Clamp(F16 x, float limit) {
  const F16 high = Splat(limit);
  return x > high ? high : (x < -high ? -high : x);
}

inline U16 E4m3Codes(F16 quotient) {
  const U16 bits = BitsOf(Clamp(quotient, 448.0f));
  const U16 magnitude = bits & 0x7fffffffu;
  const U16 normal = ((magnitude + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20) - 960u;
  const F16 steps = FromBits(magnitude) * 512.0f;
  const U16 subnormal = BitsOf(steps + kMagic) & 0xffu;
  const U16 finite = magnitude < (U16{} + 0x3c800000u) ? subnormal : normal;
  const U16 code = magnitude > (U16{} + 0x7f800000u) ? (U16{} + 0x7fu) : finite;
  return code | ((bits >> 24) & 0x80u);
}

inline U16 Int8Codes(F16 quotient) {
  // The low byte of the sum's bits is the integer in two's complement; NaN gives any code.
  return BitsOf(Clamp(quotient, 127.0f) + kMagic) & 0xffu;
}

// Calls body(offset, lanes) for each vector of [0, width).
template <typename Body>
inline void ForVectors(int64_t width, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= width; i += kLanes) body(i, kLanes);
  if (i < width) body(i, width - i);
}
template <typename T>
inline F16 LoadN(const T* from, int64_t lanes) {
  return lanes == kLanes ? Load(from) : LoadPart(from, lanes);
}

inline float ScaleOf(float amax, float limit, bool power_of_two) {
  const float scale = (amax > kLeastAmax ? amax : kLeastAmax) / limit;
  if (!power_of_two) return scale;
  uint32_t bits;
  std::memcpy(&bits, &scale, sizeof(bits));
  bits = (bits + 0x7fffffu) & 0xff800000u;
  float rounded;
  std::memcpy(&rounded, &bits, sizeof(rounded));
  return rounded;
}

template <typename T>
inline void QuantizeGroup(const Quantize<T>& p, const T* x, int64_t width, uint8_t* codes,
                          float* scale) {
  const bool e4m3 = p.layout.format == Format::kE4m3;
  F16 largest{};
  F16 bad{};  // NaN as soon as a value is NaN or infinite
  ForVectors(width, [&](int64_t i, int64_t n) {
    const F16 v = LoadN(x + i, n);
    const F16 magnitude = FromBits(BitsOf(v) & 0x7fffffffu);
    largest = magnitude > largest ? magnitude : largest;
    bad += v - v;
  });
  const float not_finite = Sum(bad);
  *scale = ScaleOf(Max(largest), e4m3 ? 448.0f : 127.0f, p.power_of_two);
  if (not_finite != 0.0f) *scale = __builtin_nanf("");
  const F16 divisor = Splat(*scale);
  ForVectors(width, [&](int64_t i, int64_t n) {
    const F16 quotient = LoadN(x + i, n) / divisor;
    const U16 wide = e4m3 ? E4m3Codes(quotient) : Int8Codes(quotient);
    const B16 narrow = __builtin_convertvector(wide, B16);
    std::memcpy(codes + i, &narrow, static_cast<size_t>(n));
  });
}

template <typename T>
void QuantizeT(const Quantize<T>& p, Rows rows) {
  const int64_t groups = p.layout.groups();
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * p.layout.group;
      const int64_t rest = p.layout.columns - first;
      QuantizeGroup(p, p.x + row * p.x_stride + first,
                    rest < p.layout.group ? rest : p.layout.group,
                    p.codes + row * p.layout.columns + first, p.scales + row * groups + g);
    }
  }
}

void DequantizeF32(const Dequantize<float>& p, Rows rows) {
  const int64_t groups = p.layout.groups();
  const bool e4m3 = p.layout.format == Format::kE4m3;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t first = g * p.layout.group;
      const int64_t rest = p.layout.columns - first;
      const int64_t width = rest < p.layout.group ? rest : p.layout.group;
      const float scale = p.scales[row * groups + g];
      const uint8_t* codes = p.codes + row * p.layout.columns + first;
      float* out = p.out + row * p.out_stride + first;
      if (e4m3) {
        for (int64_t i = 0; i < width; ++i) out[i] = kDecode.value[codes[i]] * scale;
      } else {
        for (int64_t i = 0; i < width; ++i) {
          out[i] = static_cast<float>(static_cast<int8_t>(codes[i])) * scale;
        }
      }
    }
  }
}

constexpr Table MakeTable() { return {QuantizeT<float>, QuantizeT<uint16_t>, DequantizeF32}; }

}  // namespace
}  // namespace heddle::kernels::kv_quant
