// Documents, key sets and tensors for tests of attention over key sets, and its reference.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/sparse_attention/reference.h"
#include "model/attention/key_sets.h"

namespace heddle::attention::sets_test {

inline constexpr double kInfinity = std::numeric_limits<double>::infinity();

// ---- Documents, sets, tensors ------------------------------------------------------------------

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
  layers::Documents documents() const {
    int64_t longest = 0;
    for (const int32_t t : positions) longest = std::max<int64_t>(longest, t + 1);
    return {cu, positions, longest};
  }
};

// Up to `k` random keys of each (row, set head), never of the future.
inline KeySets RandomTokens(const Batch& batch, int64_t set_heads, int64_t k,
                            std::mt19937* random) {
  std::vector<int64_t> offsets = {0};
  std::vector<int32_t> selected;
  for (int64_t row = 0; row < batch.rows(); ++row) {
    const int32_t visible = batch.positions[static_cast<size_t>(row)] + 1;
    for (int64_t g = 0; g < set_heads; ++g) {
      std::vector<int32_t> keys(static_cast<size_t>(visible));
      std::iota(keys.begin(), keys.end(), static_cast<int32_t>(row) - visible + 1);
      std::shuffle(keys.begin(), keys.end(), *random);
      // Now and then an empty set.
      const int64_t count = (*random)() % 8 == 0 ? 0 : std::min<int64_t>(k, visible);
      std::sort(keys.begin(), keys.begin() + count);
      selected.insert(selected.end(), keys.begin(), keys.begin() + count);
      offsets.push_back(static_cast<int64_t>(selected.size()));
    }
  }
  return TokenSets(batch.documents(), std::move(offsets), std::move(selected));
}

// Blocks of B keys as NSA selects them: the first, the row's own and some between, per key head.
inline KeySets RandomBlocks(const Batch& batch, int64_t set_heads, int32_t width,
                            std::mt19937* random) {
  KeySets sets;
  sets.set_heads = set_heads;
  sets.width = width;
  sets.offsets = {0};
  for (int64_t row = 0; row < batch.rows(); ++row) {
    const int32_t t = batch.positions[static_cast<size_t>(row)];
    const int32_t start = static_cast<int32_t>(row) - t;
    sets.end.push_back(static_cast<int32_t>(row) + 1);
    for (int64_t g = 0; g < set_heads; ++g) {
      for (int32_t block = 0; block <= t / width; ++block) {
        const bool forced = block == 0 || block == t / width;
        if (forced || (*random)() % 3 == 0) sets.first.push_back(start + block * width);
      }
      sets.offsets.push_back(static_cast<int64_t>(sets.first.size()));
    }
  }
  return sets;
}

// The sets of rows [first, first + count) alone.
inline KeySets Slice(const KeySets& sets, int64_t first, int64_t count) {
  KeySets part;
  part.set_heads = sets.set_heads;
  part.width = sets.width;
  const size_t begin = static_cast<size_t>(first * sets.set_heads);
  const size_t end = static_cast<size_t>((first + count) * sets.set_heads);
  const int32_t shift = static_cast<int32_t>(first);
  for (size_t at = begin; at <= end; ++at) {
    part.offsets.push_back(sets.offsets[at] - sets.offsets[begin]);
  }
  for (int64_t i = sets.offsets[begin]; i < sets.offsets[end]; ++i) {
    part.first.push_back(sets.first[static_cast<size_t>(i)] - shift);
  }
  for (int64_t row = first; row < first + count; ++row) {
    part.end.push_back(sets.end[static_cast<size_t>(row)] - shift);
  }
  return part;
}

struct Widths {
  int64_t heads = 4;
  int64_t kv_heads = 2;
  int64_t key_dim = 8;
  int64_t value_dim = 8;
  double scale() const { return 1.0 / std::sqrt(static_cast<double>(key_dim)); }
};

inline at::Tensor ToTensor(const std::vector<double>& values, int64_t heads, int64_t width,
                           at::ScalarType type) {
  const int64_t rows = static_cast<int64_t>(values.size()) / (heads * width);
  const at::Tensor t = at::empty({rows, heads, width}, at::kDouble);
  std::copy(values.begin(), values.end(), t.data_ptr<double>());
  return t.to(type);
}
inline std::vector<double> ToVector(const at::Tensor& t) {
  const at::Tensor wide = t.to(at::kDouble).contiguous();
  return {wide.data_ptr<double>(), wide.data_ptr<double>() + wide.numel()};
}
// A NaN shows an element that nobody wrote.
inline at::Tensor Blank(at::IntArrayRef shape, at::ScalarType type) {
  return at::full(shape, std::numeric_limits<double>::quiet_NaN(), type);
}

struct Inputs {
  at::Tensor q, k, v, dout;  // [N, H, Dk], [M, J, Dk], [M, J, Dv], [N, H, Dv]
};

inline std::vector<double> Normal(int64_t count, std::mt19937* random) {
  std::normal_distribution<double> normal;
  std::vector<double> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(normal(*random));
  return values;
}

inline Inputs RandomInputs(const Widths& w, int64_t rows, int64_t keys, at::ScalarType type,
                           std::mt19937* random) {
  const auto tensor = [&](int64_t n, int64_t heads, int64_t width) {
    return ToTensor(Normal(n * heads * width, random), heads, width, type);
  };
  return {tensor(rows, w.heads, w.key_dim), tensor(keys, w.kv_heads, w.key_dim),
          tensor(keys, w.kv_heads, w.value_dim), tensor(rows, w.heads, w.value_dim)};
}

struct Outputs {
  at::Tensor out, lse, dq, dk, dv;
};
struct Named {
  const char* name;
  const at::Tensor& tensor;
};
inline std::vector<Named> All(const Outputs& o) {
  return {{"out", o.out}, {"lse", o.lse}, {"dq", o.dq}, {"dk", o.dk}, {"dv", o.dv}};
}

inline Outputs Reference(double scale, const KeySets& sets, const Inputs& in) {
  namespace ks = kernels::sparse_attention;
  const at::Tensor q = in.q.to(at::kDouble).contiguous();
  const at::Tensor k = in.k.to(at::kDouble).contiguous();
  const at::Tensor v = in.v.to(at::kDouble).contiguous();
  const at::Tensor dout = in.dout.to(at::kDouble).contiguous();
  const Outputs o = {Blank(dout.sizes(), at::kDouble), Blank({q.size(0), q.size(1)}, at::kDouble),
                     Blank(q.sizes(), at::kDouble), Blank(k.sizes(), at::kDouble),
                     Blank(v.sizes(), at::kDouble)};
  const at::Tensor delta = Blank(o.lse.sizes(), at::kDouble);
  ks::Problem<double> p;
  p.heads = q.size(1);
  p.kv_heads = k.size(1);
  p.key_dim = q.size(2);
  p.value_dim = v.size(2);
  p.scale = scale;
  p.sets = sets.view();
  p.q = q.data_ptr<double>();
  p.k = k.data_ptr<double>();
  p.v = v.data_ptr<double>();
  p.q_stride = q.size(1) * q.size(2);
  p.k_stride = k.size(1) * k.size(2);
  p.v_stride = v.size(1) * v.size(2);
  ks::ReferenceForward({p, o.out.data_ptr<double>(), o.lse.data_ptr<double>()}, q.size(0),
                       k.size(0));
  ks::ReferenceBackward({p, o.out.data_ptr<double>(), o.lse.data_ptr<double>(),
                         dout.data_ptr<double>(), delta.data_ptr<double>(), o.dq.data_ptr<double>(),
                         o.dk.data_ptr<double>(), o.dv.data_ptr<double>()},
                        q.size(0), k.size(0));
  return o;
}

// Relative to the largest value of the tensor. -inf (lse of an empty set) must be met exactly.
inline void ExpectClose(const at::Tensor& got, const at::Tensor& expected, double tolerance,
                        const std::string& what) {
  ASSERT_EQ(got.sizes(), expected.sizes()) << what;
  const std::vector<double> a = ToVector(got);
  const std::vector<double> b = ToVector(expected);
  double largest = 1e-3;
  for (const double x : b) {
    if (std::isfinite(x)) largest = std::max(largest, std::abs(x));
  }
  for (size_t i = 0; i < a.size(); ++i) {
    if (a[i] == b[i]) continue;
    ASSERT_LE(std::abs(a[i] - b[i]), tolerance * largest) << what << " element " << i;
  }
}
inline void ExpectClose(const Outputs& got, const Outputs& expected, double tolerance,
                        const std::string& what) {
  const std::vector<Named> a = All(got), b = All(expected);
  for (size_t i = 0; i < a.size(); ++i) {
    ExpectClose(a[i].tensor, b[i].tensor, tolerance, what + " " + a[i].name);
  }
}

inline bool SameBits(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.contiguous(), y = b.contiguous();
  return x.sizes() == y.sizes() && x.scalar_type() == y.scalar_type() &&
         std::memcmp(x.data_ptr(), y.data_ptr(),
                     static_cast<size_t>(x.numel() * x.element_size())) == 0;
}
inline void ExpectSameBits(const Outputs& a, const Outputs& b, const std::string& what) {
  const std::vector<Named> x = All(a), y = All(b);
  for (size_t i = 0; i < x.size(); ++i) {
    EXPECT_TRUE(SameBits(x[i].tensor, y[i].tensor)) << what << " " << x[i].name;
  }
}

struct NamedSets {
  std::string name;
  KeySets sets;
};
inline std::vector<NamedSets> SetsOf(const Batch& batch, int64_t kv_heads, std::mt19937* random) {
  const layers::Documents documents = batch.documents();
  return {{"causal", CausalSets(documents)},
          {"window 6 + 2", WindowSets(documents, {6, 2})},
          {"window 64", WindowSets(documents, {64, 0})},
          {"tokens", RandomTokens(batch, 1, 12, random)},
          {"tokens per head", RandomTokens(batch, kv_heads, 70, random)},
          {"blocks", RandomBlocks(batch, kv_heads, 8, random)}};
}

inline const std::vector<Widths> kWidths = {
    {4, 2, 8, 8}, {3, 3, 24, 16}, {6, 2, 64, 40}, {5, 1, 20, 80}};
// C9: lengths zero and one, a batch of nothing, documents around blocks of rows and tiles of keys.
inline const std::vector<std::vector<int32_t>> kBatches = {
    {}, {0}, {1}, {0, 3, 0, 1, 0}, {40}, {5, 6, 7, 8, 9}, {33, 0, 64, 65, 1}, {130}};

// Calls body(batch, widths, random) for all of them; failures print the seed.
template <typename Body>
void ForCases(const Body& body) {
  unsigned seed = 1;
  for (const std::vector<int32_t>& lengths : kBatches) {
    for (const Widths& w : kWidths) {
      SCOPED_TRACE("seed " + std::to_string(seed) + " D " + std::to_string(w.key_dim));
      std::mt19937 random(seed++);
      body(Batch(lengths), w, &random);
    }
  }
}

}  // namespace heddle::attention::sets_test
