// Random indexers over packed documents, with the attention they learn from, for the tests of the
// indexer's torch edge.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "model/attention/indexer.h"
#include "model/attention/key_sets.h"
#include "model/attention/sparse_attention.h"

namespace heddle::model_test {

namespace ki = kernels::indexer;
using namespace attention;  // NOLINT: what is tested

// ---- Documents and tensors ----------------------------------------------------------------------

struct Batch {
  std::vector<int32_t> cu = {0};
  std::vector<int32_t> positions;

  explicit Batch(const std::vector<int32_t>& lengths) {
    for (const int32_t length : lengths) {
      cu.push_back(cu.back() + length);
      for (int32_t t = 0; t < length; ++t) positions.push_back(t);
    }
  }
  int64_t rows() const { return cu.back(); }
  layers::Documents documents() const { return {cu, positions, rows()}; }
};

inline at::Tensor ToTensor(const std::vector<double>& values, at::IntArrayRef shape,
                           at::ScalarType type = at::kDouble) {
  const at::Tensor t = at::empty(shape, at::kDouble);
  EXPECT_EQ(static_cast<int64_t>(values.size()), t.numel());
  std::copy(values.begin(), values.end(), t.data_ptr<double>());
  return t.to(type);
}
inline std::vector<double> ToVector(const at::Tensor& t) {
  const at::Tensor wide = t.to(at::kDouble).contiguous();
  return {wide.data_ptr<double>(), wide.data_ptr<double>() + wide.numel()};
}
inline bool SameBits(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.contiguous();
  const at::Tensor y = b.contiguous();
  return x.sizes() == y.sizes() && x.scalar_type() == y.scalar_type() &&
         std::memcmp(x.data_ptr(), y.data_ptr(), x.nbytes()) == 0;
}
inline void ExpectNear(const std::vector<double>& a, const std::vector<double>& b, double tolerance,
                       const std::string& what) {
  ASSERT_EQ(a.size(), b.size()) << what;
  for (size_t i = 0; i < a.size(); ++i) {
    ASSERT_NEAR(a[i], b[i], tolerance * std::max(1.0, std::abs(b[i]))) << what << ' ' << i;
  }
}

struct Sizes {
  int64_t index_heads = 3;
  int64_t index_width = 20;
  int64_t heads = 4;
  int64_t kv_heads = 2;
  int64_t key_dim = 8;
  bool gsa = false;  // sigmoid, head bias, 1 / sqrt(dI)
  int levels = 0;    // > 0: multiples of 1 / levels, which makes ties
};

// Random inputs of an indexer and of the attention it learns from.
struct Example {
  Sizes sizes;
  Batch batch;
  IndexerInputs in;
  at::Tensor q_NHD, k_NJD;

  Example(const std::vector<int32_t>& lengths, const Sizes& s, at::ScalarType type,
          uint64_t seed = 1)
      : sizes(s), batch(lengths) {
    std::mt19937_64 engine(seed);
    std::normal_distribution<double> normal;
    const auto random = [&](at::IntArrayRef shape, int levels) {
      std::vector<double> values;
      for (int64_t i = 0; i < at::empty(shape).numel(); ++i) {
        const double v = normal(engine);
        values.push_back(levels > 0 ? std::round(v * levels) / levels : v);
      }
      return ToTensor(values, shape, type);
    };
    const int64_t rows = batch.rows();
    in.q_NHI = random({rows, s.index_heads, s.index_width}, s.levels);
    in.k_NI = random({rows, s.index_width}, s.levels);
    in.w_NH = random({rows, s.index_heads}, s.levels);
    if (s.gsa) {
      in.head_bias_H = random({s.index_heads}, 0);
      in.activation = ki::Activation::kSigmoid;
      in.score_scale = 1 / std::sqrt(static_cast<double>(s.index_width));
    }
    q_NHD = random({rows, s.heads, s.key_dim}, 0);
    k_NJD = random({rows, s.kv_heads, s.key_dim}, 0);
  }
  double scale() const { return 1 / std::sqrt(static_cast<double>(sizes.key_dim)); }
  layers::Documents documents() const { return batch.documents(); }
  KeySets Select(int32_t k, ki::TieBreak tie_break = ki::TieBreak::kOldest) const {
    return SelectKeys(in, documents(), std::vector<int32_t>(batch.positions.size(), k), tie_break);
  }
  // lse of attention over `sets`; null: all visible keys.
  at::Tensor Lse(const KeySets* sets) const {
    const at::Tensor lse_NH = at::empty({batch.rows(), sizes.heads}, in.q_NHI.options());
    const KeySets causal = CausalSets(documents());
    const at::Tensor out = at::empty_like(q_NHD);
    SparseAttention(scale(), sets != nullptr ? *sets : causal, q_NHD, k_NJD, k_NJD, out, lse_NH);
    return lse_NH;
  }
  KlTarget Target(const KeySets* sets) const { return {q_NHD, k_NJD, Lse(sets), scale(), sets}; }
};

// Lengths around tiles, blocks and k = 40: C9.
inline const std::vector<int32_t> kLengths = {0, 1, 40, 0, 41, 2, 33, 150, 0};

inline std::vector<int32_t> Row(const KeySets& sets, int64_t row) {
  return {sets.first.begin() + sets.offsets[static_cast<size_t>(row)],
          sets.first.begin() + sets.offsets[static_cast<size_t>(row) + 1]};
}

inline std::vector<Sizes> AllSizes() {
  Sizes relu;
  Sizes ties;
  ties.index_width = 3;
  ties.levels = 1;
  Sizes gsa;
  gsa.gsa = true;
  gsa.index_heads = 4;
  gsa.index_width = 16;
  gsa.kv_heads = 1;
  return {relu, ties, gsa};
}

}  // namespace heddle::model_test
