// Matrix tiles as every kernel on them uses them: eight registers of 16 rows of 64 bytes. For files
// compiled with AMX only (amx.cc); everything is in an anonymous namespace (simd.h says why).
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace heddle::kernels {
namespace {  // NOLINT: ISA file (architecture.md T12)

constexpr int64_t kTile = 16;   // rows of A and C, columns of B and C
constexpr int64_t kDepth = 32;  // of one tile product

// The layout of the tile registers as LDTILECFG reads it.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// In static memory: GCC 12 believes that the instruction reads eight bytes, and drops the stores of
// the rest of an object on the stack.
constexpr TileConfig kTileConfig;

// Tiles are a state of the thread: before its first product and after its last.
[[maybe_unused]] void BeginTiles() { _tile_loadconfig(&kTileConfig); }
[[maybe_unused]] void EndTiles() { _tile_release(); }

}  // namespace
}  // namespace heddle::kernels
