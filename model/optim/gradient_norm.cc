#include "model/optim/gradient_norm.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "kernels/adamw/params.h"

namespace heddle::optim {
namespace {

// One partial sum per block, added in order: independent of the number of threads.
constexpr int64_t kBlock = 64 * 1024;

}  // namespace

GradientStats MeasureGradients(std::span<const float> gradients) {
  const int64_t size = static_cast<int64_t>(gradients.size());
  const int64_t blocks = (size + kBlock - 1) / kBlock;
  std::vector<kernels::adamw::Stats> parts(static_cast<size_t>(blocks));
  const kernels::adamw::Table& kernels = kernels::adamw::Kernels();
  at::parallel_for(0, blocks, 1, [&](int64_t from, int64_t to) {
    for (int64_t block = from; block < to; ++block) {
      const int64_t begin = block * kBlock;
      parts[static_cast<size_t>(block)] =
          kernels.measure(gradients.data() + begin, std::min(kBlock, size - begin));
    }
  });
  GradientStats stats;
  for (const kernels::adamw::Stats& part : parts) {
    stats.sum_of_squares += part.sum_of_squares;
    stats.non_finite += part.non_finite;
  }
  return stats;
}

double ClipDivisor(double norm, double clip) {
  if (clip <= 0.0) return 1.0;
  return std::max(1.0, norm / clip);
}

}  // namespace heddle::optim
