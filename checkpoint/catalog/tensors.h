// What follows from a tensor's entry in a checkpoint record alone: sizes, types, and whether ranges
// cover it exactly. Pure.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status/status.h"
#include "heddle/v1/checkpoints.pb.h"

namespace heddle::checkpoint {

inline constexpr uint64_t kChunkBytes = uint64_t{1} << 20;

// 4 for f32, 2 for bf16, 8 for f64 and i64.
uint64_t ElementBytes(heddle::v1::ElementType type);
// Elements of a whole chunk: 2^18 f32, 2^19 bf16, 2^17 f64 and i64.
uint64_t ChunkElements(heddle::v1::ElementType type);
// Stored type of a tensor's class: moment_type for the moments, else master_type.
heddle::v1::ElementType TypeOf(const heddle::v1::TensorInfo& tensor,
                               heddle::v1::TensorClass tensor_class);
// Product of the shape; 1 for a scalar. 0 when a dimension is 0 or negative or the product
// overflows.
uint64_t Elements(const heddle::v1::TensorInfo& tensor);
// "master", "moment1", ...
std::string_view ToText(heddle::v1::TensorClass tensor_class);

// A list that says the same of many ranges or tensors names so many; a reader wants no more.
inline constexpr size_t kListedMax = 8;

struct ElementSpan {
  uint64_t first = 0;
  uint64_t count = 0;
};
// What keeps `spans` (any order) from covering [0, elements) exactly once: gaps, overlaps, empty
// spans, ends beyond. Empty: exact.
std::vector<std::string> CoverProblems(std::vector<ElementSpan> spans, uint64_t elements);

}  // namespace heddle::checkpoint
