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
#include <cstddef>
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
template <typename Blocks, bool kAdd, typename During>
void MultiplyInto(const Operands& p, int64_t rows, int64_t columns, Result* c,
                  const During& during) {
  if (columns <= kLanes) {
    rows <= kLanes ? Blocks::template Multiply<16, 16, kAdd>(p, c->at, kBlock, during)
                   : Blocks::template Multiply<32, 16, kAdd>(p, c->at, kBlock, during);
  } else {
    rows <= kLanes ? Blocks::template Multiply<16, 32, kAdd>(p, c->at, kBlock, during)
                   : Blocks::template Multiply<32, 32, kAdd>(p, c->at, kBlock, during);
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

// A share of `total` pieces of work for each of `steps` steps.
struct Share {
  int64_t total;
  int64_t steps;
  int64_t BeginOf(int64_t step) const { return total * step / steps; }
};

inline void FetchToRead(const void* address) { __builtin_prefetch(address, 0, 2); }
inline void FetchToWrite(void* address) { __builtin_prefetch(address, 1, 3); }

// Where a block of a result goes; the block before it waits for its turn while this one is summed.
struct Destination {
  uint16_t* to = nullptr;
  int64_t stride = 0;
  int64_t rows = 0;
  int64_t columns = 0;
};

// Two results: one is summed while the other one is rounded and stored, which takes other parts of
// the processor.
template <bool kTransposed>
class Results {
 public:
  // The block that is summed next, in `c` or in memory of this.
  Result* Next(const Destination& where, Result* c = nullptr) {
    current_ ^= 1;
    Store(current_);  // nothing, but at a depth of 0
    where_[current_] = where;
    at_[current_] = c != nullptr ? c : &own_[current_];
    return at_[current_];
  }
  void StoreLast() { Store(current_ ^ 1); }
  void Finish() {
    Store(current_ ^ 1);
    Store(current_);
  }

 private:
  void Store(int which) {
    const Destination d = where_[which];
    where_[which] = {};
    if (d.rows == 0) return;
    kTransposed ? StoreTransposed(*at_[which], d.rows, d.columns, d.to, d.stride)
                : StoreRows(*at_[which], d.rows, d.columns, d.to, d.stride);
  }
  Result own_[2];
  Result* at_[2] = {};
  Destination where_[2] = {};
  int current_ = 0;
};

template <typename Blocks>
void ForwardRun(const Forward& p, void* workspace) {
  const int64_t depth = Padded(p.in);
  auto* const packed = static_cast<uint16_t*>(workspace);
  uint16_t* const copy = packed + Padded(p.rows) * depth;
  for (int64_t r = 0; r < p.rows; r += kBlock) {
    PackRowsAsColumns(p.x + r * p.x_stride, p.x_stride, std::min(kBlock, p.rows - r), p.in,
                      packed + r * depth);
  }
  const int64_t steps = depth / kBlock;
  Results<true> results;
  Blocks::Begin();
  for (int64_t o = 0; o < p.out; o += kBlock) {
    const int64_t outs = std::min(kBlock, p.out - o);
    const uint16_t* const weight = p.weight + o * p.weight_stride;
    Operands block{weight, p.weight_stride, 1, nullptr, depth};
    if (outs < kBlock || p.in < depth) {
      PackRows(weight, p.weight_stride, outs, p.in, copy);
      block = {copy, kBlock, kBlock, nullptr, depth};
    }
    // The next rows of the weight come from memory meanwhile.
    const Share lines{o + 2 * kBlock <= p.out ? kBlock * steps : 0,
                      steps * Padded(p.rows) / kBlock};
    for (int64_t r = 0; r < p.rows; r += kBlock) {
      const int64_t rows = std::min(kBlock, p.rows - r);
      block.b = packed + r * depth;
      uint16_t* const y = p.y + r * p.y_stride + o;
      Result* const c = results.Next({y, p.y_stride, outs, rows});
      const int64_t first = r / kBlock * steps;
      MultiplyInto<Blocks, false>(block, kBlock, rows, c, [&](int64_t step) {
        for (int64_t i = lines.BeginOf(first + step); i < lines.BeginOf(first + step + 1); ++i) {
          FetchToRead(weight + (kBlock + i / steps) * p.weight_stride + i % steps * kBlock);
        }
        for (int64_t i = step * rows / steps; i < (step + 1) * rows / steps; ++i) {
          FetchToWrite(y + i * p.y_stride);
        }
        if (step == steps / 2) results.StoreLast();
      });
    }
  }
  Blocks::End();
  results.Finish();
}

// Where an input gradient works.
struct InputGradientMemory {
  InputGradientMemory(const InputGradient& p, void* workspace) {
    auto* at = static_cast<std::byte*>(workspace);
    const auto take = [&at](int64_t bytes) {
      std::byte* const begin = at;
      at += bytes;
      return begin;
    };
    const int64_t depth = std::min(kChunkDepth, Padded(p.out));
    constexpr int64_t kHalf = sizeof(uint16_t);
    for (uint16_t*& block : columns) {
      block = reinterpret_cast<uint16_t*>(take(kBlock * depth * kHalf));
    }
    dy = reinterpret_cast<uint16_t*>(take(Padded(p.rows) * depth * kHalf));
    sums = reinterpret_cast<Result*>(at);
  }
  uint16_t* columns[2];  // of the weight: one block is used while the next one is packed
  uint16_t* dy;
  Result* sums;  // between two parts of the depth
};

// Of a part of the depth; `keeps_sums` between parts, rounds them after the last.
template <typename Blocks, bool kAdd>
void InputGradientChunk(const InputGradient& p, const InputGradientMemory& memory, bool last,
                        bool keeps_sums) {
  const int64_t depth = Padded(p.out);
  const int64_t steps = depth / kBlock;
  const int64_t panels = Padded(p.rows) / kBlock;
  for (int64_t r = 0; r < p.rows; r += kBlock) {
    PackRows(p.dy + r * p.dy_stride, p.dy_stride, std::min(kBlock, p.rows - r), p.out,
             memory.dy + r * depth);
  }
  const auto pack = [&](int64_t i, int64_t first, int64_t last_row) {
    PackPairsOfRows(p.weight + i, p.weight_stride, p.out, std::min(kBlock, p.in - i),
                    memory.columns[i / kBlock % 2], first, last_row);
  };
  if (p.in > 0) pack(0, 0, depth);
  Results<false> results;
  for (int64_t i = 0; i < p.in; i += kBlock) {
    const int64_t ins = std::min(kBlock, p.in - i);
    const Share pairs{i + kBlock < p.in ? depth / 2 : 0, steps * panels};
    for (int64_t r = 0; r < p.rows; r += kBlock) {
      const int64_t rows = std::min(kBlock, p.rows - r);
      uint16_t* const dx = p.dx + r * p.dx_stride + i;
      const Destination where{dx, p.dx_stride, last ? rows : 0, ins};
      Result* const c = results.Next(
          where, keeps_sums ? memory.sums + (i / kBlock * panels + r / kBlock) : nullptr);
      const Operands block{memory.dy + r * depth, kBlock, kBlock, memory.columns[i / kBlock % 2],
                           depth};
      const int64_t first = r / kBlock * steps;
      MultiplyInto<Blocks, kAdd>(block, rows, kBlock, c, [&](int64_t step) {
        if (pairs.total > 0) {
          pack(i + kBlock, 2 * pairs.BeginOf(first + step), 2 * pairs.BeginOf(first + step + 1));
        }
        for (int64_t k = step * where.rows / steps; k < (step + 1) * where.rows / steps; ++k) {
          FetchToWrite(dx + k * p.dx_stride);
        }
        if (step == steps / 2) results.StoreLast();
      });
    }
  }
  results.Finish();
}

template <typename Blocks>
void InputGradientRun(const InputGradient& p, void* workspace) {
  const InputGradientMemory memory(p, workspace);
  const bool keeps_sums = p.out > kChunkDepth;
  Blocks::Begin();
  for (int64_t o = 0; o == 0 || o < p.out; o += kChunkDepth) {
    InputGradient chunk = p;
    chunk.out = std::min(kChunkDepth, p.out - o);
    chunk.dy += o;
    chunk.weight += o * p.weight_stride;
    const bool last = o + kChunkDepth >= p.out;
    o == 0 ? InputGradientChunk<Blocks, false>(chunk, memory, last, keeps_sums)
           : InputGradientChunk<Blocks, true>(chunk, memory, last, keeps_sums);
  }
  Blocks::End();
}

// A block of the gradient at an edge passes through memory of the full size.
template <typename Blocks, typename During>
void AddEdge(const Operands& block, int64_t rows, int64_t columns, float* gradient, int64_t stride,
             const During& during) {
  Result c = {};
  const size_t bytes = static_cast<size_t>(columns) * sizeof(float);
  for (int64_t i = 0; i < rows; ++i) std::memcpy(c.at + i * kBlock, gradient + i * stride, bytes);
  Blocks::template Multiply<32, 32, true>(block, c.at, kBlock, during);
  for (int64_t i = 0; i < rows; ++i) std::memcpy(gradient + i * stride, c.at + i * kBlock, bytes);
}

// p.rows <= kChunkRows.
template <typename Blocks>
void WeightGradientChunk(const WeightGradient& p, uint16_t* packed) {
  const int64_t depth = Padded(p.rows);
  const int64_t steps = depth / kBlock;
  uint16_t* const transposed = packed + depth * Padded(p.in);
  for (int64_t i = 0; i < p.in; i += kBlock) {
    PackPairsOfRows(p.x + i, p.x_stride, p.rows, std::min(kBlock, p.in - i), packed + i * depth, 0,
                    depth);
  }
  for (int64_t o = 0; o < p.out; o += kBlock) {
    const int64_t outs = std::min(kBlock, p.out - o);
    PackColumnsAsRows(p.dy + o, p.dy_stride, p.rows, outs, transposed);
    for (int64_t i = 0; i < p.in; i += kBlock) {
      const Operands block{transposed, kBlock, kBlock, packed + i * depth, depth};
      const int64_t ins = std::min(kBlock, p.in - i);
      float* const gradient = p.gradient + o * p.gradient_stride + i;
      // The block to the right; at the end of the rows, the first one of the next rows.
      float* const next = i + 2 * kBlock <= p.in ? gradient + kBlock
                                                 : p.gradient + (o + kBlock) * p.gradient_stride;
      const bool fetch = i + 2 * kBlock <= p.in || o + 2 * kBlock <= p.out;
      const auto during = [&](int64_t step) {
        if (!fetch) return;
        for (int64_t k = step * kBlock / steps; k < (step + 1) * kBlock / steps; ++k) {
          FetchToWrite(next + k * p.gradient_stride);
          FetchToWrite(next + k * p.gradient_stride + kLanes);
        }
      };
      if (outs == kBlock && ins == kBlock) {
        Blocks::template Multiply<32, 32, true>(block, gradient, p.gradient_stride, during);
      } else {
        AddEdge<Blocks>(block, outs, ins, gradient, p.gradient_stride, during);
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
