// Ordered reduction on the host (training-runtime.md 3.2): row r of `rows` is what rank r sent.
#pragma once

#include <cstddef>
#include <cstdint>

namespace heddle::comm {

// out[i] = rows[0][i] + rows[1][i] + ... in this order, rounding after each addition.
// REQUIRES: world >= 1; out does not overlap rows.
void OrderedSum(const float* rows, size_t world, size_t count, float* out);
void OrderedSum(const double* rows, size_t world, size_t count, double* out);
// The same with rows that lie anywhere; out may be the first row.
void OrderedSum(const float* const* rows, size_t world, size_t count, float* out);
void OrderedSum(const double* const* rows, size_t world, size_t count, double* out);
void OrderedSum(const uint16_t* const* rows, size_t world, size_t count, float* out);
// Rows of bf16 bits, summed in fp32.
void OrderedSum(const uint16_t* rows, size_t world, size_t count, float* out);

// Round to nearest even; NaN stays NaN.
void RoundToBf16(const float* from, size_t count, uint16_t* to);

}  // namespace heddle::comm
