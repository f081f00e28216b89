#include "kernels/indexer/reference.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <vector>

namespace heddle::kernels::indexer {
namespace {

double Dot(const double* a, const double* b, int64_t size) {
  double sum = 0;
  for (int64_t i = 0; i < size; ++i) sum += a[i] * b[i];
  return sum;
}

double Argument(const Scores<double>& p, int64_t row, int64_t head, int64_t key) {
  const double* q = p.q + (row * p.heads + head) * p.width;
  return p.score_scale * Dot(q, p.k + key * p.width, p.width) +
         (p.head_bias != nullptr ? p.head_bias[head] : 0.0);
}

struct Activated {
  double value;
  double slope;
};
Activated Activate(Activation activation, double z) {
  if (activation == Activation::kSigmoid) {
    const double s = 1 / (1 + std::exp(-z));
    return {s, s * (1 - s)};
  }
  if (std::isnan(z)) return {z, z};
  return {std::max(z, 0.0), z > 0 ? 1.0 : 0.0};
}

double Score(const Scores<double>& p, int64_t row, int64_t key) {
  double sum = 0;
  for (int64_t j = 0; j < p.heads; ++j) {
    sum += p.w[row * p.heads + j] * Activate(p.activation, Argument(p, row, j, key)).value;
  }
  return sum;
}

double LogSumExp(const std::vector<double>& x) {
  const double maximum = *std::max_element(x.begin(), x.end());
  double sum = 0;
  for (const double v : x) sum += std::exp(v - maximum);
  return maximum + std::log(sum);
}

std::vector<int64_t> KeysOf(const Kl<double>& p, int64_t row) {
  std::vector<int64_t> keys;
  if (p.offsets == nullptr) {
    keys.resize(static_cast<size_t>(ReferenceVisible(p.scores, row)));
    std::iota(keys.begin(), keys.end(), p.scores.first[row]);
  } else {
    keys.assign(p.selected + p.offsets[row], p.selected + p.offsets[row + 1]);
  }
  return keys;
}

double Target(const Kl<double>& p, int64_t row, int64_t key) {
  const int64_t group = p.attention_heads / p.kv_heads;
  double sum = 0;
  for (int64_t h = 0; h < p.attention_heads; ++h) {
    const double* q = p.attention_q + row * p.q_stride + h * p.key_dim;
    const double* k = p.attention_k + key * p.k_stride + h / group * p.key_dim;
    sum += std::exp(p.attention_scale * Dot(q, k, p.key_dim) - p.lse[row * p.attention_heads + h]);
  }
  return sum / static_cast<double>(p.attention_heads);
}

// Adds the gradients of one pair, d = dL/dI.
void AddPair(const Kl<double>& p, int64_t row, int64_t key, double d) {
  const Scores<double>& s = p.scores;
  for (int64_t j = 0; j < s.heads; ++j) {
    const int64_t at = row * s.heads + j;
    const Activated a = Activate(s.activation, Argument(s, row, j, key));
    const double dz = d * s.w[at] * a.slope;
    p.dw[at] += d * a.value;
    if (p.dhead_bias != nullptr) p.dhead_bias[at] += dz;
    for (int64_t i = 0; i < s.width; ++i) {
      p.dq[at * s.width + i] += dz * s.score_scale * s.k[key * s.width + i];
      p.dk[key * s.width + i] += dz * s.score_scale * s.q[at * s.width + i];
    }
  }
}

}  // namespace

int64_t ReferenceVisible(const Scores<double>& p, int64_t row) {
  const int64_t last = p.last != nullptr ? p.last[row] : row;
  return std::max<int64_t>(last - p.first[row] + 1, 0);
}

void ReferenceRowScores(const Scores<double>& p, int64_t row, double* out) {
  const int64_t visible = ReferenceVisible(p, row);
  for (int64_t i = 0; i < visible; ++i) out[i] = Score(p, row, p.first[row] + i);
}

void ReferenceTopK(const double* scores, int64_t visible, int64_t count, TieBreak tie_break,
                   int32_t* positions) {
  std::vector<int32_t> order(static_cast<size_t>(visible));
  std::iota(order.begin(), order.end(), 0);
  if (tie_break == TieBreak::kNewest) std::reverse(order.begin(), order.end());
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    if (std::isnan(scores[b])) return !std::isnan(scores[a]);
    return scores[a] > scores[b];
  });
  std::sort(order.begin(), order.begin() + count);
  std::copy_n(order.begin(), count, positions);
}

void ReferenceSelect(const Select<double>& p, Rows rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t visible = ReferenceVisible(p.scores, row);
    std::vector<double> scores(static_cast<size_t>(visible));
    ReferenceRowScores(p.scores, row, scores.data());
    int32_t* to = p.selected + p.offsets[row];
    const int64_t count = p.offsets[row + 1] - p.offsets[row];
    ReferenceTopK(scores.data(), visible, count, p.tie_break, to);
    for (int64_t i = 0; i < count; ++i) to[i] += p.scores.first[row];
  }
}

void ReferenceStatistics(const Statistics<double>& p, Rows rows) {
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    std::vector<double> x(static_cast<size_t>(ReferenceVisible(p.scores, row)));
    ReferenceRowScores(p.scores, row, x.data());
    const double count = static_cast<double>(x.size());
    double mean = 0;
    for (const double v : x) mean += v / count;
    double variance = 0;
    for (const double v : x) variance += (v - mean) * (v - mean) / count;
    double entropy = 0;
    double maximum = -std::numeric_limits<double>::infinity();
    if (!x.empty()) {
      const double lse = LogSumExp(x);
      for (const double v : x) entropy += std::exp(v - lse) * (lse - v);
      maximum = *std::max_element(x.begin(), x.end());
    }
    if (p.mean != nullptr) p.mean[row] = mean;
    if (p.variance != nullptr) p.variance[row] = variance;
    if (p.maximum != nullptr) p.maximum[row] = maximum;
    if (p.entropy != nullptr) p.entropy[row] = entropy;
  }
}

void ReferenceKl(const Kl<double>& p, int64_t rows) {
  const Scores<double>& s = p.scores;
  const bool backward = p.dq != nullptr;
  if (backward) {
    std::fill_n(p.dq, rows * s.heads * s.width, 0.0);
    std::fill_n(p.dw, rows * s.heads, 0.0);
    std::fill_n(p.dk, rows * s.width, 0.0);
    if (p.dhead_bias != nullptr) std::fill_n(p.dhead_bias, rows * s.heads, 0.0);
  }
  for (int64_t row = 0; row < rows; ++row) {
    const std::vector<int64_t> keys = KeysOf(p, row);
    p.loss[row] = 0;
    if (p.lse_scores != nullptr) p.lse_scores[row] = -std::numeric_limits<double>::infinity();
    if (keys.empty()) continue;
    std::vector<double> x;
    for (const int64_t key : keys) x.push_back(Score(s, row, key) / p.temperature);
    const double lse = LogSumExp(x);
    if (p.lse_scores != nullptr) p.lse_scores[row] = lse;
    for (size_t i = 0; i < keys.size(); ++i) {
      const double target = Target(p, row, keys[i]);
      if (target > 0) p.loss[row] += target * (std::log(target) - (x[i] - lse));
      if (!backward) continue;
      AddPair(p, row, keys[i], p.row_weight / p.temperature * (std::exp(x[i] - lse) - target));
    }
  }
}

}  // namespace heddle::kernels::indexer
