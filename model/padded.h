// The padded form of a batch, [B, T] with a mask, as Transformers and most scripts keep it: valid
// rows are packed, the packed model runs, its rows are scattered back. Padding costs nothing and
// reaches nothing (attention-and-moe.md section 1, C6).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "base/status/status.h"

namespace at {
class Tensor;
}

namespace heddle::model {

struct PackedRows {
  std::vector<int64_t> ids;         // [N]
  std::vector<int32_t> cu_seqlens;  // [B+1], a row of the batch that is all padding has no token
  std::vector<int64_t> places;      // [N] place of each token in [B T], ascending
};

// ids and mask [B T], row by row; mask 1 marks a token, 0 padding, on either side of the tokens.
// INVALID_ARGUMENT names the place of a mask value other than 0 and 1, of padding between tokens,
// or sizes that do not fit.
StatusOr<PackedRows> PackPadded(std::span<const int64_t> ids, std::span<const int64_t> mask,
                                int64_t batch, int64_t length);

// [B, T, V] of packed rows [N, V]; the rows of padding are 0. A view where nothing is padded.
at::Tensor ScatterPadded(const at::Tensor& rows_NV, const PackedRows& packed, int64_t batch,
                         int64_t length);

}  // namespace heddle::model
