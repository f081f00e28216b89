// The product of flash attention on matrix tiles: compiled with the flags of avx512_bf16.cc and
// AMX (CMakeLists.txt); only params.h, body.h and kernels/common may be included. Everything else
// is the table of AVX-512.
//
// A tile of C is 16 x 16 floats. Four of them stay in registers while the depth is walked in steps
// of 32, so that four tile loads feed four tile products.
#include "kernels/attention/body.h"
#include "kernels/attention/tables.h"
#include "kernels/common/tiles.h"

namespace heddle::kernels::attention {
namespace {  // NOLINT: ISA file (architecture.md T12)

// 32 rows by 32 columns of C at (row, column).
template <bool kAdd>
void Block(const PairProduct& p, int64_t row, int64_t column) {
  float* const c = p.c + row * p.c_stride + column;
  const int64_t c_bytes = p.c_stride * static_cast<int64_t>(sizeof(float));
  const int64_t a_bytes = p.a_stride * static_cast<int64_t>(sizeof(uint16_t));
  const int64_t b_bytes = p.columns * static_cast<int64_t>(sizeof(uint32_t));
  if constexpr (kAdd) {
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + kTile, c_bytes);
    _tile_loadd(2, c + kTile * p.c_stride, c_bytes);
    _tile_loadd(3, c + kTile * p.c_stride + kTile, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const uint16_t* a = p.a + row * p.a_stride;
  const uint16_t* b = p.b + 2 * column;
  for (int64_t k = 0; k < p.depth; k += kDepth) {
    _tile_loadd(4, a + k, a_bytes);
    _tile_loadd(6, b + k * p.columns, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + k * p.columns + 2 * kTile, b_bytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a + kTile * p.a_stride + k, a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, c, c_bytes);
  _tile_stored(1, c + kTile, c_bytes);
  _tile_stored(2, c + kTile * p.c_stride, c_bytes);
  _tile_stored(3, c + kTile * p.c_stride + kTile, c_bytes);
}

template <bool kAdd>
void Blocks(const PairProduct& p) {
  for (int64_t row = 0; row < p.rows; row += 2 * kTile) {
    for (int64_t column = 0; column < p.columns; column += 2 * kTile) {
      Block<kAdd>(p, row, column);
    }
  }
}

void TileProductRun(const PairProduct& p) {
  if (p.rows % (2 * kTile) != 0 || p.columns % (2 * kTile) != 0 || p.depth % kDepth != 0) {
    PairProductRun(p);
    return;
  }
  p.add ? Blocks<true>(p) : Blocks<false>(p);
}

constexpr Table MakeTileTable() {
  Table table = MakeTable();
  table.begin = BeginTiles;
  table.end = EndTiles;
  table.pair_product = TileProductRun;
  return table;
}

}  // namespace

const Table kAmx = MakeTileTable();

}  // namespace heddle::kernels::attention
