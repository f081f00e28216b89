// The indexer in double with plain loops and whole rows in memory: the oracle of the bodies.
// Source: attention-and-moe.md sections 1 (tie-break), 6.1-6.3, 7.1-7.3.
#pragma once

#include <cstdint>

#include "kernels/indexer/params.h"

namespace heddle::kernels::indexer {

// Keys that row t sees.
int64_t ReferenceVisible(const Scores<double>& p, int64_t row);

// Scores of row t to out[0 .. visible).
void ReferenceRowScores(const Scores<double>& p, int64_t row, double* out);

// NaN ranks below every number, +0 and -0 are equal; ties by the position in `scores`. Writes the
// positions of the `count` best scores, ascending.
void ReferenceTopK(const double* scores, int64_t visible, int64_t count, TieBreak tie_break,
                   int32_t* positions);
void ReferenceSelect(const Select<double>& p, Rows rows);

void ReferenceStatistics(const Statistics<double>& p, Rows rows);

// loss and lse_scores of all rows; with the gradients' pointers set also dq, dw, dk, dhead_bias.
// `rows` = N, which is also the number of keys.
void ReferenceKl(const Kl<double>& p, int64_t rows);

}  // namespace heddle::kernels::indexer
