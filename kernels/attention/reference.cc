#include "kernels/attention/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

namespace heddle::kernels::attention {
namespace {

double Dot(const double* a, const double* b, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

void AddScaled(double factor, const double* from, double* to, int64_t size) {
  for (int64_t i = 0; i < size; ++i) to[i] += factor * from[i];
}

// Calls body(row of the query, head, key head, first row of the document, position).
template <typename Body>
void ForQueries(const Shape& shape, const Body& body) {
  const int64_t group = shape.heads / shape.kv_heads;
  for (int64_t b = 0; b < shape.documents; ++b) {
    const int64_t first = shape.cu_seqlens[b];
    for (int64_t t = 0; t < shape.cu_seqlens[b + 1] - first; ++t) {
      for (int64_t h = 0; h < shape.heads; ++h) body(first + t, h, h / group, first, t);
    }
  }
}

}  // namespace

bool Visible(const Shape& shape, int64_t query, int64_t key) {
  if (key > query) return false;
  return shape.window == 0 || query - key < shape.window || key < shape.sinks;
}

void ReferenceForward(const Shape& shape, const double* q, const double* k, const double* v,
                      double* out, double* lse) {
  const int64_t dk = shape.key_dim;
  const int64_t dv = shape.value_dim;
  ForQueries(shape, [&](int64_t row, int64_t h, int64_t j, int64_t first, int64_t t) {
    const double* query = q + (row * shape.heads + h) * dk;
    std::vector<double> scores(static_cast<size_t>(t + 1),
                               -std::numeric_limits<double>::infinity());
    for (int64_t s = 0; s <= t; ++s) {
      if (!Visible(shape, t, s)) continue;
      scores[static_cast<size_t>(s)] =
          shape.scale * Dot(query, k + ((first + s) * shape.kv_heads + j) * dk, dk);
    }
    const double maximum = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (const double score : scores) sum += std::exp(score - maximum);
    lse[row * shape.heads + h] = maximum + std::log(sum);
    double* to = out + (row * shape.heads + h) * dv;
    std::fill_n(to, dv, 0.0);
    for (int64_t s = 0; s <= t; ++s) {
      if (!Visible(shape, t, s)) continue;
      const double p = std::exp(scores[static_cast<size_t>(s)] - maximum) / sum;
      AddScaled(p, v + ((first + s) * shape.kv_heads + j) * dv, to, dv);
    }
  });
}

void ReferenceBackward(const Shape& shape, const double* q, const double* k, const double* v,
                       const double* out, const double* lse, const double* dout, double* dq,
                       double* dk_out, double* dv_out) {
  const int64_t dk = shape.key_dim;
  const int64_t dv = shape.value_dim;
  const int64_t rows = shape.cu_seqlens[shape.documents];
  std::fill_n(dq, rows * shape.heads * dk, 0.0);
  std::fill_n(dk_out, rows * shape.kv_heads * dk, 0.0);
  std::fill_n(dv_out, rows * shape.kv_heads * dv, 0.0);
  ForQueries(shape, [&](int64_t row, int64_t h, int64_t j, int64_t first, int64_t t) {
    const int64_t at = row * shape.heads + h;
    const double* g = dout + at * dv;
    const double delta = Dot(g, out + at * dv, dv);
    for (int64_t s = 0; s <= t; ++s) {
      if (!Visible(shape, t, s)) continue;
      const int64_t key = (first + s) * shape.kv_heads + j;
      const double p = std::exp(shape.scale * Dot(q + at * dk, k + key * dk, dk) - lse[at]);
      const double ds = shape.scale * p * (Dot(g, v + key * dv, dv) - delta);
      AddScaled(p, g, dv_out + key * dv, dv);
      AddScaled(ds, k + key * dk, dq + at * dk, dk);
      AddScaled(ds, q + at * dk, dk_out + key * dk, dk);
    }
  });
}

}  // namespace heddle::kernels::attention
