// Loading by name and element range from a committed checkpoint, whatever world size and layout
// wrote it (training-runtime.md 14.8). Torch-free.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "heddle/v1/checkpoints.pb.h"

namespace heddle::checkpoint {

// A range that the caller wants: elements [first, first + count) of (name, class) to `data`.
struct WantedRange {
  std::string name;
  std::vector<int64_t> shape;  // must be the stored one
  heddle::v1::TensorClass tensor_class = heddle::v1::TENSOR_CLASS_MASTER;
  heddle::v1::ElementType type = heddle::v1::ELEMENT_TYPE_F32;  // must be the stored one
  uint64_t first = 0;
  uint64_t count = 0;
  void* data = nullptr;
  // Instead of `data`: gets the elements piece by piece, from `first` of the range on, in the order
  // of the files; its failure ends the load.
  std::function<Status(uint64_t first, std::span<const std::byte> bytes)> take = nullptr;
};

struct LoadOptions {
  // Compare whole-file digests before reading. Block checksums are always checked.
  bool check_digests = true;
  // Tensors of the checkpoint that nobody wants are an error.
  bool refuse_unexpected = true;
};

// Fills every wanted range or fails with nothing promised about the buffers.
// FAILED_PRECONDITION: missing, unexpected, mis-shaped or mis-typed tensors, the first kListedMax
// by name, the others by number. DATA_LOSS: a file is missing or damaged, or an element is not
// covered exactly once; names file, block and tensor. Opens only files that hold wanted ranges.
Status LoadRanges(const heddle::v1::CheckpointRecord& record, const std::string& root,
                  const std::vector<WantedRange>& wanted, const LoadOptions& options = {});

// A whole tensor as fp32, for export and inference.
struct Weight {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<float> values;
};
// The master weights and buffers of a checkpoint, sorted by name; bf16 is widened, f64 narrowed.
// Errors as LoadRanges.
StatusOr<std::vector<Weight>> ReadModelWeights(const heddle::v1::CheckpointRecord& record,
                                               const std::string& root);

}  // namespace heddle::checkpoint
