// Copies of tensors in the type that a kernel computes in.
#pragma once

#include <ATen/core/Tensor.h>

#include "model/layers/buffer_pool.h"

namespace heddle::attention {

// `t` itself where it has the type and is dense behind its first dimension, else a contiguous copy
// from the pool. Three dimensions or fewer; an undefined tensor stays undefined.
at::Tensor Converted(const at::Tensor& t, at::ScalarType type, layers::BufferPool* pool);

}  // namespace heddle::attention
