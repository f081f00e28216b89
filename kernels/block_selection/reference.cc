// The selection in double with plain loops: the oracle of the float tables and the arithmetic of
// the fp64 model.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/block_selection/tables.h"

namespace heddle::kernels::block_selection {
namespace {

double Dot(const double* a, const double* b, int64_t width) {
  double sum = 0;
  for (int64_t i = 0; i < width; ++i) sum += a[i] * b[i];
  return sum;
}

// Probability of each visible window, summed over the heads of a group.
void WindowProbabilities(const Selection<double>& p, int64_t row, int64_t group, int64_t windows,
                         double* probability) {
  const Shape& s = p.shape;
  const int64_t group_size = s.heads / s.kv_heads;
  for (int64_t j = 0; j < windows; ++j) {
    const double* key = p.kc + ((p.window_first[row] + j) * s.kv_heads + group) * s.dim;
    double sum = 0;
    for (int64_t h = group * group_size; h < (group + 1) * group_size; ++h) {
      const double* query = p.q + row * p.q_stride + h * s.dim;
      sum += std::exp(s.scale * Dot(query, key, s.dim) - p.lse[row * s.heads + h]);
    }
    probability[j] = sum;
  }
}

int64_t Overlap(int64_t begin, int64_t end, int64_t other_begin, int64_t other_end) {
  return std::max<int64_t>(0, std::min(end, other_end) - std::max(begin, other_begin));
}

void BlockScores(const Shape& s, const double* probability, int64_t windows, int64_t blocks,
                 double* score) {
  std::fill_n(score, blocks, 0.0);
  for (int64_t j = 0; j < windows; ++j) {
    const int64_t begin = j * s.stride;
    const int64_t end = begin + s.kernel_size;
    for (int64_t i = begin / s.block; i <= (end - 1) / s.block; ++i) {
      const int64_t tokens = Overlap(begin, end, i * s.block, (i + 1) * s.block);
      score[i] += probability[j] * static_cast<double>(tokens / s.stride);
    }
  }
}

// Descending, NaN last; equal values are neither before nor after each other.
bool Before(double a, double b) { return std::isnan(b) ? !std::isnan(a) : a > b; }

void ChooseBlocks(const Shape& s, const double* score, int64_t candidates, int64_t count,
                  int32_t* chosen) {
  std::vector<int32_t> order;
  const auto forced = [&](int64_t i) {
    return i < s.init_blocks || i >= candidates - s.local_blocks;
  };
  for (int64_t i = 0; i < candidates; ++i) order.push_back(static_cast<int32_t>(i));
  std::stable_sort(order.begin(), order.end(), [&](int32_t a, int32_t b) {
    if (forced(a) != forced(b)) return forced(a);
    return Before(score[a], score[b]);
  });
  std::copy_n(order.begin(), count, chosen);
  std::sort(chosen, chosen + count);
}

int64_t SelectReference(const Selection<double>& p, Rows rows, double* /*scratch*/) {
  const Shape& s = p.shape;
  int64_t nan_rows = 0;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    const int64_t windows = VisibleWindows(s, p.position[row]);
    const int64_t candidates = p.position[row] / s.block + 1;
    const int64_t count = ChosenBlocks(s, p.position[row]);
    std::vector<double> probability(static_cast<size_t>(windows));
    std::vector<double> score(static_cast<size_t>(candidates));
    for (int64_t g = 0; g < s.kv_heads; ++g) {
      const int64_t pair = row * s.kv_heads + g;
      const bool wanted = count < candidates || p.scores != nullptr;
      if (wanted) {
        WindowProbabilities(p, row, g, windows, probability.data());
        BlockScores(s, probability.data(), windows, candidates, score.data());
      }
      if (wanted &&
          std::any_of(score.begin(), score.end(), [](double v) { return std::isnan(v); })) {
        ++nan_rows;
      }
      ChooseBlocks(s, score.data(), candidates, count, p.blocks + p.offsets[pair]);
      if (p.scores == nullptr) continue;
      double* out = p.scores + pair * p.score_blocks;
      std::fill_n(out, p.score_blocks, 0.0);
      std::copy(score.begin(), score.end(), out);
    }
  }
  return nan_rows;
}

}  // namespace

const Table<double> kReference = {SelectReference};

}  // namespace heddle::kernels::block_selection
