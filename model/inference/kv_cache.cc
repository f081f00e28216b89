#include "model/inference/kv_cache.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>

namespace heddle::inference {
namespace {

constexpr int64_t kFirstRows = 64;

}  // namespace

struct KvCache::Buffers {
  at::Tensor keys;  // [capacity, J, D]
  at::Tensor values;
  int64_t capacity = 0;
};

KvCache::KvCache(int64_t kv_heads, int64_t head_dim, int64_t window, int64_t sinks,
                 c10::ScalarType type)
    : kv_heads_(kv_heads),
      head_dim_(head_dim),
      window_(window),
      sinks_(sinks),
      type_(type),
      buffers_(std::make_unique<Buffers>()) {
  if (window_ > 0) Reserve(window_ + sinks_);
}
KvCache::~KvCache() = default;

int64_t KvCache::RowOf(int64_t position) const {
  if (window_ == 0 || position < sinks_) return position;
  return sinks_ + (position - sinks_) % window_;
}

int64_t KvCache::rows() const {
  return window_ == 0 ? length_ : std::min(length_, window_ + sinks_);
}

int64_t KvCache::bytes() const {
  const int64_t held = window_ == 0 ? length_ : window_ + sinks_;
  return held * kv_heads_ * 2 * head_dim_ * static_cast<int64_t>(c10::elementSize(type_));
}

void KvCache::Reserve(int64_t rows) {
  if (rows <= buffers_->capacity) return;
  const int64_t capacity =
      window_ > 0 ? rows : std::max({rows, 2 * buffers_->capacity, kFirstRows});
  const auto grow = [&](at::Tensor* buffer) {
    const at::Tensor bigger = at::empty({capacity, kv_heads_, head_dim_}, type_);
    if (buffer->defined()) bigger.narrow(0, 0, buffers_->capacity).copy_(*buffer);
    *buffer = bigger;
  };
  grow(&buffers_->keys);
  grow(&buffers_->values);
  buffers_->capacity = capacity;
}

void KvCache::Append(const at::Tensor& k, const at::Tensor& v) {
  const int64_t count = k.size(0);
  if (window_ == 0) Reserve(length_ + count);
  int64_t i = 0;
  while (i < count) {
    // Positions that go to neighbouring rows are copied together. A window keeps the last W only.
    const int64_t row = RowOf(length_ + i);
    int64_t run = 1;
    while (i + run < count && RowOf(length_ + i + run) == row + run) ++run;
    buffers_->keys.narrow(0, row, run).copy_(k.narrow(0, i, run));
    buffers_->values.narrow(0, row, run).copy_(v.narrow(0, i, run));
    i += run;
  }
  length_ += count;
}

void KvCache::Reset() { length_ = 0; }

at::Tensor KvCache::keys() const { return buffers_->keys.narrow(0, 0, rows()); }
at::Tensor KvCache::values() const { return buffers_->values.narrow(0, 0, rows()); }

}  // namespace heddle::inference
