#include "model/padded.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>

namespace heddle::model {

StatusOr<PackedRows> PackPadded(std::span<const int64_t> ids, std::span<const int64_t> mask,
                                int64_t batch, int64_t length) {
  const auto size = static_cast<size_t>(batch * length);
  if (ids.size() != size || mask.size() != size) {
    return InvalidArgument(
        Str("mask: ", mask.size(), " values for ids [", batch, ", ", length, "]"));
  }
  PackedRows packed;
  packed.cu_seqlens.push_back(0);
  for (int64_t b = 0; b < batch; ++b) {
    int64_t last = -1;  // position of the newest token of this row
    for (int64_t t = 0; t < length; ++t) {
      const int64_t place = b * length + t;
      const int64_t value = mask[static_cast<size_t>(place)];
      if (value != 0 && value != 1) {
        return InvalidArgument(Str("mask: ", value, " at [", b, ", ", t, "], expected 0 or 1"));
      }
      if (value == 0) continue;
      if (last >= 0 && last != t - 1) {
        return InvalidArgument(Str("mask: padding between tokens before [", b, ", ", t,
                                   "]; a row may be padded at its ends only"));
      }
      last = t;
      packed.ids.push_back(ids[static_cast<size_t>(place)]);
      packed.places.push_back(place);
    }
    packed.cu_seqlens.push_back(static_cast<int32_t>(packed.ids.size()));
  }
  return packed;
}

at::Tensor ScatterPadded(const at::Tensor& rows, const PackedRows& packed, int64_t batch,
                         int64_t length) {
  if (rows.size(0) == batch * length) return rows.view({batch, length, rows.size(1)});
  const at::Tensor padded = at::zeros({batch * length, rows.size(1)}, rows.options());
  for (size_t i = 0; i < packed.places.size(); ++i) {
    padded[packed.places[i]].copy_(rows[static_cast<int64_t>(i)]);
  }
  return padded.view({batch, length, rows.size(1)});
}

}  // namespace heddle::model
