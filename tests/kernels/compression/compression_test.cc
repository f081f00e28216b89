#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "kernels/compression/params.h"

namespace heddle::kernels::compression {
namespace {

constexpr int64_t kHeads = 2;
constexpr int64_t kDim = 20;  // a vector and a tail
constexpr int64_t kStride = kHeads * kDim + 5;

struct Case {
  int64_t kernel_size = 0;
  int64_t stride = 0;
  bool weighted = false;
  bool embedded = false;
};
const std::vector<Case> kCases = {
    {4, 2, true, true}, {4, 4, false, true}, {6, 2, true, false}, {1, 1, false, false}};

std::vector<double> Values(int64_t count, double phase) {
  std::vector<double> out;
  for (int64_t i = 0; i < count; ++i) {
    out.push_back(static_cast<float>(std::sin(0.7 * i * i + phase)));
  }
  return out;
}

struct Problem {
  Case c;
  int64_t rows = 0;
  std::vector<int32_t> first;
  std::vector<int32_t> begin, end;
  std::vector<double> x, weight, pe, dout;
};

Problem MakeProblem(const Case& c, const std::vector<int32_t>& lengths) {
  Problem p;
  p.c = c;
  for (const int32_t length : lengths) {
    const int32_t first_window = static_cast<int32_t>(p.first.size());
    for (int64_t t = 0; t + c.kernel_size <= length; t += c.stride) {
      p.first.push_back(static_cast<int32_t>(p.rows + t));
    }
    for (int32_t t = 0; t < length; ++t) {
      int32_t begin = first_window;
      int32_t end = first_window;
      for (size_t j = static_cast<size_t>(first_window); j < p.first.size(); ++j) {
        const int64_t at = p.rows + t - p.first[j];
        if (at >= c.kernel_size) begin = static_cast<int32_t>(j) + 1;
        if (at >= 0) end = static_cast<int32_t>(j) + 1;
      }
      p.begin.push_back(begin);
      p.end.push_back(std::max(begin, end));
    }
    p.rows += length;
  }
  const int64_t windows = static_cast<int64_t>(p.first.size());
  p.x = Values(p.rows * kStride, 0.1);
  if (c.weighted) p.weight = Values(kHeads * c.kernel_size, 0.5);
  if (c.embedded) p.pe = Values(kHeads * c.kernel_size * kDim, 1.7);
  p.dout = Values(windows * kHeads * kDim, 0.9);
  return p;
}

struct Outputs {
  std::vector<double> out, dx, dweight, dpe;
};

template <typename T>
const T* DataOrNull(const std::vector<T>& v) {
  return v.empty() ? nullptr : v.data();
}

// `cut`: windows, rows and taps per call.
template <typename T>
Outputs Compute(const Table<T>& table, const Problem& p, int64_t cut) {
  const auto typed = [](const std::vector<double>& v) {
    return std::vector<T>(v.begin(), v.end());
  };
  const std::vector<T> x = typed(p.x), weight = typed(p.weight), pe = typed(p.pe),
                       dout = typed(p.dout);
  std::vector<T> out(p.dout.size(), T(7));
  std::vector<T> dx(static_cast<size_t>(p.rows * kHeads * kDim), T(1));
  std::vector<T> dweight(static_cast<size_t>(kHeads * p.c.kernel_size), T(2));
  std::vector<T> dpe(dweight.size() * kDim, T(3));
  Pool<T> pool;
  pool.heads = kHeads;
  pool.dim = kDim;
  pool.kernel_size = p.c.kernel_size;
  pool.windows = static_cast<int64_t>(p.first.size());
  pool.first = p.first.data();
  pool.x = x.data();
  pool.x_stride = kStride;
  pool.weight = DataOrNull(weight);
  pool.pe = DataOrNull(pe);
  Backward<T> b{pool,
                {p.begin.data(), p.end.data()},
                dout.data(),
                dx.data(),
                kHeads * kDim,
                p.c.weighted ? dweight.data() : nullptr,
                p.c.embedded ? dpe.data() : nullptr};
  const auto for_ranges = [&](int64_t count, const auto& call) {
    for (int64_t i = 0; i < count; i += cut) call(Range{i, std::min(i + cut, count)});
  };
  for_ranges(pool.windows, [&](Range r) { table.forward({pool, out.data()}, r); });
  for_ranges(p.rows, [&](Range r) { table.backward_rows(b, r); });
  for_ranges(kHeads * p.c.kernel_size, [&](Range r) { table.backward_taps(b, r); });
  const auto wide = [](const std::vector<T>& v) { return std::vector<double>(v.begin(), v.end()); };
  return {wide(out), wide(dx), wide(dweight), wide(dpe)};
}
constexpr int64_t kWhole = 1 << 20;

double MaxDifference(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) worst = std::max(worst, std::abs(a[i] - b[i]));
  return worst;
}

const std::vector<std::vector<int32_t>> kBatches = {{33}, {0, 3, 1, 4, 5, 0, 40}, {2}};

TEST(Compression, K1EveryTableEqualsTheReference) {
  NamedTable tables[3];
  const int count = AvailableTables(tables);
  ASSERT_GE(count, 1);
  for (const Case& c : kCases) {
    for (const std::vector<int32_t>& lengths : kBatches) {
      const Problem p = MakeProblem(c, lengths);
      const Outputs expected = Compute(DoubleKernels(), p, kWhole);
      for (int i = 0; i < count; ++i) {
        SCOPED_TRACE(std::string(tables[i].name) + " l " + std::to_string(c.kernel_size));
        const Outputs got = Compute(*tables[i].table, p, kWhole);
        EXPECT_LE(MaxDifference(got.out, expected.out), 1e-5);
        EXPECT_LE(MaxDifference(got.dx, expected.dx), 1e-5);
        EXPECT_LE(MaxDifference(got.dweight, expected.dweight), 5e-5);
        EXPECT_LE(MaxDifference(got.dpe, expected.dpe), 1e-5);
      }
    }
  }
}

TEST(Compression, K3SameBitsForAnyCutOfTheWork) {
  for (const Case& c : kCases) {
    const Problem p = MakeProblem(c, {0, 3, 1, 4, 5, 0, 40});
    const Outputs whole = Compute(FloatKernels(), p, kWhole);
    const Outputs parts = Compute(FloatKernels(), p, 3);
    EXPECT_EQ(whole.out, parts.out);
    EXPECT_EQ(whole.dx, parts.dx);
    EXPECT_EQ(whole.dweight, parts.dweight);
    EXPECT_EQ(whole.dpe, parts.dpe);
  }
}

// d/dx of sum(dout out) by central differences; the map is linear in each argument, so a step of
// one is exact.
TEST(Compression, C8GradientsEqualCentralDifferences) {
  for (const Case& c : kCases) {
    const Problem p = MakeProblem(c, {3, 4, 17});
    const Outputs gradients = Compute(DoubleKernels(), p, kWhole);
    const auto loss = [](const Problem& at) {
      const Outputs o = Compute(DoubleKernels(), at, kWhole);
      double sum = 0;
      for (size_t i = 0; i < o.out.size(); ++i) sum += o.out[i] * at.dout[i];
      return sum;
    };
    const auto slope = [&](std::vector<double> Problem::*field, size_t i) {
      Problem up = p;
      Problem down = p;
      (up.*field)[i] += 1.0;
      (down.*field)[i] -= 1.0;
      return (loss(up) - loss(down)) / 2.0;
    };
    for (int64_t row = 0; row < p.rows; ++row) {
      for (int64_t i = 0; i < kHeads * kDim; i += 7) {
        ASSERT_NEAR(gradients.dx[static_cast<size_t>(row * kHeads * kDim + i)],
                    1.0 + slope(&Problem::x, static_cast<size_t>(row * kStride + i)), 1e-11);
      }
    }
    for (size_t i = 0; i < p.weight.size(); ++i) {
      ASSERT_NEAR(gradients.dweight[i], 2.0 + slope(&Problem::weight, i), 1e-11);
    }
    for (size_t i = 0; i < p.pe.size(); i += 3) {
      ASSERT_NEAR(gradients.dpe[i], 3.0 + slope(&Problem::pe, i), 1e-11);
    }
  }
}

}  // namespace
}  // namespace heddle::kernels::compression
