// Blocks on matrix tiles: compiled with the flags of avx512_bf16.cc and AMX (CMakeLists.txt); only
// params.h and the bodies may be included.
//
// Four tiles of C, 16 x 16 floats each, stay in registers while the depth is walked in steps of
// 32, so that four tile loads feed four tile products. In the forward the rows of a tile are rows
// of the weight: a single row of input costs a tile product per 16 x 32 weights, which takes no
// longer than their way from memory, and its sums are those of any number of rows.
#include "kernels/common/tiles.h"
#include "kernels/linear/body.h"
#include "kernels/linear/tables.h"

namespace heddle::kernels::linear {
namespace {  // NOLINT: ISA file (architecture.md T12)

struct TileBlocks {
  static void Begin() { BeginTiles(); }
  static void End() { EndTiles(); }

  template <int64_t kRows, int64_t kColumns, bool kAdd, typename During>
  static void Multiply(const Operands& p, float* c, int64_t c_stride, const During& during) {
    // Tile loads do not tell the compiler that they read memory: stores must be done before.
    __asm__ volatile("" ::: "memory");
    constexpr bool kDown = kRows > kTile;
    constexpr bool kRight = kColumns > kTile;
    const int64_t c_bytes = c_stride * static_cast<int64_t>(sizeof(float));
    float* const below = c + kTile * c_stride;
    if constexpr (kAdd) {
      _tile_loadd(0, c, c_bytes);
      if constexpr (kRight) _tile_loadd(1, c + kTile, c_bytes);
      if constexpr (kDown) _tile_loadd(2, below, c_bytes);
      if constexpr (kDown && kRight) _tile_loadd(3, below + kTile, c_bytes);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    Products<kDown, kRight>(p, during);
    _tile_stored(0, c, c_bytes);
    if constexpr (kRight) _tile_stored(1, c + kTile, c_bytes);
    if constexpr (kDown) _tile_stored(2, below, c_bytes);
    if constexpr (kDown && kRight) _tile_stored(3, below + kTile, c_bytes);
  }

 private:
  template <bool kDown, bool kRight, typename During>
  static void Products(const Operands& p, const During& during) {
    const int64_t a_bytes = p.a_stride * static_cast<int64_t>(sizeof(uint16_t));
    constexpr int64_t kBytes = kBlock * static_cast<int64_t>(sizeof(uint32_t));
    const uint16_t* const a = p.a;
    const uint16_t* const down = p.a + kTile * p.a_stride;
    for (int64_t k = 0; k < p.depth; k += kDepth) {
      const uint16_t* const b = p.b + k * kBlock;
      _tile_loadd(4, a + k * p.a_step, a_bytes);
      _tile_loadd(6, b, kBytes);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kRight) {
        _tile_loadd(7, b + 2 * kTile, kBytes);
        _tile_dpbf16ps(1, 4, 7);
      }
      if constexpr (kDown) {
        _tile_loadd(5, down + k * p.a_step, a_bytes);
        _tile_dpbf16ps(2, 5, 6);
        if constexpr (kRight) _tile_dpbf16ps(3, 5, 7);
      }
      during(k / kDepth);
    }
  }
};

}  // namespace

const Table kAmx = MakeTable<TileBlocks>();

}  // namespace heddle::kernels::linear
