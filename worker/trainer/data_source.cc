#include "worker/trainer/data_source.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "base/status/errno_of.h"
#include "data/pack/dataset.h"

namespace heddle::trainer {

namespace {

constexpr char kBadDataPayload[] = "heddle/bad-data";

// One evaluation reads at most this many sequences, from the start of the set.
constexpr int64_t kEvalSequencesMax = 512;

StatusOr<std::shared_ptr<const pack::Dataset>> OpenSet(const std::string& path,
                                                       const heddle::v1::RunConfig& config,
                                                       std::string* tokenizer) {
  StatusOr<std::unique_ptr<pack::Dataset>> opened = pack::Dataset::Open(path);
  RETURN_IF_ERROR(MarkBadData(opened.status()));
  const std::shared_ptr<const pack::Dataset> set = *std::move(opened);
  RETURN_IF_ERROR(MarkBadData(set->CheckTokenizer()));
  if (static_cast<int64_t>(set->vocab_size()) > config.model().vocab_size()) {
    return InvalidArgument(Str("data ", path, ": has ", set->vocab_size(),
                               " token ids, model.vocab_size is ", config.model().vocab_size()));
  }
  const std::string& sha = set->manifest().tokenizer_sha256;
  if (!tokenizer->empty() && sha != *tokenizer) {
    return InvalidArgument(Str("data ", path, ": was made with another tokenizer"));
  }
  *tokenizer = sha;
  return set;
}

}  // namespace

StatusOr<RunData> OpenData(const heddle::v1::RunConfig& config) {
  const heddle::v1::DataConfig& data = config.data();
  stream::StreamOptions options;
  options.seed = static_cast<uint64_t>(config.training().seed());
  options.max_seq_len = config.training().max_seq_len();
  options.packing = data.pack() == heddle::v1::DataConfig::PACK_CONCAT ? stream::Packing::kConcat
                                                                       : stream::Packing::kBestFit;
  options.shuffle = data.shuffle();

  RunData run;
  if (data.mixture_size() > 0) {
    std::vector<stream::WeightedSource> sources;
    for (const heddle::v1::MixtureEntry& entry : data.mixture()) {
      ASSIGN_OR_RETURN(const auto set, OpenSet(entry.path(), config, &run.tokenizer_sha256));
      ASSIGN_OR_RETURN(std::unique_ptr<stream::SequenceStream> stream,
                       stream::SequenceStream::Create(set, options));
      sources.push_back({.source = std::move(stream), .weight = entry.weight()});
    }
    ASSIGN_OR_RETURN(run.train, stream::MakeMixture(std::move(sources)));
  } else if (!data.path().empty()) {
    ASSIGN_OR_RETURN(const auto set, OpenSet(data.path(), config, &run.tokenizer_sha256));
    ASSIGN_OR_RETURN(run.train, stream::SequenceStream::Create(set, options));
  } else {
    return InvalidArgument("data.path: no data set is given");
  }
  run.fingerprint = run.train->fingerprint();

  if (!data.eval_path().empty()) {
    ASSIGN_OR_RETURN(const auto set, OpenSet(data.eval_path(), config, &run.tokenizer_sha256));
    options.shuffle = false;
    ASSIGN_OR_RETURN(std::unique_ptr<stream::SequenceStream> stream,
                     stream::SequenceStream::Create(set, options));
    run.eval_sequences = std::min(stream->SequencesInEpoch(0), kEvalSequencesMax);
    run.eval = std::move(stream);
  }
  return run;
}

Status SkipData(const std::vector<stream::Window>& windows, RunData* data) {
  if (windows.empty()) return OkStatus();
  ASSIGN_OR_RETURN(data->train, stream::SkippingSource::Create(data->train, windows));
  return OkStatus();
}

Status MarkBadData(Status status) {
  if (status.code() == StatusCode::kDataLoss && ErrnoOf(status) == 0) {
    status.SetPayload(kBadDataPayload, absl::Cord("1"));
  }
  return status;
}

bool IsBadData(const Status& status) { return status.GetPayload(kBadDataPayload).has_value(); }

model::PackedBatch ViewOf(const stream::PackedBatch& batch) {
  model::PackedBatch view;
  view.input_ids = batch.tokens;
  view.labels = batch.labels;
  view.cu_seqlens = batch.cu_seqlens;
  return view;
}

}  // namespace heddle::trainer
