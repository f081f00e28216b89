// The generator and the summary of the golden values of attention-and-moe.md section 14.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

namespace heddle::model_test {

// gen(shape, c, s)[n] = s sin(0.37 n + c), n the row-major flat index.
inline std::vector<double> Gen(int64_t count, double c, double s = 1.0) {
  std::vector<double> values;
  for (int64_t n = 0; n < count; ++n) values.push_back(s * std::sin(0.37 * n + c));
  return values;
}

// [heads, positions, width] <-> [positions, heads, width].
inline std::vector<double> SwapHeads(const std::vector<double>& in, int64_t first, int64_t second,
                                     int64_t width) {
  std::vector<double> out(in.size());
  for (int64_t a = 0; a < first; ++a) {
    for (int64_t b = 0; b < second; ++b) {
      for (int64_t i = 0; i < width; ++i) {
        out[(b * first + a) * width + i] = in[(a * second + b) * width + i];
      }
    }
  }
  return out;
}

struct Summary {
  double sum = 0;
  double sum_of_squares = 0;
  double first = 0;
  double last = 0;
};

inline Summary Summarize(const std::vector<double>& values) {
  Summary s;
  for (const double v : values) {
    s.sum += v;
    s.sum_of_squares += v * v;
  }
  s.first = values.front();
  s.last = values.back();
  return s;
}

}  // namespace heddle::model_test
