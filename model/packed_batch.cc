#include "model/packed_batch.h"

#include <algorithm>

namespace heddle::model {
namespace {

Status CheckDocuments(std::span<const int32_t> cu, int64_t rows) {
  if (cu.empty() || cu.front() != 0) return InvalidArgument("cu_seqlens: must begin with 0");
  for (size_t b = 0; b + 1 < cu.size(); ++b) {
    if (cu[b + 1] < cu[b]) return InvalidArgument(Str("cu_seqlens[", b + 1, "]: falls"));
  }
  if (cu.back() != rows) {
    return InvalidArgument(Str("cu_seqlens: ends at ", cu.back(), " of ", rows, " tokens"));
  }
  return OkStatus();
}

}  // namespace

StatusOr<CheckedBatch> CheckBatch(const PackedBatch& batch, int64_t vocabulary) {
  const size_t rows = batch.input_ids.size();
  RETURN_IF_ERROR(CheckDocuments(batch.cu_seqlens, static_cast<int64_t>(rows)));
  if (!batch.labels.empty() && batch.labels.size() != rows) {
    return InvalidArgument(Str("labels: ", batch.labels.size(), " for ", rows, " tokens"));
  }
  CheckedBatch checked;
  checked.ids.resize(rows);
  checked.labels.assign(rows, -1);
  checked.positions.resize(rows);
  checked.cu_seqlens.assign(batch.cu_seqlens.begin(), batch.cu_seqlens.end());
  for (size_t i = 0; i < rows; ++i) {
    const int64_t id = batch.input_ids[i];
    if (id < 0 || id >= vocabulary) {
      return InvalidArgument(
          Str("input_ids[", i, "]: ", id, " is outside the vocabulary of ", vocabulary));
    }
    checked.ids[i] = static_cast<int32_t>(id);
    if (batch.labels.empty() || batch.labels[i] == kIgnoredLabel) continue;
    const int64_t label = batch.labels[i];
    if (label < 0 || label >= vocabulary) {
      return InvalidArgument(Str("labels[", i, "]: ", label, " is neither -100 nor in the ",
                                 "vocabulary of ", vocabulary));
    }
    checked.labels[i] = static_cast<int32_t>(label);
    ++checked.valid_labels;
  }
  for (size_t b = 0; b + 1 < checked.cu_seqlens.size(); ++b) {
    const int32_t begin = checked.cu_seqlens[b];
    const int32_t end = checked.cu_seqlens[b + 1];
    checked.longest_document = std::max<int64_t>(checked.longest_document, end - begin);
    for (int32_t row = begin; row < end; ++row) {
      checked.positions[static_cast<size_t>(row)] = row - begin;
    }
  }
  return checked;
}

}  // namespace heddle::model
