#include "kernels/sparse_attention/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace heddle::kernels::sparse_attention {
namespace {

double Dot(const double* a, const double* b, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

void AddScaled(double factor, const double* from, double* to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] += factor * from[i];
}

const double* Query(const Problem<double>& p, int64_t row, int64_t h) {
  return p.q + row * p.q_stride + h * p.key_dim;
}
const double* Key(const Problem<double>& p, int64_t key, int64_t j) {
  return p.k + key * p.k_stride + j * p.key_dim;
}
const double* Value(const Problem<double>& p, int64_t key, int64_t j) {
  return p.v + key * p.v_stride + j * p.value_dim;
}

// Calls body(row, head, key head, its keys ascending).
template <typename Body>
void ForQueries(const Problem<double>& p, int64_t rows, int64_t keys, const Body& body) {
  const int64_t group = p.heads / p.kv_heads;
  for (int64_t row = 0; row < rows; ++row) {
    for (int64_t h = 0; h < p.heads; ++h) {
      const int64_t j = h / group;
      std::vector<int64_t> set;
      for (int64_t key = 0; key < keys; ++key) {
        if (InSet(p.sets, row, p.sets.set_heads == 1 ? 0 : j, key)) set.push_back(key);
      }
      body(row, h, j, set);
    }
  }
}

}  // namespace

bool InSet(const KeySets& sets, int64_t row, int64_t set_head, int64_t key) {
  if (key >= sets.end[row]) return false;
  const int64_t at = row * sets.set_heads + set_head;
  for (int64_t i = sets.offsets[at]; i < sets.offsets[at + 1]; ++i) {
    const int64_t first = sets.first[i];
    if (key >= first && key < first + sets.width) return true;
  }
  return false;
}

void ReferenceForward(const Forward<double>& f, int64_t rows, int64_t keys) {
  const Problem<double>& p = f.problem;
  const auto query = [&](int64_t row, int64_t h, int64_t j, const std::vector<int64_t>& set) {
    double* out = f.out + (row * p.heads + h) * p.value_dim;
    double* lse = f.lse + row * p.heads + h;
    std::fill_n(out, p.value_dim, 0.0);
    *lse = -std::numeric_limits<double>::infinity();
    if (set.empty()) return;
    std::vector<double> scores;
    for (const int64_t key : set) {
      scores.push_back(p.scale * Dot(Query(p, row, h), Key(p, key, j), p.key_dim));
    }
    const double maximum = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (const double score : scores) sum += std::exp(score - maximum);
    *lse = maximum + std::log(sum);
    for (size_t i = 0; i < set.size(); ++i) {
      AddScaled(std::exp(scores[i] - maximum) / sum, Value(p, set[i], j), out, p.value_dim);
    }
  };
  ForQueries(p, rows, keys, query);
}

void ReferenceBackward(const Backward<double>& b, int64_t rows, int64_t keys) {
  const Problem<double>& p = b.problem;
  std::fill_n(b.dq, rows * p.heads * p.key_dim, 0.0);
  std::fill_n(b.dk, keys * p.kv_heads * p.key_dim, 0.0);
  std::fill_n(b.dv, keys * p.kv_heads * p.value_dim, 0.0);
  const auto query = [&](int64_t row, int64_t h, int64_t j, const std::vector<int64_t>& set) {
    const int64_t at = row * p.heads + h;
    const double* g = b.dout + at * p.value_dim;
    b.delta[at] = Dot(g, b.out + at * p.value_dim, p.value_dim);
    for (const int64_t key : set) {
      const double score = p.scale * Dot(Query(p, row, h), Key(p, key, j), p.key_dim);
      const double probability = std::exp(score - b.lse[at]);
      const double d_score =
          p.scale * probability * (Dot(g, Value(p, key, j), p.value_dim) - b.delta[at]);
      AddScaled(probability, g, b.dv + (key * p.kv_heads + j) * p.value_dim, p.value_dim);
      AddScaled(d_score, Key(p, key, j), b.dq + at * p.key_dim, p.key_dim);
      AddScaled(d_score, Query(p, row, h), b.dk + (key * p.kv_heads + j) * p.key_dim, p.key_dim);
    }
  };
  ForQueries(p, rows, keys, query);
}

}  // namespace heddle::kernels::sparse_attention
