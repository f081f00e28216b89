// The products of experts through the kernels and through LibTorch: values against fp64, strides,
// the bits of a row in any batch and on any thread.
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "base/rng/rng.h"
#include "base/status/status.h"
#include "kernels/linear/params.h"
#include "model/layers/tasks.h"
#include "model/moe/expert_products.h"

namespace heddle::moe {
namespace {

at::Tensor Values(int64_t rows, int64_t columns, const std::string& name, at::ScalarType type) {
  const Rng rng = Rng(5, "expert products").Child(name);
  const at::Tensor out = at::zeros({rows, columns}, at::kFloat);
  auto* const to = out.data_ptr<float>();
  for (int64_t i = 0; i < out.numel(); ++i) {
    to[i] = static_cast<float>(rng.NormalAt(static_cast<uint64_t>(i)));
  }
  return out.to(type);
}

// |got - expected| as a share of `one` + |expected|.
double WorstShare(const at::Tensor& got, const at::Tensor& expected, double one) {
  const at::Tensor a = got.to(at::kDouble).contiguous();
  const at::Tensor b = expected.to(at::kDouble).contiguous();
  EXPECT_EQ(a.sizes(), b.sizes());
  double worst = 0;
  for (int64_t i = 0; i < a.numel(); ++i) {
    const double want = b.data_ptr<double>()[i];
    const double error = std::abs(a.data_ptr<double>()[i] - want) / (one + std::abs(want));
    worst = error <= worst ? worst : error;
  }
  return worst;
}

at::Tensor Wide(const at::Tensor& t) { return t.to(at::kDouble); }

bool SameBits(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.contiguous();
  const at::Tensor y = b.contiguous();
  return x.sizes() == y.sizes() &&
         std::memcmp(x.data_ptr(), y.data_ptr(),
                     static_cast<size_t>(x.numel() * x.element_size())) == 0;
}

TEST(ExpertProducts, ValuesOfEveryTypeAndWidth) {
  for (const at::ScalarType type : {at::kBFloat16, at::kFloat, at::kDouble}) {
    const double allowed = type == at::kBFloat16 ? 0.005 : type == at::kFloat ? 5e-5 : 1e-12;
    for (const int64_t rows : {1, 5, 16, 40, 256}) {
      for (const auto& [in, out] : {std::pair<int64_t, int64_t>{64, 96}, {256, 344}, {172, 256}}) {
        SCOPED_TRACE(Str("type ", static_cast<int>(type), ", ", rows, " x ", in, " x ", out));
        // Views of wider matrices, as pieces of gradients are.
        const at::Tensor x = Values(rows, in + 8, "x", type).narrow(1, 8, in);
        const at::Tensor dy = Values(rows, out + 16, "dy", type).narrow(1, 0, out);
        const at::Tensor weight = Values(out, in, "weight", type);
        const at::Tensor y = at::zeros({rows, out}, type);
        const at::Tensor dx = at::zeros({rows, in}, type);
        const at::Tensor gradient =
            at::full({out, in}, 0.25, type == at::kDouble ? at::kDouble : at::kFloat);
        ExpertLinear(x.contiguous(), weight, y);
        ExpertInputGradient(dy.contiguous(), weight, dx);
        ExpertWeightGradient(dy, x.contiguous(), gradient);
        EXPECT_LT(WorstShare(y, at::mm(Wide(x), Wide(weight).t()), 1), allowed);
        EXPECT_LT(WorstShare(dx, at::mm(Wide(dy), Wide(weight)), 1), allowed);
        EXPECT_LT(WorstShare(gradient.sub(0.25), at::mm(Wide(dy).t(), Wide(x)), 1), allowed);
      }
    }
  }
}

TEST(ExpertProducts, ARowHasTheSameBitsInAnyBatchAndOnAnyThread) {
  if (!kernels::linear::HasPairProducts()) {
    GTEST_SKIP() << "LibTorch's products are used: HEDDLE_ISA or the processor has no bf16 pairs";
  }
  constexpr int64_t kRows = 300;
  const at::Tensor x = Values(kRows, 172, "x", at::kBFloat16);
  const at::Tensor weight = Values(256, 172, "weight", at::kBFloat16);
  const at::Tensor whole = at::zeros({kRows, 256}, at::kBFloat16);
  ExpertLinear(x, weight, whole);
  for (const int64_t piece : {1, 7, 64}) {
    const at::Tensor y = at::zeros({kRows, 256}, at::kBFloat16);
    layers::RunTasks((kRows + piece - 1) / piece, [&](int64_t task, int64_t) {
      const int64_t n = std::min(piece, kRows - task * piece);
      ExpertLinear(x.narrow(0, task * piece, n), weight, y.narrow(0, task * piece, n));
    });
    EXPECT_TRUE(SameBits(y, whole)) << "pieces of " << piece;
  }
}

// Two micro-batches give what one gives that has both, where blocks of rows are whole.
TEST(ExpertProducts, WeightGradientsAddUpInTheOrderOfRows) {
  if (!kernels::linear::HasPairProducts()) {
    GTEST_SKIP() << "LibTorch's products are used: HEDDLE_ISA or the processor has no bf16 pairs";
  }
  const at::Tensor x = Values(160, 64, "x", at::kBFloat16);
  const at::Tensor dy = Values(160, 96, "dy", at::kBFloat16);
  const at::Tensor once = at::zeros({96, 64}, at::kFloat);
  ExpertWeightGradient(dy, x, once);
  const at::Tensor twice = at::zeros({96, 64}, at::kFloat);
  ExpertWeightGradient(dy.narrow(0, 0, 64), x.narrow(0, 0, 64), twice);
  ExpertWeightGradient(dy.narrow(0, 64, 96), x.narrow(0, 64, 96), twice);
  EXPECT_TRUE(SameBits(once, twice));
}

}  // namespace
}  // namespace heddle::moe
