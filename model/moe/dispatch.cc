#include "model/moe/dispatch.h"

#include <algorithm>
#include <bit>
#include <cmath>

#include "base/status/status.h"

namespace heddle::moe {

int64_t PaddedRows(int64_t rows) {
  if (rows < 16) return rows;
  const int64_t below = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(rows)));
  const int64_t granule = std::max<int64_t>(16, below / 16);
  return (rows + granule - 1) / granule * granule;
}

int64_t Capacity(double factor, int64_t tokens, int64_t top_k, int64_t experts) {
  if (factor == 0.0) return INT64_MAX;
  const double mean =
      static_cast<double>(tokens) * static_cast<double>(top_k) / static_cast<double>(experts);
  // A product that is whole but for rounding must not gain a row.
  return static_cast<int64_t>(std::ceil(factor * mean * (1.0 - 1e-12)));
}

void BuildDispatch(std::span<const int32_t> experts, int64_t top_k, int64_t n_experts,
                   int64_t capacity, Dispatch* d) {
  HEDDLE_CHECK(experts.size() <= static_cast<size_t>(INT32_MAX), "too many rows in a micro-batch");
  const size_t n = static_cast<size_t>(n_experts);
  d->top_k = top_k;
  d->counts.assign(n, 0);
  for (const int32_t expert : experts) ++d->counts[static_cast<size_t>(expert)];
  d->begin.assign(n + 1, 0);
  d->dropped = 0;
  for (size_t e = 0; e < n; ++e) {
    const int64_t kept = std::min(d->counts[e], capacity);
    d->dropped += d->counts[e] - kept;
    d->begin[e + 1] = d->begin[e] + PaddedRows(kept);
  }
  d->row_assignment.assign(static_cast<size_t>(d->begin[n]), -1);
  d->slots.resize(experts.size());
  std::vector<int64_t> filled(n, 0);
  for (size_t a = 0; a < experts.size(); ++a) {
    const size_t e = static_cast<size_t>(experts[a]);
    if (filled[e] == capacity) {
      d->slots[a] = -1;
      continue;
    }
    const int64_t row = d->begin[e] + filled[e]++;
    d->slots[a] = static_cast<int32_t>(row);
    d->row_assignment[static_cast<size_t>(row)] = static_cast<int32_t>(a);
  }
}

Dispatch AllRows(int64_t tokens) {
  Dispatch d;
  d.begin = {0, tokens};
  d.counts = {tokens};
  return d;
}

}  // namespace heddle::moe
