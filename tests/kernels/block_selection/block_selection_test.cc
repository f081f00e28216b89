#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "kernels/block_selection/params.h"

namespace heddle::kernels::block_selection {
namespace {

Shape MakeShape(int64_t l, int64_t r, int64_t block, int64_t topk, int64_t init, int64_t local) {
  Shape s;
  s.heads = 6;
  s.kv_heads = 2;
  s.dim = 20;  // a vector and a tail
  s.scale = 0.3;
  s.kernel_size = l;
  s.stride = r;
  s.block = block;
  s.topk = topk;
  s.init_blocks = init;
  s.local_blocks = local;
  return s;
}

const std::vector<Shape> kShapes = {MakeShape(4, 2, 8, 3, 1, 1), MakeShape(4, 4, 4, 4, 0, 1),
                                    MakeShape(6, 2, 8, 4, 1, 2), MakeShape(1, 1, 1, 5, 0, 0),
                                    MakeShape(8, 2, 8, 2, 2, 0), MakeShape(4, 2, 8, 99, 1, 1)};

// Packed documents with their compressed keys, as both element types see them.
struct Problem {
  Shape shape;
  std::vector<int32_t> position;
  std::vector<int32_t> window_first;
  std::vector<int64_t> offsets;
  std::vector<double> q, kc, lse;
  int64_t score_blocks = 1;

  int64_t rows() const { return static_cast<int64_t>(position.size()); }
};

double Logit(const Problem& p, int64_t row, int64_t head, int64_t window) {
  const Shape& s = p.shape;
  const int64_t group = head / (s.heads / s.kv_heads);
  double dot = 0;
  for (int64_t d = 0; d < s.dim; ++d) {
    dot += p.q[static_cast<size_t>((row * s.heads + head) * s.dim + d)] *
           p.kc[static_cast<size_t>(
               ((p.window_first[static_cast<size_t>(row)] + window) * s.kv_heads + group) * s.dim +
               d)];
  }
  return s.scale * dot;
}

// The softmax statistics that attention over the compressed keys would have left.
void FillLse(Problem* p) {
  for (int64_t row = 0; row < p->rows(); ++row) {
    const int64_t windows = VisibleWindows(p->shape, p->position[static_cast<size_t>(row)]);
    for (int64_t h = 0; h < p->shape.heads; ++h) {
      double sum = 0;
      for (int64_t j = 0; j < windows; ++j) sum += std::exp(Logit(*p, row, h, j));
      // A float holds it exactly, so that both element types get the same value.
      p->lse.push_back(static_cast<double>(static_cast<float>(std::log(sum))));
    }
  }
}

Problem MakeProblem(const Shape& shape, const std::vector<int32_t>& lengths, double amplitude) {
  Problem p;
  p.shape = shape;
  p.offsets = {0};
  int32_t windows = 0;
  for (const int32_t length : lengths) {
    for (int32_t t = 0; t < length; ++t) {
      p.position.push_back(t);
      p.window_first.push_back(windows);
      for (int64_t g = 0; g < shape.kv_heads; ++g) {
        p.offsets.push_back(p.offsets.back() + ChosenBlocks(shape, t));
      }
      p.score_blocks = std::max(p.score_blocks, t / shape.block + 1);
    }
    if (length > 0) windows += static_cast<int32_t>(VisibleWindows(shape, length - 1));
  }
  const auto values = [&](int64_t count, double phase) {
    std::vector<double> out;
    for (int64_t i = 0; i < count; ++i) {
      out.push_back(static_cast<float>(amplitude * std::sin(0.7 * i * i + phase)));
    }
    return out;
  };
  p.q = values(p.rows() * shape.heads * shape.dim, 0.3);
  p.kc = values(windows * shape.kv_heads * shape.dim, 1.1);
  FillLse(&p);
  return p;
}

struct Selected {
  std::vector<int32_t> blocks;
  std::vector<double> scores;  // as the element type holds them
  int64_t nan_rows = 0;
};

template <typename T>
Selected Compute(const Table<T>& table, const Problem& p, int64_t rows_per_call = 1 << 20) {
  // Rows of a joined projection: strided, and no multiple of a vector apart.
  const int64_t q_row = p.shape.heads * p.shape.dim;
  const int64_t q_stride = q_row + 3;
  std::vector<T> q(static_cast<size_t>(p.rows() * q_stride), T(1e9));
  for (int64_t row = 0; row < p.rows(); ++row) {
    std::copy_n(p.q.begin() + row * q_row, q_row, q.begin() + row * q_stride);
  }
  const std::vector<T> kc(p.kc.begin(), p.kc.end());
  const std::vector<T> lse(p.lse.begin(), p.lse.end());
  std::vector<T> scores(static_cast<size_t>(p.rows() * p.shape.kv_heads * p.score_blocks));
  Selected out;
  out.blocks.assign(static_cast<size_t>(p.offsets.back()), -7);
  Selection<T> selection;
  selection.shape = p.shape;
  selection.q = q.data();
  selection.q_stride = q_stride;
  selection.kc = kc.data();
  selection.lse = lse.data();
  selection.position = p.position.data();
  selection.window_first = p.window_first.data();
  selection.offsets = p.offsets.data();
  selection.scores = scores.data();
  selection.score_blocks = p.score_blocks;
  selection.blocks = out.blocks.data();
  const int32_t longest =
      p.position.empty() ? 0 : *std::max_element(p.position.begin(), p.position.end());
  std::vector<T> scratch(static_cast<size_t>(ScratchElements(p.shape, longest)));
  for (int64_t row = 0; row < p.rows(); row += rows_per_call) {
    out.nan_rows +=
        table.select(selection, {row, std::min(row + rows_per_call, p.rows())}, scratch.data());
  }
  out.scores.assign(scores.begin(), scores.end());
  return out;
}

// Runs body(name, run) for the double table and every float table.
template <typename Body>
void ForTables(const Body& body) {
  body("double", [](const Problem& p, int64_t rows) { return Compute(DoubleKernels(), p, rows); });
  NamedTable tables[3];
  const int count = AvailableTables(tables);
  ASSERT_GE(count, 1);
  for (int i = 0; i < count; ++i) {
    const Table<float>* table = tables[i].table;
    body(tables[i].name,
         [table](const Problem& p, int64_t rows) { return Compute(*table, p, rows); });
  }
}
constexpr int64_t kAllRows = 1 << 20;

std::vector<int32_t> BlocksOf(const Problem& p, const Selected& s, int64_t row, int64_t group) {
  const size_t pair = static_cast<size_t>(row * p.shape.kv_heads + group);
  return {s.blocks.begin() + p.offsets[pair], s.blocks.begin() + p.offsets[pair + 1]};
}

// The paper's form: a double sum over m < B / r and n < l / r of the probability of window
// i B / r + m - n, where it exists.
double PaperScore(const Problem& p, int64_t row, int64_t group, int64_t block) {
  const Shape& s = p.shape;
  const int64_t windows = VisibleWindows(s, p.position[static_cast<size_t>(row)]);
  const int64_t group_size = s.heads / s.kv_heads;
  double sum = 0;
  for (int64_t h = group * group_size; h < (group + 1) * group_size; ++h) {
    const double lse = p.lse[static_cast<size_t>(row * s.heads + h)];
    for (int64_t m = 0; m < s.block / s.stride; ++m) {
      for (int64_t n = 0; n < s.kernel_size / s.stride; ++n) {
        const int64_t j = block * s.block / s.stride + m - n;
        if (j >= 0 && j < windows) sum += std::exp(Logit(p, row, h, j) - lse);
      }
    }
  }
  return sum;
}

// Forced blocks, then the best by (score descending, block ascending), ascending.
std::vector<int32_t> BestBlocks(const Shape& s, int64_t position,
                                const std::vector<double>& score) {
  const int64_t current = position / s.block;
  std::vector<int32_t> forced;
  std::vector<int32_t> others;
  for (int32_t i = 0; i <= current; ++i) {
    const bool must = i < s.init_blocks || i > current - s.local_blocks;
    (must ? forced : others).push_back(i);
  }
  std::sort(others.begin(), others.end(), [&](int32_t a, int32_t b) {
    const double x = score[static_cast<size_t>(a)];
    const double y = score[static_cast<size_t>(b)];
    return x != y ? x > y : a < b;
  });
  for (const int32_t block : others) {
    if (static_cast<int64_t>(forced.size()) < s.topk) forced.push_back(block);
  }
  std::sort(forced.begin(), forced.end());
  return forced;
}

TEST(BlockSelection, ScoresAreThePapersDoubleSum) {
  for (const Shape& shape : kShapes) {
    const Problem p = MakeProblem(shape, {37, 0, 1, 80, 9}, 1.0);
    ForTables([&](const std::string& name, const auto& run) {
      SCOPED_TRACE(name + " l " + std::to_string(shape.kernel_size));
      const double tolerance = name == "double" ? 1e-12 : 2e-5;
      const Selected got = run(p, kAllRows);
      double worst = 0;
      for (int64_t row = 0; row < p.rows(); ++row) {
        const int64_t current = p.position[static_cast<size_t>(row)] / shape.block;
        for (int64_t g = 0; g < shape.kv_heads; ++g) {
          for (int64_t i = 0; i < p.score_blocks; ++i) {
            const double expected = i <= current ? PaperScore(p, row, g, i) : 0.0;
            const size_t at = static_cast<size_t>((row * shape.kv_heads + g) * p.score_blocks + i);
            worst = std::max(worst, std::abs(got.scores[at] - expected));
          }
        }
      }
      EXPECT_LE(worst, tolerance);
      EXPECT_EQ(got.nan_rows, 0);
    });
  }
}

TEST(BlockSelection, ChoosesTheBestOfItsOwnScoresInEveryTable) {
  for (const Shape& shape : kShapes) {
    const Problem p = MakeProblem(shape, {37, 0, 1, 80, 9}, 1.0);
    ForTables([&](const std::string& name, const auto& run) {
      SCOPED_TRACE(name + " l " + std::to_string(shape.kernel_size));
      const Selected got = run(p, kAllRows);
      for (int64_t row = 0; row < p.rows(); ++row) {
        for (int64_t g = 0; g < shape.kv_heads; ++g) {
          const auto first = got.scores.begin() + (row * shape.kv_heads + g) * p.score_blocks;
          ASSERT_EQ(BlocksOf(p, got, row, g),
                    BestBlocks(shape, p.position[static_cast<size_t>(row)],
                               {first, first + p.score_blocks}))
              << "row " << row << " group " << g;
        }
      }
    });
  }
}

// Queries of zero give every window the same probability, so that whole blocks tie.
TEST(BlockSelection, TiesGoToTheLowestBlocks) {
  const Shape shape = MakeShape(4, 4, 8, 4, 0, 1);
  const Problem p = MakeProblem(shape, {100}, 0.0);
  ForTables([&](const std::string& name, const auto& run) {
    const Selected got = run(p, kAllRows);
    EXPECT_EQ(BlocksOf(p, got, 99, 0), (std::vector<int32_t>{0, 1, 2, 12})) << name;
    EXPECT_EQ(BlocksOf(p, got, 99, 1), (std::vector<int32_t>{0, 1, 2, 12})) << name;
    // Block 5 of row 47 is the current one.
    EXPECT_EQ(BlocksOf(p, got, 47, 1), (std::vector<int32_t>{0, 1, 2, 5})) << name;
  });
}

TEST(BlockSelection, NaNRanksBelowEveryNumberAndIsCounted) {
  const Shape shape = MakeShape(4, 4, 8, 3, 0, 1);
  Problem p = MakeProblem(shape, {48}, 0.0);
  // Windows 0 and 3 of key head 1: blocks 0 and 1.
  for (const int64_t window : {0, 3}) {
    p.kc[static_cast<size_t>((window * shape.kv_heads + 1) * shape.dim)] =
        std::numeric_limits<double>::quiet_NaN();
  }
  ForTables([&](const std::string& name, const auto& run) {
    const Selected got = run(p, kAllRows);
    EXPECT_EQ(BlocksOf(p, got, 47, 0), (std::vector<int32_t>{0, 1, 5})) << name;
    EXPECT_EQ(BlocksOf(p, got, 47, 1), (std::vector<int32_t>{2, 3, 5})) << name;
    // Two numbers are missing for row 31: one NaN has to do, the lower one.
    EXPECT_EQ(BlocksOf(p, got, 31, 1), (std::vector<int32_t>{0, 2, 3})) << name;
    EXPECT_EQ(got.nan_rows, 45) << name;  // rows 3 .. 47 of one key head
  });
}

TEST(BlockSelection, K3SameBitsForAnyCutOfTheRows) {
  for (const Shape& shape : kShapes) {
    const Problem p = MakeProblem(shape, {37, 3, 80}, 1.0);
    ForTables([&](const std::string& name, const auto& run) {
      const Selected whole = run(p, kAllRows);
      const Selected parts = run(p, 7);
      EXPECT_EQ(whole.blocks, parts.blocks) << name;
      EXPECT_EQ(whole.scores, parts.scores) << name;
    });
  }
}

// The last row of a document, alone, behind another document and with longer ones after it: what a
// decoder and a packed batch see.
TEST(BlockSelection, C2SameBitsAloneAndPacked) {
  const Shape shape = MakeShape(4, 2, 8, 3, 1, 1);
  const Problem alone = MakeProblem(shape, {75}, 1.0);
  Problem packed = MakeProblem(shape, {21, 75, 40}, 1.0);
  const size_t query_row = static_cast<size_t>(shape.heads * shape.dim);
  const size_t key_row = static_cast<size_t>(shape.kv_heads * shape.dim);
  std::copy(alone.q.begin(), alone.q.end(), packed.q.begin() + 21 * static_cast<long>(query_row));
  std::copy(alone.kc.begin(), alone.kc.end(),
            packed.kc.begin() + packed.window_first[21] * static_cast<long>(key_row));
  packed.lse.clear();
  FillLse(&packed);
  ForTables([&](const std::string& name, const auto& run) {
    const Selected a = run(alone, kAllRows);
    const Selected b = run(packed, kAllRows);
    for (int64_t row = 0; row < 75; ++row) {
      for (int64_t g = 0; g < shape.kv_heads; ++g) {
        ASSERT_EQ(BlocksOf(alone, a, row, g), BlocksOf(packed, b, row + 21, g)) << name;
        for (int64_t i = 0; i < alone.score_blocks; ++i) {
          ASSERT_EQ(
              a.scores[static_cast<size_t>((row * shape.kv_heads + g) * alone.score_blocks + i)],
              b.scores[static_cast<size_t>(((row + 21) * shape.kv_heads + g) * packed.score_blocks +
                                           i)])
              << name;
        }
      }
    }
  });
}

TEST(BlockSelection, K2VectorTablesGiveTheSameBits) {
  NamedTable tables[3];
  const int count = AvailableTables(tables);
  if (count < 3) GTEST_SKIP() << "this machine has no AVX-512";
  const Problem p = MakeProblem(MakeShape(4, 2, 8, 3, 1, 1), {37, 80}, 1.0);
  const Selected avx2 = Compute(*tables[1].table, p);
  const Selected avx512 = Compute(*tables[2].table, p);
  EXPECT_EQ(avx2.blocks, avx512.blocks);
  EXPECT_EQ(avx2.scores, avx512.scores);
}

TEST(BlockSelection, SkipsScoresThatDecideNothing) {
  const Shape shape = MakeShape(4, 2, 8, 5, 1, 1);
  const Problem p = MakeProblem(shape, {40}, 1.0);
  std::vector<int32_t> blocks(static_cast<size_t>(p.offsets.back()), -7);
  Selection<float> selection;  // q, kc and lse are null: five blocks are all there are
  selection.shape = shape;
  selection.position = p.position.data();
  selection.window_first = p.window_first.data();
  selection.offsets = p.offsets.data();
  selection.blocks = blocks.data();
  std::vector<float> scratch(static_cast<size_t>(ScratchElements(shape, 39)));
  EXPECT_EQ(FloatKernels().select(selection, {0, p.rows()}, scratch.data()), 0);
  EXPECT_EQ(blocks, Compute(FloatKernels(), p).blocks);
}

}  // namespace
}  // namespace heddle::kernels::block_selection
