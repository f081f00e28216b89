#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>

#include "model/layers/layers.h"

namespace heddle::layers {
namespace {

at::Tensor Values(int64_t rows, int64_t columns, double phase) {
  const at::Tensor values = at::empty({rows, columns}, at::kDouble);
  for (int64_t i = 0; i < values.numel(); ++i) {
    values.data_ptr<double>()[i] = std::sin(0.37 * static_cast<double>(i) + phase);
  }
  return values;
}

bool SameBits(const at::Tensor& a, const at::Tensor& b) {
  return a.numel() == b.numel() && std::memcmp(a.contiguous().const_data_ptr(),
                                               b.contiguous().const_data_ptr(), a.nbytes()) == 0;
}

// C2 for index keys: the rows of a batch have the bits that each has alone, in any place.
TEST(LinearByRow, ARowsBitsDoNotDependOnItsBatch) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kDouble}) {
    for (const auto& [inputs, outputs] :
         {std::pair<int64_t, int64_t>{20, 8}, {200, 33}, {512, 64}}) {
      const at::Tensor weight = Values(outputs, inputs, 0.3).to(type);
      const at::Tensor x = Values(70, inputs, 1.1).to(type);
      const at::Tensor all = at::empty({70, outputs}, type);
      LinearByRow(x, weight, all);
      const at::Tensor reference = at::empty({70, outputs}, type);
      Linear(x, weight, reference);
      EXPECT_LE((all.to(at::kDouble) - reference.to(at::kDouble)).abs().max().item<double>(),
                type == at::kBFloat16 ? 0.2 : 1e-4);
      for (const int64_t count : {1, 2, 7, 31, 32, 33, 64}) {
        for (const int64_t first : {0, 1, 5}) {
          const at::Tensor some = at::empty({count, outputs}, type);
          LinearByRow(x.narrow(0, first, count), weight, some);
          ASSERT_TRUE(SameBits(some, all.narrow(0, first, count))) << count << " from " << first;
        }
      }
    }
  }
}

TEST(LinearByRow, TakesNoRows) {
  const at::Tensor y = at::empty({0, 3}, at::kFloat);
  LinearByRow(at::empty({0, 5}, at::kFloat), at::empty({3, 5}, at::kFloat), y);
  EXPECT_EQ(y.size(0), 0);
}

}  // namespace
}  // namespace heddle::layers
