// Attention over explicit key sets in double, with plain loops over every (query, key) pair of the
// batch and a membership test for each: the oracle of the kernels here. Slow and simple on purpose.
// Source: attention-and-moe.md section 1 (masked softmax, flash backward).
#pragma once

#include <cstdint>

#include "kernels/sparse_attention/params.h"

namespace heddle::kernels::sparse_attention {

// Whether `key` is in the set of (row, set head).
bool InSet(const KeySets& sets, int64_t row, int64_t set_head, int64_t key);

// `rows` = N, `keys` = M. Write what the kernels write; the backward overwrites dk, dv of all keys.
void ReferenceForward(const Forward<double>& forward, int64_t rows, int64_t keys);
void ReferenceBackward(const Backward<double>& backward, int64_t rows, int64_t keys);

}  // namespace heddle::kernels::sparse_attention
