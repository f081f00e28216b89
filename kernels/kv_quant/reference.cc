// Plain loops and a search instead of bit arithmetic. Values become fp32 first, as the contract
// says, so that codes and scales agree with the tables bit for bit.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "kernels/kv_quant/params.h"

namespace heddle::kernels::kv_quant {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

float ScaleOf(float amax, float limit, bool power_of_two) {
  const float scale = std::max(amax, 1e-4f) / limit;
  return power_of_two ? std::exp2(std::ceil(std::log2(scale))) : scale;
}

uint8_t Int8Of(float x) {
  if (std::isnan(x)) return 0;
  return static_cast<uint8_t>(static_cast<int8_t>(std::nearbyint(std::clamp(x, -127.0f, 127.0f))));
}

}  // namespace

float E4m3Value(uint8_t code) {
  const int exponent = (code >> 3) & 15;
  const int mantissa = code & 7;
  float value = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                              : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  if ((code & 0x7f) == 0x7f) value = kNan;
  return code >= 128 ? -value : value;
}

uint8_t E4m3Of(float x) {
  const uint8_t sign = std::signbit(x) ? 0x80 : 0;
  if (std::isnan(x)) return static_cast<uint8_t>(0x7f | sign);
  static const std::array<float, 0x7f> values = [] {
    std::array<float, 0x7f> ascending{};
    for (uint8_t code = 0; code < 0x7f; ++code) ascending[code] = E4m3Value(code);
    return ascending;
  }();
  const float magnitude = std::min(std::fabs(x), 448.0f);
  uint8_t best = 0;
  for (uint8_t code = 1; code < 0x7f; ++code) {
    const float here = std::fabs(values[code] - magnitude);
    const float before = std::fabs(values[best] - magnitude);
    // Neighbours differ by one, so of two at the same distance one is even.
    if (here < before || (here == before && code % 2 == 0)) best = code;
  }
  return static_cast<uint8_t>(best | sign);
}

void QuantizeReference(const Quantize<double>& p, Rows rows) {
  const bool e4m3 = p.layout.format == Format::kE4m3;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const double* x = p.x + row * p.x_stride;
    for (int64_t g = 0; g < p.layout.groups(); ++g) {
      const int64_t first = g * p.layout.group;
      const int64_t end = std::min(first + p.layout.group, p.layout.columns);
      float amax = 0;
      bool finite = true;
      for (int64_t i = first; i < end; ++i) {
        const float value = static_cast<float>(x[i]);
        amax = std::max(amax, std::fabs(value));
        finite = finite && std::isfinite(value);
      }
      const float scale = finite ? ScaleOf(amax, e4m3 ? 448.0f : 127.0f, p.power_of_two) : kNan;
      p.scales[row * p.layout.groups() + g] = scale;
      for (int64_t i = first; i < end; ++i) {
        const float quotient = static_cast<float>(x[i]) / scale;
        p.codes[row * p.layout.columns + i] = e4m3 ? E4m3Of(quotient) : Int8Of(quotient);
      }
    }
  }
}

void DequantizeReference(const Dequantize<double>& p, Rows rows) {
  const int64_t columns = p.layout.columns;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t i = 0; i < columns; ++i) {
      const uint8_t code = p.codes[row * columns + i];
      const double value = p.layout.format == Format::kE4m3
                               ? static_cast<double>(E4m3Value(code))
                               : static_cast<double>(static_cast<int8_t>(code));
      const float scale = p.scales[row * p.layout.groups() + i / p.layout.group];
      p.out[row * p.out_stride + i] = value * static_cast<double>(scale);
    }
  }
}

}  // namespace heddle::kernels::kv_quant
