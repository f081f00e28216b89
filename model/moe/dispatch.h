// Rows by expert: a stable counting sort of the router's assignments, so that every expert works on
// one range of rows, in the order of the tokens (attention-and-moe.md section 9). Sequential and
// integer: the same for any number of threads.
//
// N tokens, K experts per token, E experts. Assignment a = token * K + j is the j-th of the token's
// experts. A range is padded at its end (PaddedRows): the matrix library compiles a kernel for
// every number of rows it meets, which costs as much as a small product.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace heddle::moe {

struct Dispatch {
  std::vector<int64_t> begin;           // [E + 1] first row of an expert; its padding included
  std::vector<int32_t> row_assignment;  // [rows] -1 = padding. Empty: row i is token i
  std::vector<int32_t> slots;           // [N * K] row of an assignment, -1 = dropped
  std::vector<int64_t> counts;          // [E] assignments of the router, dropped ones included
  int64_t top_k = 1;
  int64_t dropped = 0;

  int64_t rows() const { return begin.back(); }
  bool identity() const { return row_assignment.empty(); }
  // Token of a row that is not padding.
  int64_t token(int64_t row) const {
    return identity() ? row : row_assignment[static_cast<size_t>(row)] / top_k;
  }
};

// Rows that `rows` rows of an expert take: a multiple of 1/16 of the power of two below, at least
// of 16; fewer than 16 stay as they are (decoding).
int64_t PaddedRows(int64_t rows);

// Room of an expert: ceil(factor N K / E), or no limit where factor is 0.
int64_t Capacity(double factor, int64_t tokens, int64_t top_k, int64_t experts);

// experts [N * K]: ids below `n_experts`, those of a token distinct. Of an expert's assignments the
// first `capacity` in token order stay. Vectors of `dispatch` are reused.
void BuildDispatch(std::span<const int32_t> experts, int64_t top_k, int64_t n_experts,
                   int64_t capacity, Dispatch* dispatch);

// All tokens in their order for one expert.
Dispatch AllRows(int64_t tokens);

}  // namespace heddle::moe
