// Ordered reduction on the host (training-runtime.md 3.2): row r of `rows` is what rank r sent.
#pragma once

#include <cstddef>

namespace heddle::comm {

// out[i] = rows[0][i] + rows[1][i] + ... in this order, rounding after each addition.
// REQUIRES: world >= 1; out does not overlap rows.
void OrderedSum(const float* rows, size_t world, size_t count, float* out);
void OrderedSum(const double* rows, size_t world, size_t count, double* out);

}  // namespace heddle::comm
