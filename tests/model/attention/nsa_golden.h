// The inputs of NSA's golden values (attention-and-moe.md section 14) as a layer: its input rows
// are [q | k | v | gate logits], its output rows begin with o, so that dh is what the page lists.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "tests/model/attention/nsa_harness.h"
#include "tests/model/golden.h"

namespace heddle::attention {

inline NsaSizes GoldenSizes() {
  NsaSizes sizes;
  sizes.dim = 8;
  return TransparentSizes(sizes);
}

inline void Fill(at::Tensor to, const std::vector<double>& values) {
  ASSERT_EQ(to.numel(), static_cast<int64_t>(values.size()));
  at::Tensor from = at::empty(to.sizes(), at::kDouble);
  std::copy(values.begin(), values.end(), from.data_ptr<double>());
  to.copy_(from);
}

inline void PutGoldenWeights(const NsaModel& model) {
  MakeTransparent(model);
  Fill(model.Weight("compress.k_weight"), model_test::Gen(8, 0.5, 0.5));
  Fill(model.Weight("compress.v_weight"), model_test::Gen(8, 0.9, 0.5));
  Fill(model.Weight("compress.k_pe"), model_test::Gen(64, 1.7, 0.2));
}

// [40, 76]
inline at::Tensor GoldenRows() {
  at::Tensor rows = at::empty({40, 76}, at::kDouble);
  const auto put = [&](int64_t column, int64_t heads, int64_t width, double phase, double scale) {
    const std::vector<double> values = model_test::Gen(heads * 40 * width, phase, scale);
    Fill(rows.narrow(1, column, heads * width), model_test::SwapHeads(values, heads, 40, width));
  };
  put(0, 4, 8, 0.3, 1);
  put(32, 2, 8, 1.1, 1);
  put(48, 2, 8, 2.0, 1);
  put(64, 4, 3, 0.2, 2);
  return rows;
}

// t_NHD against sum, sum of squares, first and last of [H, N, D].
inline void ExpectGolden(const at::Tensor& t_NHD, const model_test::Summary& expected,
                         const std::string& what) {
  const at::Tensor by_head = t_NHD.transpose(0, 1).contiguous();
  const model_test::Summary got = model_test::Summarize(ToVector(by_head));
  const auto near = [&](double a, double b, const char* which) {
    EXPECT_NEAR(a, b, 1e-10 * std::max(1.0, std::abs(b))) << what << " " << which;
  };
  near(got.sum, expected.sum, "sum");
  near(got.sum_of_squares, expected.sum_of_squares, "sum of squares");
  near(got.first, expected.first, "first");
  near(got.last, expected.last, "last");
}

}  // namespace heddle::attention
