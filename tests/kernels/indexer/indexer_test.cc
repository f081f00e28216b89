#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "kernels/common/isa.h"
#include "kernels/indexer/params.h"
#include "kernels/indexer/reference.h"
#include "kernels/indexer/tables.h"

namespace heddle::kernels::indexer {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

template <typename T>
struct NamedTable {
  const char* name;
  const Table<T>* table;
};
// What this machine can run, no higher than HEDDLE_ISA says.
template <typename T>
std::vector<NamedTable<T>> Tables();
template <>
std::vector<NamedTable<float>> Tables() {
  std::vector<NamedTable<float>> tables = {{"generic", &kGenericFloat}};
  if (SelectedIsa() >= Isa::kAvx2) tables.push_back({"avx2", &kAvx2Float});
  if (SelectedIsa() >= Isa::kAvx512) tables.push_back({"avx512", &kAvx512Float});
  EXPECT_EQ(&FloatKernels(), tables.back().table);
  return tables;
}
template <>
std::vector<NamedTable<double>> Tables() {
  return {{"double", &DoubleKernels()}};
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  double Normal() { return normal_(engine_); }
  int64_t Below(int64_t n) { return static_cast<int64_t>(engine_() % static_cast<uint64_t>(n)); }

 private:
  std::mt19937_64 engine_;
  std::normal_distribution<double> normal_;
};

// Values that float holds exactly, so that only the arithmetic differs. `levels` > 0: multiples of
// 1 / levels, which makes ties.
std::vector<double> Values(Random* random, int64_t count, double scale = 1, int levels = 0) {
  std::vector<double> values;
  for (int64_t i = 0; i < count; ++i) {
    const double v = scale * random->Normal();
    values.push_back(levels > 0 ? std::round(v * levels) / levels : static_cast<float>(v));
  }
  return values;
}

template <typename T>
std::vector<T> As(const std::vector<double>& values) {
  return {values.begin(), values.end()};
}
template <typename T>
std::vector<double> Wide(const std::vector<T>& values) {
  return {values.begin(), values.end()};
}

struct Shape {
  std::string name;
  std::vector<int32_t> lengths;
  int64_t heads = 3;
  int64_t width = 20;
  Activation activation = Activation::kRelu;
  double score_scale = 1;
  bool bias = false;
  int levels = 0;
};

// C9: zero-length, length 1, around tiles of 32 keys and blocks of 32 rows; widths around vectors.
const std::vector<Shape>& Shapes() {
  static const std::vector<Shape> shapes = {
      {"relu", {0, 1, 31, 0, 32, 33, 100}, 3, 20},
      {"sigmoid", {70, 2, 5, 65}, 4, 16, Activation::kSigmoid, 0.25, true},
      {"one head", {97, 1}, 1, 1, Activation::kRelu, 0.5, true},
      {"many heads", {10, 110}, 19, 33, Activation::kRelu, 1},
      {"ties", {330, 3, 90}, 2, 3, Activation::kRelu, 1, false, 1},
      {"v32", {140, 1}, 4, 64, Activation::kRelu, 1},
  };
  return shapes;
}

struct Problem {
  Shape shape;
  int64_t rows = 0;
  std::vector<double> q, k, w, bias;
  std::vector<int32_t> first;

  Problem(const Shape& s, uint64_t seed) : shape(s) {
    for (const int32_t length : s.lengths) {
      first.insert(first.end(), static_cast<size_t>(length), static_cast<int32_t>(rows));
      rows += length;
    }
    Random random(seed);
    q = Values(&random, rows * s.heads * s.width, 1, s.levels);
    k = Values(&random, rows * s.width, 1, s.levels);
    w = Values(&random, rows * s.heads, 1, s.levels);
    if (s.bias) bias = Values(&random, s.heads);
  }
};

// A problem in T, with the pointers of Scores.
template <typename T>
struct Typed {
  std::vector<T> q, k, w, bias;
  Scores<T> scores;

  explicit Typed(const Problem& p)
      : q(As<T>(p.q)), k(As<T>(p.k)), w(As<T>(p.w)), bias(As<T>(p.bias)) {
    scores = {
        p.shape.heads,  p.shape.width, p.shape.activation, p.shape.score_scale,
        q.data(),       k.data(),      w.data(),           bias.empty() ? nullptr : bias.data(),
        p.first.data(), nullptr};
  }
};

template <typename T>
std::vector<T> RowScores(const Table<T>& table, const Scores<T>& scores, int64_t row) {
  const int64_t last = scores.last != nullptr ? scores.last[row] : row;
  std::vector<T> out(static_cast<size_t>(last - scores.first[row] + 1));
  table.row_scores(scores, row, out.data());
  return out;
}

// Bits, so that NaN equals itself and -0 differs from +0.
template <typename T>
std::vector<uint64_t> Bits(const std::vector<T>& values) {
  std::vector<uint64_t> bits;
  for (const T v : values) bits.push_back(std::bit_cast<uint64_t>(static_cast<double>(v)));
  return bits;
}

void ExpectClose(const std::vector<double>& got, const std::vector<double>& expected,
                 double tolerance, const std::string& what) {
  ASSERT_EQ(got.size(), expected.size()) << what;
  double largest = 1;
  for (const double x : expected)
    largest = std::isfinite(x) ? std::max(largest, std::abs(x)) : largest;
  for (size_t i = 0; i < got.size(); ++i) {
    if (got[i] == expected[i]) continue;
    ASSERT_LE(std::abs(got[i] - expected[i]), tolerance * largest) << what << " element " << i;
  }
}

template <typename T>
constexpr double kTolerance = sizeof(T) == 4 ? 1e-5 : 1e-12;

// Runs body(T{}) for float and double.
template <typename Body>
void ForTypes(const Body& body) {
  body(float{});
  body(double{});
}

TEST(Indexer, K1ScoresEqualTheReference) {
  for (const Shape& shape : Shapes()) {
    const Problem problem(shape, 11);
    const Typed<double> reference(problem);
    ForTypes([&](auto type) {
      using T = decltype(type);
      const Typed<T> typed(problem);
      for (const NamedTable<T>& t : Tables<T>()) {
        for (int64_t row = 0; row < problem.rows; ++row) {
          std::vector<double> expected(static_cast<size_t>(row - problem.first[row] + 1));
          ReferenceRowScores(reference.scores, row, expected.data());
          ExpectClose(Wide(RowScores(*t.table, typed.scores, row)), expected, kTolerance<T>,
                      shape.name + " " + t.name + " row " + std::to_string(row));
        }
      }
    });
  }
}

// ---- Selection ----------------------------------------------------------------------------------

template <typename T>
struct Selection {
  std::vector<int64_t> offsets;
  std::vector<int32_t> selected;

  // Rows run in pieces of `step`.
  Selection(const Table<T>& table, const Scores<T>& scores, const std::vector<int64_t>& counts,
            TieBreak tie_break, int64_t step) {
    offsets = {0};
    for (const int64_t count : counts) offsets.push_back(offsets.back() + count);
    selected.assign(static_cast<size_t>(offsets.back()), -1);
    const Select<T> p{scores, tie_break, offsets.data(), selected.data()};
    const int64_t rows = static_cast<int64_t>(counts.size());
    for (int64_t row = 0; row < rows; row += step)
      table.select(p, {row, std::min(row + step, rows)});
  }
};

// One count for all rows as far as keys are visible; below 0: a random one per row.
std::vector<int64_t> Counts(const Problem& problem, int64_t k) {
  Random random(7);
  std::vector<int64_t> counts;
  for (int64_t row = 0; row < problem.rows; ++row) {
    const int64_t visible = row - problem.first[row] + 1;
    counts.push_back(k < 0 ? random.Below(visible + 1) : std::min(k, visible));
  }
  return counts;
}

// What the total order makes of the kernel's own scores.
template <typename T>
std::vector<int32_t> Expected(const Table<T>& table, const Scores<T>& scores,
                              const std::vector<int64_t>& counts, TieBreak tie_break) {
  std::vector<int32_t> all;
  for (int64_t row = 0; row < static_cast<int64_t>(counts.size()); ++row) {
    if (counts[static_cast<size_t>(row)] == 0) continue;
    const std::vector<double> x = Wide(RowScores(table, scores, row));
    std::vector<int32_t> positions(static_cast<size_t>(counts[static_cast<size_t>(row)]));
    ReferenceTopK(x.data(), static_cast<int64_t>(x.size()), static_cast<int64_t>(positions.size()),
                  tie_break, positions.data());
    for (const int32_t position : positions) all.push_back(scores.first[row] + position);
  }
  return all;
}

TEST(Indexer, D2SelectionIsExactForEveryCountAndTieBreak) {
  for (const Shape& shape : Shapes()) {
    const Problem problem(shape, 12);
    for (const int64_t k : {0, 1, 2, 7, 64, 1000, -1}) {
      const std::vector<int64_t> counts = Counts(problem, k);
      for (const TieBreak tie_break : {TieBreak::kOldest, TieBreak::kNewest}) {
        ForTypes([&](auto type) {
          using T = decltype(type);
          const Typed<T> typed(problem);
          for (const NamedTable<T>& t : Tables<T>()) {
            const Selection<T> got(*t.table, typed.scores, counts, tie_break, 1 << 20);
            ASSERT_EQ(got.selected, Expected(*t.table, typed.scores, counts, tie_break))
                << shape.name << ' ' << t.name << " k " << k;
          }
        });
      }
    }
  }
}

TEST(Indexer, DoubleSelectionEqualsTheReference) {
  for (const Shape& shape : Shapes()) {
    const Problem problem(shape, 13);
    const Typed<double> typed(problem);
    const std::vector<int64_t> counts = Counts(problem, 9);
    for (const TieBreak tie_break : {TieBreak::kOldest, TieBreak::kNewest}) {
      Selection<double> got(DoubleKernels(), typed.scores, counts, tie_break, 50);
      std::vector<int32_t> expected(got.selected.size());
      ReferenceSelect({typed.scores, tie_break, got.offsets.data(), expected.data()},
                      {0, problem.rows});
      EXPECT_EQ(got.selected, expected) << shape.name;
    }
  }
}

// One head of width 1 with q = 1: the score of key s is k[s] (w = 1) or its ReLU.
Problem Chosen(const std::vector<double>& scores) {
  Shape shape{"chosen", {static_cast<int32_t>(scores.size())}, 2, 1};
  Problem problem(shape, 1);
  std::fill(problem.k.begin(), problem.k.end(), 0.0);
  // relu(x) - relu(-x) = x.
  for (int64_t row = 0; row < problem.rows; ++row) {
    problem.q[row * 2] = 1;
    problem.q[row * 2 + 1] = -1;
    problem.w[row * 2] = 1;
    problem.w[row * 2 + 1] = -1;
  }
  problem.k = scores;
  return problem;
}

TEST(Indexer, C5TiesGoToTheOldestOrTheNewestKey) {
  // All equal, more keys than a full buffer of candidates holds.
  const int64_t rows = 1500;
  const Problem problem = Chosen(std::vector<double>(rows, 0.0));
  std::vector<int64_t> counts(rows, 0);
  counts.back() = 5;
  ForTypes([&](auto type) {
    using T = decltype(type);
    const Typed<T> typed(problem);
    for (const NamedTable<T>& t : Tables<T>()) {
      const Selection<T> oldest(*t.table, typed.scores, counts, TieBreak::kOldest, rows);
      EXPECT_EQ(oldest.selected, (std::vector<int32_t>{0, 1, 2, 3, 4})) << t.name;
      const Selection<T> newest(*t.table, typed.scores, counts, TieBreak::kNewest, rows);
      EXPECT_EQ(newest.selected, (std::vector<int32_t>{1495, 1496, 1497, 1498, 1499})) << t.name;
    }
  });
}

TEST(Indexer, NanRanksLowestAndZerosOfBothSignsAreEqual) {
  // Position of +-0 decides among zeros; -inf beats NaN.
  const std::vector<double> scores = {kNan, -0.0, 0.0, -kInfinity, -0.0, kNan, 2.0, kInfinity, 0.0};
  const Problem problem = Chosen(scores);
  const std::vector<std::vector<int32_t>> oldest = {
      {7}, {6, 7}, {1, 6, 7}, {1, 2, 6, 7}, {1, 2, 4, 6, 7}, {1, 2, 4, 6, 7, 8}};
  ForTypes([&](auto type) {
    using T = decltype(type);
    const Typed<T> typed(problem);
    for (const NamedTable<T>& t : Tables<T>()) {
      // relu(inf * -1 + ..) makes inf - 0; nothing else is NaN.
      const std::vector<T> x = RowScores(*t.table, typed.scores, 8);
      for (size_t i = 0; i < scores.size(); ++i) {
        EXPECT_EQ(std::isnan(x[i]), std::isnan(scores[i])) << t.name << ' ' << i;
      }
      for (size_t k = 1; k <= oldest.size(); ++k) {
        std::vector<int64_t> counts(9, 0);
        counts[8] = static_cast<int64_t>(k);
        const Selection<T> got(*t.table, typed.scores, counts, TieBreak::kOldest, 9);
        EXPECT_EQ(got.selected, oldest[k - 1]) << t.name;
      }
      std::vector<int64_t> counts(9, 0);
      counts[8] = 3;
      EXPECT_EQ(Selection<T>(*t.table, typed.scores, counts, TieBreak::kNewest, 9).selected,
                (std::vector<int32_t>{6, 7, 8}));
      counts[8] = 8;  // -inf at 3 and one of the NaNs: the oldest, or the newest
      EXPECT_EQ(Selection<T>(*t.table, typed.scores, counts, TieBreak::kOldest, 9).selected,
                (std::vector<int32_t>{0, 1, 2, 3, 4, 6, 7, 8}));
      EXPECT_EQ(Selection<T>(*t.table, typed.scores, counts, TieBreak::kNewest, 9).selected,
                (std::vector<int32_t>{1, 2, 3, 4, 5, 6, 7, 8}));
    }
  });
}

// Ascending, descending and saw-tooth rows are the worst cases of a running threshold.
TEST(Indexer, SelectionHoldsForAdversarialOrders) {
  const int64_t rows = 3000;
  for (int order = 0; order < 4; ++order) {
    std::vector<double> scores;
    for (int64_t i = 0; i < rows; ++i) {
      const int64_t saw = i % 37;
      scores.push_back(order == 0   ? static_cast<double>(i)
                       : order == 1 ? static_cast<double>(-i)
                       : order == 2 ? static_cast<double>(saw)
                                    : static_cast<double>(saw % 2) * 1e-38);
    }
    const Problem problem = Chosen(scores);
    std::vector<int64_t> counts(rows, 0);
    for (const int64_t k : {1, 300, 1000, 2999}) {
      counts.back() = k;
      for (const TieBreak tie_break : {TieBreak::kOldest, TieBreak::kNewest}) {
        ForTypes([&](auto type) {
          using T = decltype(type);
          const Typed<T> typed(problem);
          for (const NamedTable<T>& t : Tables<T>()) {
            const Selection<T> got(*t.table, typed.scores, counts, tie_break, rows);
            ASSERT_EQ(got.selected, Expected(*t.table, typed.scores, counts, tie_break))
                << t.name << " order " << order << " k " << k;
          }
        });
      }
    }
  }
}

// ---- The same bits ------------------------------------------------------------------------------

template <typename T>
struct Measured {
  std::vector<T> mean, variance, maximum, entropy;

  Measured(const Table<T>& table, const Scores<T>& scores, int64_t rows, int64_t step)
      : mean(static_cast<size_t>(rows)), variance(mean), maximum(mean), entropy(mean) {
    const Statistics<T> p{scores, mean.data(), variance.data(), maximum.data(), entropy.data()};
    for (int64_t row = 0; row < rows; row += step) {
      table.statistics(p, {row, std::min(row + step, rows)});
    }
  }
  bool operator==(const Measured&) const = default;
};

TEST(Indexer, K3SplitsOfRowsChangeNoBit) {
  for (const Shape& shape : Shapes()) {
    const Problem problem(shape, 14);
    const std::vector<int64_t> counts = Counts(problem, 12);
    ForTypes([&](auto type) {
      using T = decltype(type);
      const Typed<T> typed(problem);
      for (const NamedTable<T>& t : Tables<T>()) {
        const Measured<T> whole(*t.table, typed.scores, problem.rows, problem.rows);
        const Selection<T> set(*t.table, typed.scores, counts, TieBreak::kOldest, problem.rows);
        for (const int64_t step : {1, 3, 32, 50}) {
          EXPECT_EQ(Measured<T>(*t.table, typed.scores, problem.rows, step), whole)
              << shape.name << ' ' << t.name;
          EXPECT_EQ(Selection<T>(*t.table, typed.scores, counts, TieBreak::kOldest, step).selected,
                    set.selected);
        }
      }
    });
  }
}

// C3: one query row per sequence against a cache of keys that goes on after it.
TEST(Indexer, C3DecodedRowsEqualThePrefillBitForBit) {
  for (const Shape& shape : Shapes()) {
    const Problem problem(shape, 15);
    const std::vector<int64_t> counts = Counts(problem, 12);
    ForTypes([&](auto type) {
      using T = decltype(type);
      const Typed<T> typed(problem);
      for (const NamedTable<T>& t : Tables<T>()) {
        const Measured<T> prefill(*t.table, typed.scores, problem.rows, problem.rows);
        const Selection<T> set(*t.table, typed.scores, counts, TieBreak::kNewest, problem.rows);
        for (int64_t row = problem.rows - 1; row >= 0; row -= 23) {
          // The cache of the row's document alone, with three keys of garbage behind.
          const int64_t start = problem.first[row];
          std::vector<T> cache(typed.k.begin() + start * shape.width,
                               typed.k.begin() + (row + 1) * shape.width);
          cache.insert(cache.end(), static_cast<size_t>(3 * shape.width), std::nan(""));
          const int32_t first = 0;
          const int32_t last = static_cast<int32_t>(row - start);
          Scores<T> scores = typed.scores;
          scores.q += row * shape.heads * shape.width;
          scores.w += row * shape.heads;
          scores.k = cache.data();
          scores.first = &first;
          scores.last = &last;
          EXPECT_EQ(Bits(RowScores(*t.table, scores, 0)),
                    Bits(RowScores(*t.table, typed.scores, row)))
              << shape.name << ' ' << t.name << " row " << row;
          const Measured<T> decoded(*t.table, scores, 1, 1);
          EXPECT_EQ(decoded.mean[0], prefill.mean[row]);
          EXPECT_EQ(decoded.variance[0], prefill.variance[row]);
          EXPECT_EQ(decoded.entropy[0], prefill.entropy[row]);
          const Selection<T> one(*t.table, scores, {counts[row]}, TieBreak::kNewest, 1);
          for (int64_t i = 0; i < counts[row]; ++i) {
            ASSERT_EQ(one.selected[i] + start, set.selected[set.offsets[row] + i]);
          }
        }
      }
    });
  }
}

// 20.11 and S49: both fuse multiply-add in the same order.
TEST(Indexer, Avx2AndAvx512GiveTheSameBits) {
  const auto tables = Tables<float>();
  if (tables.size() < 3) {
    GTEST_SKIP() << "needs a processor with AVX-512, and no HEDDLE_ISA below it";
  }
  for (const Shape& shape : Shapes()) {
    const Problem problem(shape, 16);
    const Typed<float> typed(problem);
    for (int64_t row = 0; row < problem.rows; ++row) {
      ASSERT_EQ(Bits(RowScores(*tables[1].table, typed.scores, row)),
                Bits(RowScores(*tables[2].table, typed.scores, row)))
          << shape.name;
    }
    const std::vector<int64_t> counts = Counts(problem, 20);
    EXPECT_EQ(
        Selection<float>(*tables[1].table, typed.scores, counts, TieBreak::kOldest, 64).selected,
        Selection<float>(*tables[2].table, typed.scores, counts, TieBreak::kOldest, 64).selected);
  }
}

// ---- Statistics ---------------------------------------------------------------------------------

TEST(Indexer, StatisticsEqualTheReference) {
  for (const Shape& shape : Shapes()) {
    const Problem problem(shape, 17);
    const Typed<double> reference(problem);
    const size_t rows = static_cast<size_t>(problem.rows);
    std::vector<double> mean(rows), variance(rows), maximum(rows), entropy(rows);
    ReferenceStatistics(
        {reference.scores, mean.data(), variance.data(), maximum.data(), entropy.data()},
        {0, problem.rows});
    ForTypes([&](auto type) {
      using T = decltype(type);
      const Typed<T> typed(problem);
      for (const NamedTable<T>& t : Tables<T>()) {
        const Measured<T> got(*t.table, typed.scores, problem.rows, 100);
        const std::string what = shape.name + " " + t.name;
        ExpectClose(Wide(got.mean), mean, kTolerance<T>, what + " mean");
        ExpectClose(Wide(got.variance), variance, 2 * kTolerance<T>, what + " variance");
        ExpectClose(Wide(got.maximum), maximum, kTolerance<T>, what + " maximum");
        ExpectClose(Wide(got.entropy), entropy, kTolerance<T>, what + " entropy");
      }
    });
  }
}

// More keys than one chunk of sums, far from zero: no cancellation.
TEST(Indexer, VarianceOfScoresFarFromZeroIsExact) {
  std::vector<double> scores;
  for (int64_t i = 0; i < 2000; ++i) scores.push_back(4096 + (i % 5));
  const Problem problem = Chosen(scores);
  ForTypes([&](auto type) {
    using T = decltype(type);
    const Typed<T> typed(problem);
    for (const NamedTable<T>& t : Tables<T>()) {
      const Measured<T> got(*t.table, typed.scores, problem.rows, problem.rows);
      EXPECT_NEAR(got.variance.back(), 2.0, 1e-5) << t.name;
      EXPECT_NEAR(got.mean.back(), 4098.0, 1e-3) << t.name;
      EXPECT_EQ(got.variance[0], T{0}) << t.name;
      EXPECT_EQ(got.entropy[0], T{0}) << t.name;
    }
  });
}

// ---- KL -----------------------------------------------------------------------------------------

struct AttentionShape {
  int64_t heads = 4;
  int64_t kv_heads = 2;
  int64_t key_dim = 10;
};

// Target, key sets and the double reference of a problem.
struct KlProblem {
  Problem problem;
  AttentionShape attention;
  bool selected = false;
  std::vector<double> q, k, lse;  // [N, H Dk + 3], [N, J Dk + 1]: strided
  std::vector<int64_t> offsets;
  std::vector<int32_t> list;
  static constexpr double kTemperature = 0.5;
  static constexpr double kRowWeight = 0.3;

  KlProblem(const Shape& shape, const AttentionShape& a, bool sets, uint64_t seed)
      : problem(shape, seed), attention(a), selected(sets) {
    Random random(seed + 1);
    q = Values(&random, problem.rows * q_stride());
    k = Values(&random, problem.rows * k_stride());
    offsets = {0};
    for (int64_t row = 0; row < problem.rows; ++row) {
      const int64_t first = problem.first[row];
      std::vector<int32_t> keys(static_cast<size_t>(row - first + 1));
      std::iota(keys.begin(), keys.end(), static_cast<int32_t>(first));
      if (selected) {
        for (size_t i = keys.size(); i > 1; --i) {
          std::swap(keys[i - 1], keys[static_cast<size_t>(random.Below(static_cast<int64_t>(i)))]);
        }
        keys.resize(std::min<size_t>(keys.size(), 1 + static_cast<size_t>(random.Below(90))));
        std::sort(keys.begin(), keys.end());
      }
      list.insert(list.end(), keys.begin(), keys.end());
      offsets.push_back(static_cast<int64_t>(list.size()));
      for (int64_t h = 0; h < a.heads; ++h) lse.push_back(Lse(row, h));
    }
  }
  int64_t q_stride() const { return attention.heads * attention.key_dim + 3; }
  int64_t k_stride() const { return attention.kv_heads * attention.key_dim + 1; }
  double scale() const { return 1 / std::sqrt(static_cast<double>(attention.key_dim)); }
  double Lse(int64_t row, int64_t h) const {
    const int64_t j = h / (attention.heads / attention.kv_heads);
    double sum = 0;
    for (int64_t i = offsets[row]; i < static_cast<int64_t>(list.size()); ++i) {
      double dot = 0;
      for (int64_t d = 0; d < attention.key_dim; ++d) {
        dot += q[row * q_stride() + h * attention.key_dim + d] *
               k[list[i] * k_stride() + j * attention.key_dim + d];
      }
      sum += std::exp(scale() * dot);
    }
    return std::log(sum);
  }
};

template <typename T>
struct KlOutputs {
  std::vector<T> loss, lse, dq, dw, dk, dbias;
  bool operator==(const KlOutputs&) const = default;
};

struct KlSplit {
  int64_t rows = 1 << 20;  // of a call of kl_rows
  int64_t keys = 1 << 20;  // of a task of kl_keys
  bool keep_dscores = false;
};

// Pointers to `out` and inputs; run(Kl<T>) does the work.
template <typename T, typename Run>
KlOutputs<T> MakeKl(const KlProblem& p, const Run& run) {
  const Typed<T> typed(p.problem);
  const std::vector<T> q = As<T>(p.q), k = As<T>(p.k), lse = As<T>(p.lse);
  KlOutputs<T> out;
  const size_t rows = static_cast<size_t>(p.problem.rows);
  // NaN shows what nobody wrote.
  const T nan = std::numeric_limits<T>::quiet_NaN();
  out.loss.assign(rows, nan);
  out.lse.assign(rows, nan);
  out.dq.assign(typed.q.size(), nan);
  out.dk.assign(typed.k.size(), nan);
  out.dw.assign(typed.w.size(), nan);
  out.dbias.assign(typed.w.size(), nan);
  Kl<T> kl;
  kl.scores = typed.scores;
  if (p.selected) {
    kl.offsets = p.offsets.data();
    kl.selected = p.list.data();
  }
  kl.temperature = KlProblem::kTemperature;
  kl.attention_heads = p.attention.heads;
  kl.kv_heads = p.attention.kv_heads;
  kl.key_dim = p.attention.key_dim;
  kl.attention_scale = p.scale();
  kl.attention_q = q.data();
  kl.attention_k = k.data();
  kl.q_stride = p.q_stride();
  kl.k_stride = p.k_stride();
  kl.lse = lse.data();
  kl.loss = out.loss.data();
  kl.lse_scores = out.lse.data();
  kl.row_weight = KlProblem::kRowWeight;
  kl.dq = out.dq.data();
  kl.dw = out.dw.data();
  kl.dk = out.dk.data();
  kl.dhead_bias = out.dbias.data();
  run(kl);
  return out;
}

template <typename T>
KlOutputs<T> RunKl(const Table<T>& table, const KlProblem& p, const KlSplit& split) {
  std::vector<T> dscores(p.list.size());
  return MakeKl<T>(p, [&](Kl<T> kl) {
    if (split.keep_dscores) kl.dscores = dscores.data();
    const int64_t rows = p.problem.rows;
    for (int64_t row = 0; row < rows; row += split.rows) {
      table.kl_rows(kl, {row, std::min(row + split.rows, rows)});
    }
    for (int64_t start = 0; start < rows;) {
      int64_t end = start;
      while (end < rows && p.problem.first[end] == start) ++end;
      for (int64_t key = start; key < end; key += split.keys) {
        const int64_t key_end = std::min(key + split.keys, end);
        table.kl_keys(kl, {{key, key_end}, {key, end}});
      }
      start = end;
    }
  });
}

std::vector<KlProblem> KlProblems() {
  std::vector<KlProblem> problems;
  const std::vector<AttentionShape> attentions = {{4, 2, 10},  {1, 1, 16}, {5, 5, 3},
                                                  {24, 1, 40}, {6, 2, 33}, {8, 2, 64}};
  uint64_t seed = 20;
  for (const bool selected : {false, true}) {
    for (size_t i = 0; i < Shapes().size(); ++i) {
      Shape shape = Shapes()[i];
      shape.levels = 0;  // a kink of ReLU at 0 has no gradient to compare
      problems.emplace_back(shape, attentions[i % attentions.size()], selected, ++seed);
    }
  }
  return problems;
}

TEST(Indexer, D9KlAndItsGradientsEqualTheMaterialisedReference) {
  for (const KlProblem& p : KlProblems()) {
    const KlOutputs<double> expected =
        MakeKl<double>(p, [&](const Kl<double>& kl) { ReferenceKl(kl, p.problem.rows); });
    ForTypes([&](auto type) {
      using T = decltype(type);
      for (const NamedTable<T>& t : Tables<T>()) {
        for (const bool keep : {false, true}) {
          const KlOutputs<T> got = RunKl(*t.table, p, {1 << 20, 1 << 20, keep});
          const std::string what =
              p.problem.shape.name + " " + t.name + (p.selected ? " selected " : " all ");
          const double tolerance = 2 * kTolerance<T>;
          ExpectClose(Wide(got.loss), expected.loss, tolerance, what + "loss");
          ExpectClose(Wide(got.lse), expected.lse, tolerance, what + "lse");
          ExpectClose(Wide(got.dq), expected.dq, tolerance, what + "dq");
          ExpectClose(Wide(got.dw), expected.dw, tolerance, what + "dw");
          ExpectClose(Wide(got.dk), expected.dk, tolerance, what + "dk");
          ExpectClose(Wide(got.dbias), expected.dbias, tolerance, what + "dhead_bias");
        }
      }
    });
  }
}

TEST(Indexer, K3SplitsOfTheKlChangeNoBit) {
  for (const KlProblem& p : KlProblems()) {
    ForTypes([&](auto type) {
      using T = decltype(type);
      for (const NamedTable<T>& t : Tables<T>()) {
        const KlOutputs<T> whole = RunKl(*t.table, p, {});
        for (const KlSplit& split : {KlSplit{1, 7, true}, KlSplit{32, 64}, KlSplit{50, 33, true}}) {
          EXPECT_TRUE(RunKl(*t.table, p, split) == whole) << p.problem.shape.name << ' ' << t.name;
        }
      }
    });
  }
}

TEST(Indexer, RowsWithOneKeyHaveKlZeroAndNoGradient) {
  for (const KlProblem& p : KlProblems()) {
    ForTypes([&](auto type) {
      using T = decltype(type);
      for (const NamedTable<T>& t : Tables<T>()) {
        const KlOutputs<T> got = RunKl(*t.table, p, {});
        int64_t singles = 0;
        for (int64_t row = 0; row < p.problem.rows; ++row) {
          if (p.offsets[row + 1] - p.offsets[row] != 1) continue;
          ++singles;
          EXPECT_EQ(got.loss[row], T{0});
          for (int64_t j = 0; j < p.problem.shape.heads; ++j) {
            EXPECT_EQ(got.dw[row * p.problem.shape.heads + j], T{0});
          }
        }
        EXPECT_GE(singles, 1);
      }
    });
  }
}

// C7 in the presence of poison: what a row may not see cannot reach it, not even as 0 x NaN.
TEST(Indexer, C7NanInLaterKeysReachesNoEarlierRow) {
  const Shape shape{"poison", {90}, 3, 20, Activation::kSigmoid, 0.5, true};
  const KlProblem clean(shape, {4, 2, 10}, false, 31);
  KlProblem poisoned = clean;
  const int64_t from = 70;
  std::fill(poisoned.problem.k.begin() + from * shape.width, poisoned.problem.k.end(), kNan);
  std::fill(poisoned.k.begin() + from * clean.k_stride(), poisoned.k.end(), kInfinity);
  ForTypes([&](auto type) {
    using T = decltype(type);
    for (const NamedTable<T>& t : Tables<T>()) {
      const KlOutputs<T> a = RunKl(*t.table, clean, {});
      const KlOutputs<T> b = RunKl(*t.table, poisoned, {});
      const int64_t heads = shape.heads;
      for (int64_t i = 0; i < from; ++i) ASSERT_EQ(a.loss[i], b.loss[i]) << t.name;
      for (int64_t i = 0; i < from * heads; ++i) ASSERT_EQ(a.dw[i], b.dw[i]) << t.name;
      for (int64_t i = 0; i < from * heads * shape.width; ++i) ASSERT_EQ(a.dq[i], b.dq[i]);
      const Measured<T> before(*t.table, Typed<T>(clean.problem).scores, from, from);
      const Measured<T> after(*t.table, Typed<T>(poisoned.problem).scores, from, from);
      EXPECT_EQ(before, after);
      EXPECT_TRUE(std::isnan(b.loss[from])) << t.name;
    }
  });
}

}  // namespace
}  // namespace heddle::kernels::indexer
