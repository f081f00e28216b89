// How the products are cut: shared by the bodies and WorkspaceBytes().
#pragma once

#include <cstdint>

namespace heddle::kernels::linear {

inline constexpr int64_t kBlock = 32;        // rows and columns of a block of a result; depth step
inline constexpr int64_t kChunkRows = 1024;  // of a weight gradient that are packed at a time
inline constexpr int64_t kChunkDepth = 512;  // of an input gradient: operands that meet fit in L1

constexpr int64_t Padded(int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

}  // namespace heddle::kernels::linear
