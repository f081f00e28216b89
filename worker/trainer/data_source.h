// The sequences of a run: its training stream (one set or a mixture) and its evaluation set.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "data/stream/sequence_stream.h"
#include "data/stream/skip_windows.h"
#include "heddle/v1/config.pb.h"
#include "model/language_model.h"

namespace heddle::trainer {

struct RunData {
  std::shared_ptr<const stream::SequenceSource> train;
  std::shared_ptr<const stream::SequenceSource> eval;  // null without data.eval_path
  int64_t eval_sequences = 0;                          // that one evaluation reads
  std::string fingerprint;                             // of the training order, kept in checkpoints
  std::string tokenizer_sha256;
};

// INVALID_ARGUMENT: no data, ids beyond model.vocab_size, sets of different tokenizers. Else as
// Dataset::Open.
StatusOr<RunData> OpenData(const heddle::v1::RunConfig& config);

// From now on the training order goes without these global sequences.
Status SkipData(const std::vector<stream::Window>& windows, RunData* data);

// `status` of opening or reading a set, marked as the data's fault where it says that their
// contents are damaged. Damage is the job's problem; a disk that cannot be read (EIO) is the
// node's.
Status MarkBadData(Status status);
bool IsBadData(const Status& status);

// The model's view of a batch, which it borrows.
model::PackedBatch ViewOf(const stream::PackedBatch& batch);

}  // namespace heddle::trainer
