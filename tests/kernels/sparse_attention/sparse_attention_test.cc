#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels/sparse_attention/params.h"
#include "kernels/sparse_attention/reference.h"

namespace heddle::kernels::sparse_attention {
namespace {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct Shape {
  int64_t rows = 0;
  int64_t keys = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t key_dim = 0;
  int64_t value_dim = 0;
  int64_t set_heads = 1;
  int32_t width = 1;

  std::string name() const {
    return "N " + std::to_string(rows) + " M " + std::to_string(keys) + " H " +
           std::to_string(heads) + " J " + std::to_string(kv_heads) + " Dk " +
           std::to_string(key_dim) + " Dv " + std::to_string(value_dim) + " set heads " +
           std::to_string(set_heads) + " width " + std::to_string(width);
  }
};

// Owned key sets: random, ragged, some of them empty, ends anywhere.
struct Sets {
  std::vector<int64_t> offsets = {0};
  std::vector<int32_t> first;
  std::vector<int32_t> end;

  Sets(const Shape& s, std::mt19937* random) {
    const auto below = [&](int64_t bound) {
      return static_cast<int64_t>((*random)() % static_cast<uint64_t>(bound));
    };
    for (int64_t row = 0; row < s.rows; ++row) {
      end.push_back(
          static_cast<int32_t>(below(8) == 0 ? below(s.keys + 1) : s.keys - below(s.keys / 4 + 1)));
      for (int64_t g = 0; g < s.set_heads; ++g) {
        const int64_t density = below(4);  // 0: empty; 3: nearly all
        if (s.width == INT32_MAX) {
          if (density > 0) first.push_back(static_cast<int32_t>(below(s.keys)));
        } else {
          // Blocks need not be aligned: spans may follow each other at any distance >= width.
          for (int64_t key = below(3); key < s.keys; key += s.width + below(2)) {
            if (below(4) < density) first.push_back(static_cast<int32_t>(key));
          }
        }
        offsets.push_back(static_cast<int64_t>(first.size()));
      }
    }
  }
};

// Inputs that float holds exactly, so that only arithmetic differs. Rows have a gap of NaN after
// them, which a kernel that reads too far would bring into its sums.
constexpr int64_t kGap = 3;
std::vector<double> RandomRows(int64_t rows, int64_t width, int64_t gap, std::mt19937* random) {
  std::vector<double> values(static_cast<size_t>(rows * (width + gap)), kNan);
  std::normal_distribution<float> normal;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t i = 0; i < width; ++i) values[row * (width + gap) + i] = normal(*random);
  }
  return values;
}

struct Case {
  Shape shape;
  Sets sets;
  std::vector<double> q, k, v, dout;

  Case(const Shape& s, std::mt19937* random)
      : shape(s),
        sets(s, random),
        q(RandomRows(s.rows, s.heads * s.key_dim, kGap, random)),
        k(RandomRows(s.keys, s.kv_heads * s.key_dim, kGap, random)),
        v(RandomRows(s.keys, s.kv_heads * s.value_dim, kGap, random)),
        dout(RandomRows(s.rows, s.heads * s.value_dim, 0, random)) {}
};

// A case and its results in one type; results start as NaN, which shows what nobody wrote.
template <typename T>
struct Computed {
  const Shape& shape;
  std::vector<T> q, k, v, dout, out, lse, delta, dq, dk, dv;
  Problem<T> problem;

  static std::vector<T> Blank(int64_t count) {
    return std::vector<T>(static_cast<size_t>(count), static_cast<T>(kNan));
  }
  explicit Computed(const Case& c)
      : shape(c.shape),
        q(c.q.begin(), c.q.end()),
        k(c.k.begin(), c.k.end()),
        v(c.v.begin(), c.v.end()),
        dout(c.dout.begin(), c.dout.end()),
        out(Blank(shape.rows * shape.heads * shape.value_dim)),
        lse(Blank(shape.rows * shape.heads)),
        delta(lse),
        dq(Blank(shape.rows * shape.heads * shape.key_dim)),
        dk(Blank(shape.keys * shape.kv_heads * shape.key_dim)),
        dv(Blank(shape.keys * shape.kv_heads * shape.value_dim)) {
    problem.heads = shape.heads;
    problem.kv_heads = shape.kv_heads;
    problem.key_dim = shape.key_dim;
    problem.value_dim = shape.value_dim;
    problem.scale = 1.0 / std::sqrt(static_cast<double>(shape.key_dim));
    problem.sets = {shape.set_heads, c.sets.offsets.data(), c.sets.first.data(), c.sets.end.data(),
                    shape.width};
    problem.q = q.data();
    problem.k = k.data();
    problem.v = v.data();
    problem.q_stride = shape.heads * shape.key_dim + kGap;
    problem.k_stride = shape.kv_heads * shape.key_dim + kGap;
    problem.v_stride = shape.kv_heads * shape.value_dim + kGap;
  }
  Computed(const Computed&) = delete;

  Forward<T> forward() { return {problem, out.data(), lse.data()}; }
  Backward<T> backward() {
    return {problem,      out.data(), lse.data(), dout.data(),
            delta.data(), dq.data(),  dk.data(),  dv.data()};
  }

  // Rows in pieces of `row_step`, keys in tasks of `key_step`.
  void Compute(const Table<T>& table, int64_t row_step, int64_t key_step) {
    const auto pieces = [&](const auto& body) {
      for (int64_t row = 0; row < shape.rows; row += row_step) {
        body(Rows{row, std::min(shape.rows, row + row_step)});
      }
    };
    pieces([&](Rows rows) { table.forward(forward(), rows); });
    pieces([&](Rows rows) { table.backward_queries(backward(), rows); });
    for (int64_t j = 0; j < shape.kv_heads; ++j) {
      for (int64_t key = 0; key < shape.keys; key += key_step) {
        table.backward_keys(backward(),
                            {j, {key, std::min(shape.keys, key + key_step)}, {0, shape.rows}});
      }
    }
  }
  void ComputeWhole(const Table<T>& table) {
    Compute(table, std::max<int64_t>(1, shape.rows), std::max<int64_t>(1, shape.keys));
  }
  void ComputeReference() {
    ReferenceForward(forward(), shape.rows, shape.keys);
    ReferenceBackward(backward(), shape.rows, shape.keys);
  }
};

// Relative to the largest value; infinities must be equal, NaN is never right.
template <typename T>
void ExpectClose(const std::vector<T>& got, const std::vector<double>& expected, double tolerance,
                 const char* what) {
  ASSERT_EQ(got.size(), expected.size());
  double largest = 0;
  for (const double x : expected) {
    if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
  }
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isinf(expected[i])) {
      ASSERT_EQ(static_cast<double>(got[i]), expected[i]) << what << " element " << i;
    } else {
      ASSERT_LE(std::abs(got[i] - expected[i]), tolerance * (1e-3 + largest))
          << what << " element " << i << " is " << got[i] << ", not " << expected[i];
    }
  }
}

template <typename T>
void ExpectClose(const Computed<T>& got, const Computed<double>& expected, double tolerance) {
  ExpectClose(got.out, expected.out, tolerance, "out");
  ExpectClose(got.lse, expected.lse, tolerance, "lse");
  ExpectClose(got.delta, expected.delta, tolerance, "delta");
  ExpectClose(got.dq, expected.dq, tolerance, "dq");
  ExpectClose(got.dk, expected.dk, tolerance, "dk");
  ExpectClose(got.dv, expected.dv, tolerance, "dv");
}

template <typename T>
void ExpectSameBits(const Computed<T>& a, const Computed<T>& b) {
  const auto same = [](const std::vector<T>& x, const std::vector<T>& y) {
    return std::memcmp(x.data(), y.data(), x.size() * sizeof(T)) == 0;
  };
  EXPECT_TRUE(same(a.out, b.out)) << "out";
  EXPECT_TRUE(same(a.lse, b.lse)) << "lse";
  EXPECT_TRUE(same(a.delta, b.delta)) << "delta";
  EXPECT_TRUE(same(a.dq, b.dq)) << "dq";
  EXPECT_TRUE(same(a.dk, b.dk)) << "dk";
  EXPECT_TRUE(same(a.dv, b.dv)) << "dv";
}

// Groups of 1, 2, 3, 4, 7, 16 and more heads than are held at once; widths around the vectors of
// 16; sets around the tile of 64 keys, with spans of every kind.
std::vector<Shape> Shapes() {
  struct Heads {
    int64_t heads, kv_heads, key_dim, value_dim;
  };
  std::vector<Shape> shapes;
  for (const Heads& h :
       {Heads{4, 2, 8, 8}, Heads{3, 3, 24, 16}, Heads{4, 1, 64, 64}, Heads{6, 2, 80, 24},
        Heads{7, 1, 17, 33}, Heads{2, 1, 128, 128}, Heads{20, 1, 96, 64}, Heads{16, 1, 1, 3}}) {
    for (const int32_t width : {1, 8, INT32_MAX}) {
      for (const int64_t set_heads : {int64_t{1}, h.kv_heads}) {
        for (const int64_t keys : {1, 40, 200}) {
          shapes.push_back(
              {13, keys, h.heads, h.kv_heads, h.key_dim, h.value_dim, set_heads, width});
        }
      }
    }
  }
  shapes.push_back({2, 150, 131, 1, 8, 8, 1, 1});
  shapes.push_back({0, 5, 4, 2, 8, 8, 2, 1});
  return shapes;
}

class SparseAttention : public testing::Test {
 protected:
  // Calls body(case, random) for every shape with a seed of its own, which failures print.
  template <typename Body>
  void ForCases(const Body& body) {
    unsigned seed = 1;
    for (const Shape& shape : Shapes()) {
      SCOPED_TRACE(shape.name() + " seed " + std::to_string(seed));
      std::mt19937 random(seed++);
      const Case c(shape, &random);
      body(c, &random);
      if (HasFatalFailure()) return;
    }
  }
  template <typename Body>
  void ForFloatTables(const Body& body) {
    NamedTable tables[4];
    const int count = AvailableFloatTables(tables);
    ASSERT_GE(count, 1);
    for (int i = 0; i < count; ++i) {
      SCOPED_TRACE(tables[i].name);
      body(*tables[i].table);
    }
  }
};

TEST_F(SparseAttention, K1FloatOfEveryInstructionSetEqualsTheReference) {
  ForCases([&](const Case& c, std::mt19937*) {
    Computed<double> expected(c);
    expected.ComputeReference();
    ForFloatTables([&](const Table<float>& table) {
      Computed<float> got(c);
      got.ComputeWhole(table);
      ExpectClose(got, expected, 1e-5);
    });
  });
}

TEST_F(SparseAttention, K1DoubleEqualsTheReference) {
  ForCases([&](const Case& c, std::mt19937*) {
    Computed<double> expected(c);
    Computed<double> got(c);
    expected.ComputeReference();
    got.ComputeWhole(DoubleKernels());
    ExpectClose(got, expected, 1e-12);
  });
}

TEST_F(SparseAttention, K3AnySplitOfRowsAndKeysGivesTheSameBits) {
  ForCases([&](const Case& c, std::mt19937* random) {
    const int64_t row_step = 1 + static_cast<int64_t>((*random)() % 6);
    const int64_t key_step = 1 + static_cast<int64_t>((*random)() % 100);
    ForFloatTables([&](const Table<float>& table) {
      Computed<float> whole(c), split(c);
      whole.ComputeWhole(table);
      split.Compute(table, row_step, key_step);
      ExpectSameBits(whole, split);
    });
    Computed<double> whole(c), split(c);
    whole.ComputeWhole(DoubleKernels());
    split.Compute(DoubleKernels(), row_step, key_step);
    ExpectSameBits(whole, split);
  });
}

TEST_F(SparseAttention, VectorInstructionSetsWithFusedProductsGiveTheSameBits) {
  NamedTable tables[4];
  if (AvailableFloatTables(tables) < 3) GTEST_SKIP() << "no AVX-512 here, or HEDDLE_ISA lowers it";
  ForCases([&](const Case& c, std::mt19937*) {
    Computed<float> avx2(c), avx512(c);
    avx2.ComputeWhole(*tables[1].table);
    avx512.ComputeWhole(*tables[2].table);
    ExpectSameBits(avx2, avx512);
  });
}

// The same keys as tokens, as blocks and as one range: the set alone decides, to the last bit.
TEST_F(SparseAttention, TheFormOfTheSpansChangesNoBit) {
  std::mt19937 random(7);
  const Shape tokens{9, 160, 4, 2, 40, 24, 1, 1};
  Case c(tokens, &random);
  const auto with_spans = [&](int32_t width) {
    Case other = c;
    other.shape.width = width;
    other.sets.first.clear();
    other.sets.offsets = {0};
    for (int64_t row = 0; row < tokens.rows; ++row) {
      other.sets.end[static_cast<size_t>(row)] = static_cast<int32_t>(150 - row);
      for (int64_t key = 5; key < 160; key += std::min<int64_t>(width, 160)) {
        other.sets.first.push_back(static_cast<int32_t>(key));
      }
      other.sets.offsets.push_back(static_cast<int64_t>(other.sets.first.size()));
    }
    return other;
  };
  const Case one = with_spans(1), block = with_spans(7), range = with_spans(INT32_MAX);
  Computed<float> a(one), b(block), d(range);
  for (Computed<float>* run : {&a, &b, &d}) run->ComputeWhole(FloatKernels());
  ExpectSameBits(a, b);
  ExpectSameBits(a, d);
}

// C9, K4: a row without keys, next to rows with keys.
TEST_F(SparseAttention, EmptySetsGiveZeroAndMinusInfinity) {
  std::mt19937 random(3);
  Case c({3, 10, 2, 1, 8, 8, 1, 1}, &random);
  c.sets.first = {2, 4, 6};
  c.sets.offsets = {0, 2, 2, 3};
  c.sets.end = {10, 10, 6};  // row 1 has no span, the span of row 2 begins at its end
  Computed<float> run(c);
  run.ComputeWhole(FloatKernels());
  for (size_t i = 1 * 16; i < 3 * 16; ++i) {
    EXPECT_EQ(run.out[i], 0.0f);
    EXPECT_EQ(run.dq[i], 0.0f);
  }
  for (size_t i = 2; i < 6; ++i) EXPECT_EQ(run.lse[i], -kInfinity);
  EXPECT_TRUE(std::isfinite(run.lse[0]));
  for (size_t i = 0; i < run.dk.size(); ++i) {
    const bool seen = i / 8 == 2 || i / 8 == 4;
    EXPECT_EQ(run.dk[i] != 0.0f, seen) << i;
    EXPECT_EQ(run.dv[i] != 0.0f, seen) << i;
  }
}

// K4: what a broken input gives is defined: NaN in the rows that see it, nothing elsewhere.
TEST_F(SparseAttention, K4NanStaysInTheRowsThatSeeIt) {
  std::mt19937 random(5);
  Case c({2, 100, 2, 1, 20, 20, 1, 1}, &random);
  c.sets.first.clear();
  for (int32_t key = 0; key < 90; ++key) c.sets.first.push_back(key);
  for (int32_t key = 0; key < 70; ++key) c.sets.first.push_back(key);
  c.sets.offsets = {0, 90, 160};
  c.sets.end = {100, 100};
  c.k[static_cast<size_t>(80 * (20 + kGap) + 1)] = kNan;
  ForFloatTables([&](const Table<float>& table) {
    Computed<float> run(c);
    run.ComputeWhole(table);
    for (size_t i = 0; i < 40; ++i) EXPECT_TRUE(std::isnan(run.out[i]));
    for (size_t i = 40; i < 80; ++i) EXPECT_FALSE(std::isnan(run.out[i]));
    EXPECT_TRUE(std::isnan(run.lse[0]) && std::isnan(run.lse[1]));
  });
}

// Scores far beyond the range of exp: the running maximum keeps everything finite, also where it
// rises from tile to tile. A score of 1200 has an error of 6e-5 in fp32, and so have probabilities.
TEST_F(SparseAttention, LargeScoresNeitherOverflowNorVanish) {
  std::mt19937 random(11);
  Case c({2, 300, 2, 2, 16, 16, 1, INT32_MAX}, &random);
  c.sets.first = {0, 0};
  c.sets.offsets = {0, 1, 2};
  c.sets.end = {300, 300};
  const size_t stride = 2 * 16 + kGap;
  for (size_t key = 0; key < 300; ++key) {
    for (size_t i = 0; i < 32; ++i) c.k[key * stride + i] = 0.25 * static_cast<double>(key);
  }
  for (size_t row = 0; row < 2; ++row) {
    for (size_t i = 0; i < 32; ++i) c.q[row * stride + i] = row == 0 ? 4.0 : -4.0;
  }
  Computed<double> expected(c);
  expected.ComputeReference();
  ForFloatTables([&](const Table<float>& table) {
    Computed<float> got(c);
    got.ComputeWhole(table);
    ExpectClose(got, expected, 1e-3);
  });
}

}  // namespace
}  // namespace heddle::kernels::sparse_attention
