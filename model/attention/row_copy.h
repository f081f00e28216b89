// Copies of rows between packed tensors and padded tiles, split over LibTorch's threads.
#pragma once

#include <cstdint>
#include <span>

namespace at {
class Tensor;
}

namespace heddle::attention {

// No row: zeros on gather, nothing on scatter.
inline constexpr int32_t kNoRow = -1;

// tiles[i] = rows[index[i]]; rows [N, H, D] may be strided in the first dimension, tiles is
// contiguous with index.size() x H x D elements of the same type.
void GatherRows(const at::Tensor& rows_NHD, std::span<const int32_t> index,
                const at::Tensor& tiles);
// rows[index[i]] = tiles[i]; an index occurs at most once.
void ScatterRows(const at::Tensor& tiles, std::span<const int32_t> index,
                 const at::Tensor& rows_NHD);
// sums[index[i]] += tiles[i], i ascending, in the statistics type of `sums` [N, H D]; an index may
// occur often. Threads own columns, so the order of additions never changes.
void ScatterAddRows(const at::Tensor& tiles, std::span<const int32_t> index,
                    const at::Tensor& sums);
// to[n] = from[n] rounded to the type of `to`; `to` may be strided in the first dimension.
void ConvertRows(const at::Tensor& sums, std::span<const int32_t> rows, const at::Tensor& to_NHD);

// to = from, [N, H, D] both; rows and heads may lie at any distance (0 in `from`: one for all), the
// last dimension is contiguous.
void CopyHeads(const at::Tensor& from_NHD, const at::Tensor& to_NHD);
// As CopyHeads into the first columns of each head of a wider `to`; the other columns become 0.
void CopyPadded(const at::Tensor& from_NHD, const at::Tensor& to_NHE);

}  // namespace heddle::attention
