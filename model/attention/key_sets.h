// The key sets of a micro-batch as the sparse attention kernel takes them, owned. Built once per
// forward by a selection and kept for the backward and for recomputation: never selected again
// (attention-and-moe.md section 1).
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/sparse_attention/params.h"
#include "model/layers/sublayer.h"

namespace heddle::attention {

struct KeySets {
  int64_t set_heads = 1;
  int32_t width = 1;
  std::vector<int64_t> offsets;  // [N set_heads + 1]
  std::vector<int32_t> first;
  std::vector<int32_t> end;  // [N]

  kernels::sparse_attention::KeySets view() const;
  // Pairs (row, key) over all set heads: what the cost formulas count (X4).
  int64_t pairs() const;
};

// Every key from the document's start to the row itself.
KeySets CausalSets(const layers::Documents& documents);
// Window of W keys, the query's own included, and the first A keys (section 4).
KeySets WindowSets(const layers::Documents& documents, model::Window window);
// Token sets from a selection of absolute rows, ascending per row.
KeySets TokenSets(const layers::Documents& documents, std::vector<int64_t> offsets,
                  std::vector<int32_t> selected);

}  // namespace heddle::attention
