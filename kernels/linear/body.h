// The three products as loops over blocks of 32 x 32, compiled once per instruction set.
//
//   forward          C^T = W x^T   the weight's rows are used as they lie, the input is packed
//   input gradient   C = dy W      32 columns of the weight at a time are packed in pairs of rows
//   weight gradient  C += dy^T x   both are packed; sums are added to the gradient in place
//
// A block of the operand in the outer loop (32 KiB at a depth of 512) stays in L1 and meets all of
// the other one, which stays in L2: memory is read once.
// Included by the file of one instruction set only.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "kernels/linear/block.h"
#include "kernels/linear/pack.h"
#include "kernels/linear/params.h"
#include "kernels/linear/sizes.h"

namespace heddle::kernels::linear {
namespace {  // NOLINT: ISA file (architecture.md T12)

struct alignas(64) Result {
  float at[kBlock * kBlock];
};

// `rows` and `columns` of the block are wanted.
template <typename Blocks>
void MultiplyInto(const Operands& p, int64_t rows, int64_t columns, Result* c) {
  if (columns <= kLanes) {
    rows <= kLanes ? Blocks::template Multiply<16, 16, false>(p, c->at, kBlock)
                   : Blocks::template Multiply<32, 16, false>(p, c->at, kBlock);
  } else {
    rows <= kLanes ? Blocks::template Multiply<16, 32, false>(p, c->at, kBlock)
                   : Blocks::template Multiply<32, 32, false>(p, c->at, kBlock);
  }
}

inline void StoreHalves(U16 words, int64_t count, uint16_t* to) {
  if (count >= kBlock) {
    StoreWords(words, to);
  } else {
    std::memcpy(to, &words, static_cast<size_t>(count) * sizeof(uint16_t));
  }
}

// y[column, row] = c[row, column].
void StoreTransposed(const Result& c, int64_t rows, int64_t columns, uint16_t* y, int64_t stride) {
  for (int64_t first = 0; first < columns; first += kLanes) {
    U16 words[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      const float* from = c.at + 2 * i * kBlock + first;
      words[i] = RoundPairs(Load(from), Load(from + kBlock));
    }
    TransposeWords(words);
    const int64_t count = std::min(kLanes, columns - first);
    for (int64_t i = 0; i < count; ++i) StoreHalves(words[i], rows, y + (first + i) * stride);
  }
}

void StoreRows(const Result& c, int64_t rows, int64_t columns, uint16_t* y, int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = c.at + i * kBlock;
    StoreHalves(RoundRow(Load(from), Load(from + kLanes)), columns, y + i * stride);
  }
}

// Rows of an A operand: where they lie, or a padded copy.
inline Operands RowsOrCopy(const uint16_t* from, int64_t stride, int64_t rows, int64_t depth,
                           uint16_t* copy) {
  if (rows >= kBlock && depth % kBlock == 0) return {from, stride, nullptr, depth};
  PadRows(from, stride, rows, depth, copy);
  return {copy, Padded(depth), nullptr, Padded(depth)};
}

template <typename Blocks>
void ForwardRun(const Forward& p, void* workspace) {
  const int64_t depth = Padded(p.in);
  auto* const packed = static_cast<uint16_t*>(workspace);
  uint16_t* const copy = packed + Padded(p.rows) * depth;
  for (int64_t r = 0; r < p.rows; r += kBlock) {
    PackRowsAsColumns(p.x + r * p.x_stride, p.x_stride, std::min(kBlock, p.rows - r), p.in,
                      packed + r * depth);
  }
  Result c;
  Blocks::Begin();
  for (int64_t o = 0; o < p.out; o += kBlock) {
    const int64_t outs = std::min(kBlock, p.out - o);
    Operands block =
        RowsOrCopy(p.weight + o * p.weight_stride, p.weight_stride, outs, p.in, copy);
    for (int64_t r = 0; r < p.rows; r += kBlock) {
      const int64_t rows = std::min(kBlock, p.rows - r);
      block.b = packed + r * depth;
      MultiplyInto<Blocks>(block, kBlock, rows, &c);
      StoreTransposed(c, outs, rows, p.y + r * p.y_stride + o, p.y_stride);
    }
  }
  Blocks::End();
}

template <typename Blocks>
void InputGradientRun(const InputGradient& p, void* workspace) {
  const int64_t depth = Padded(p.out);
  auto* const packed = static_cast<uint16_t*>(workspace);
  uint16_t* const copy = packed + kBlock * depth;
  // dy is walked once for each block of columns: copies are made before.
  const int64_t whole = p.out % kBlock == 0 ? p.rows / kBlock * kBlock : 0;
  if (whole < p.rows) {
    PadRows(p.dy + whole * p.dy_stride, p.dy_stride, p.rows - whole, p.out, copy);
  }
  Result c;
  Blocks::Begin();
  for (int64_t i = 0; i < p.in; i += kBlock) {
    const int64_t ins = std::min(kBlock, p.in - i);
    PackPairsOfRows(p.weight + i, p.weight_stride, p.out, ins, packed);
    for (int64_t r = 0; r < p.rows; r += kBlock) {
      const int64_t rows = std::min(kBlock, p.rows - r);
      const Operands block = r < whole
                                 ? Operands{p.dy + r * p.dy_stride, p.dy_stride, packed, depth}
                                 : Operands{copy + (r - whole) * depth, depth, packed, depth};
      MultiplyInto<Blocks>(block, rows, kBlock, &c);
      StoreRows(c, rows, ins, p.dx + r * p.dx_stride + i, p.dx_stride);
    }
  }
  Blocks::End();
}

// A block of the gradient at an edge passes through memory of the full size.
template <typename Blocks>
void AddEdge(const Operands& block, int64_t rows, int64_t columns, float* gradient,
             int64_t stride) {
  Result c = {};
  const size_t bytes = static_cast<size_t>(columns) * sizeof(float);
  for (int64_t i = 0; i < rows; ++i) std::memcpy(c.at + i * kBlock, gradient + i * stride, bytes);
  Blocks::template Multiply<32, 32, true>(block, c.at, kBlock);
  for (int64_t i = 0; i < rows; ++i) std::memcpy(gradient + i * stride, c.at + i * kBlock, bytes);
}

// p.rows <= kChunkRows.
template <typename Blocks>
void WeightGradientChunk(const WeightGradient& p, uint16_t* packed) {
  const int64_t depth = Padded(p.rows);
  uint16_t* const transposed = packed + depth * Padded(p.in);
  for (int64_t i = 0; i < p.in; i += kBlock) {
    PackPairsOfRows(p.x + i, p.x_stride, p.rows, std::min(kBlock, p.in - i), packed + i * depth);
  }
  for (int64_t o = 0; o < p.out; o += kBlock) {
    const int64_t outs = std::min(kBlock, p.out - o);
    PackColumnsAsRows(p.dy + o, p.dy_stride, p.rows, outs, transposed);
    for (int64_t i = 0; i < p.in; i += kBlock) {
      const Operands block{transposed, depth, packed + i * depth, depth};
      const int64_t ins = std::min(kBlock, p.in - i);
      float* const gradient = p.gradient + o * p.gradient_stride + i;
      if (outs == kBlock && ins == kBlock) {
        Blocks::template Multiply<32, 32, true>(block, gradient, p.gradient_stride);
      } else {
        AddEdge<Blocks>(block, outs, ins, gradient, p.gradient_stride);
      }
    }
  }
}

template <typename Blocks>
void WeightGradientRun(const WeightGradient& p, void* workspace) {
  Blocks::Begin();
  for (int64_t r = 0; r < p.rows; r += kChunkRows) {
    WeightGradient chunk = p;
    chunk.rows = std::min(kChunkRows, p.rows - r);
    chunk.dy += r * p.dy_stride;
    chunk.x += r * p.x_stride;
    WeightGradientChunk<Blocks>(chunk, static_cast<uint16_t*>(workspace));
  }
  Blocks::End();
}

template <typename Blocks>
constexpr Table MakeTable() {
  return Table{ForwardRun<Blocks>, InputGradientRun<Blocks>, WeightGradientRun<Blocks>};
}

}  // namespace
}  // namespace heddle::kernels::linear
