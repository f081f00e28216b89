// Checks a micro-batch once at the edge and turns it into what the layers take.
#pragma once

#include <cstdint>
#include <vector>

#include "base/status/status.h"
#include "model/language_model.h"

namespace heddle::model {

struct CheckedBatch {
  std::vector<int32_t> ids;        // [N]
  std::vector<int32_t> labels;     // [N], -1 = ignored
  std::vector<int32_t> positions;  // [N], restart in each document
  std::vector<int32_t> cu_seqlens;
  int64_t valid_labels = 0;
  int64_t longest_document = 0;
};

// INVALID_ARGUMENT names the first bad field and index. Empty labels mean that none is valid.
StatusOr<CheckedBatch> CheckBatch(const PackedBatch& batch, int64_t vocabulary);

}  // namespace heddle::model
