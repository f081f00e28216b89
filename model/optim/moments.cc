#include "model/optim/moments.h"

#include <algorithm>
#include <span>

namespace heddle::optim {

void MomentArrays::Allocate(const Hyperparameters& hyper, int64_t elements) {
  type_ = hyper.moments;
  second_ = hyper.algorithm == Algorithm::kAdamW;
  for (int i = 0; i < (second_ ? 2 : 1); ++i) {
    if (type_ == Moments::kBf16) {
      bf16_[i].assign(static_cast<size_t>(elements), 0);
    } else {
      fp32_[i].assign(static_cast<size_t>(elements), 0.0f);
    }
  }
}

void MomentArrays::Zero() {
  for (std::vector<float>& values : fp32_) std::fill(values.begin(), values.end(), 0.0f);
  for (std::vector<uint16_t>& values : bf16_) std::fill(values.begin(), values.end(), uint16_t{0});
}

void MomentArrays::Attach(int64_t offset, Shard* shard) {
  const size_t first = static_cast<size_t>(offset);
  const size_t size = shard->master.size();
  if (type_ == Moments::kBf16) {
    shard->m_bf16 = std::span(bf16_[0]).subspan(first, size);
    if (second_) shard->v_bf16 = std::span(bf16_[1]).subspan(first, size);
  } else {
    shard->m = std::span(fp32_[0]).subspan(first, size);
    if (second_) shard->v = std::span(fp32_[1]).subspan(first, size);
  }
}

void* MomentArrays::At(bool second, int64_t offset) {
  const size_t which = second ? 1 : 0;
  return type_ == Moments::kBf16 ? static_cast<void*>(bf16_[which].data() + offset)
                                 : static_cast<void*>(fp32_[which].data() + offset);
}

}  // namespace heddle::optim
