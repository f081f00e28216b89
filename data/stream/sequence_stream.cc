#include "data/stream/sequence_stream.h"

#include <algorithm>
#include <map>
#include <mutex>
#include <utility>

#include "base/rng/rng.h"
#include "data/pack/checksum.h"
#include "data/stream/epoch_plan.h"

namespace heddle::stream {
namespace {

constexpr int64_t kSequenceTokensMax = int64_t{1} << 30;
constexpr size_t kPlansKept = 2;

uint64_t HashIds(int64_t index, std::span<const uint32_t> ids) {
  const auto* bytes = reinterpret_cast<const char*>(ids.data());
  return pack::Xxh3({bytes, ids.size_bytes()}, static_cast<uint64_t>(index));
}

}  // namespace

struct SequenceStream::Impl {
  Impl(std::shared_ptr<const pack::Dataset> data, const StreamOptions& stream_options)
      : dataset(std::move(data)),
        options(stream_options),
        key(Rng(options.seed, "data.order").Child(dataset->manifest_hash())) {}

  struct Place {
    std::shared_ptr<const EpochPlan> plan;  // shared: another thread may drop it from the cache
    int64_t epoch = 0;
    int64_t sequence = 0;  // within the epoch
  };

  // Epochs are planned in order, since the first sequence of one depends on all before it.
  std::shared_ptr<const EpochPlan> PlanOf(int64_t epoch) const {
    const std::lock_guard lock(mutex);
    return PlanLocked(epoch);
  }

  std::shared_ptr<const EpochPlan> PlanLocked(int64_t epoch) const {
    const auto found = plans.find(epoch);
    if (found != plans.end()) return found->second;
    auto plan = std::make_shared<const EpochPlan>(*dataset, options, key, epoch);
    plans[epoch] = plan;
    if (plans.size() > kPlansKept) {
      plans.erase(plans.begin()->first == epoch ? std::prev(plans.end()) : plans.begin());
    }
    return plan;
  }

  // The number of sequences of every epoch, where it does not depend on the epoch's order.
  int64_t ConstantLocked() const {
    if (constant_sequences == 0) constant_sequences = PlanLocked(0)->sequences();
    return constant_sequences;
  }

  // Makes the first sequence of epochs 0..epoch known.
  int64_t FirstLocked(int64_t epoch) const {
    if (options.packing == Packing::kConcat || !options.shuffle) {
      return epoch * ConstantLocked();
    }
    while (static_cast<int64_t>(first_of_epoch.size()) <= epoch) {
      const auto last = static_cast<int64_t>(first_of_epoch.size()) - 1;
      first_of_epoch.push_back(first_of_epoch.back() + PlanLocked(last)->sequences());
    }
    return first_of_epoch[static_cast<size_t>(epoch)];
  }

  Place Locate(int64_t index) const {
    HEDDLE_CHECK(index >= 0);
    const std::lock_guard lock(mutex);
    Place place;
    if (options.packing == Packing::kConcat || !options.shuffle) {
      const int64_t sequences = ConstantLocked();
      place.epoch = index / sequences;
      place.sequence = index % sequences;
    } else {
      while (first_of_epoch.back() <= index) {
        FirstLocked(static_cast<int64_t>(first_of_epoch.size()));
      }
      const auto next = std::upper_bound(first_of_epoch.begin(), first_of_epoch.end(), index);
      place.epoch = next - first_of_epoch.begin() - 1;
      place.sequence = index - first_of_epoch[static_cast<size_t>(place.epoch)];
    }
    place.plan = PlanLocked(place.epoch);
    return place;
  }

  const std::shared_ptr<const pack::Dataset> dataset;
  const StreamOptions options;
  const Rng key;
  mutable std::mutex mutex;
  mutable std::map<int64_t, std::shared_ptr<const EpochPlan>> plans;
  mutable std::vector<int64_t> first_of_epoch = {0};
  mutable int64_t constant_sequences = 0;
};

SequenceStream::SequenceStream(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
SequenceStream::~SequenceStream() = default;

StatusOr<std::unique_ptr<SequenceStream>> SequenceStream::Create(
    std::shared_ptr<const pack::Dataset> dataset, const StreamOptions& options) {
  if (dataset->documents() == 0) return InvalidArgument(Str(dataset->dir(), ": no documents"));
  if (options.max_seq_len < 2 || options.max_seq_len > kSequenceTokensMax) {
    return InvalidArgument(Str("max_seq_len: must be in [2, ", kSequenceTokensMax, "] (is ",
                               options.max_seq_len, ")"));
  }
  if (options.window_documents < 1) {
    return InvalidArgument(
        Str("packing window: must be > 0 documents (is ", options.window_documents, ")"));
  }
  return std::unique_ptr<SequenceStream>(
      new SequenceStream(std::make_unique<Impl>(std::move(dataset), options)));
}

Status SequenceStream::AppendAs(int64_t index, int64_t global_index, PackedBatch* batch) const {
  const Impl::Place place = impl_->Locate(index);
  const Sequence sequence = place.plan->SequenceAt(place.sequence);
  std::vector<uint32_t> ids(static_cast<size_t>(TokensOf(sequence)));
  // Read everything first, so that an error leaves the batch as it was. Where a document goes on
  // behind its piece, the next token is the last label.
  std::vector<int64_t> last_labels;
  size_t at = 0;
  for (const Piece& piece : sequence) {
    const auto length = static_cast<size_t>(piece.length);
    RETURN_IF_ERROR(impl_->dataset->ReadTokens(piece.document, piece.begin,
                                               std::span(ids).subspan(at, length)));
    at += length;
    uint32_t following = 0;
    if (!piece.ends_document) {
      RETURN_IF_ERROR(impl_->dataset->ReadTokens(piece.document, piece.begin + piece.length,
                                                 std::span(&following, 1)));
    }
    last_labels.push_back(piece.ends_document ? kIgnoredLabel : following);
  }
  at = 0;
  for (size_t p = 0; p < sequence.size(); ++p) {
    const auto length = static_cast<size_t>(sequence[p].length);
    for (size_t k = 0; k < length; ++k) {
      batch->tokens.push_back(ids[at + k]);
      batch->positions.push_back(static_cast<int64_t>(k));
      batch->labels.push_back(k + 1 < length ? ids[at + k + 1] : last_labels[p]);
    }
    at += length;
    batch->cu_seqlens.push_back(static_cast<int32_t>(batch->tokens.size()));
    batch->segment_tokens_max = std::max(batch->segment_tokens_max, sequence[p].length);
  }
  batch->valid_labels += ValidLabelsOf(sequence);
  const uint64_t hash = HashIds(global_index, ids);
  batch->hash_low += hash & 0xFFFFFFFFu;
  batch->hash_high += hash >> 32;
  return OkStatus();
}

SequenceShape SequenceStream::Shape(int64_t index) const {
  const Impl::Place place = impl_->Locate(index);
  const Sequence sequence = place.plan->SequenceAt(place.sequence);
  SequenceShape shape;
  shape.index = index;
  shape.tokens = TokensOf(sequence);
  shape.valid_labels = ValidLabelsOf(sequence);
  shape.segments = static_cast<int64_t>(sequence.size());
  return shape;
}

std::string SequenceStream::fingerprint() const {
  const StreamOptions& options = impl_->options;
  return pack::Xxh3Hex(Str("order 1 ", impl_->dataset->manifest_hash(), " ", options.seed, " ",
                           options.max_seq_len, " ", static_cast<int>(options.packing), " ",
                           options.shuffle, " ", options.window_documents));
}

int64_t SequenceStream::SequencesInEpoch(int64_t epoch) const {
  return impl_->PlanOf(epoch)->sequences();
}

int64_t SequenceStream::FirstSequenceOfEpoch(int64_t epoch) const {
  const std::lock_guard lock(impl_->mutex);
  return impl_->FirstLocked(epoch);
}

int64_t SequenceStream::EpochOf(int64_t index) const { return impl_->Locate(index).epoch; }

MicroBatchRange RankMicroBatches(int64_t micro_batches, int rank, int world) {
  HEDDLE_CHECK(micro_batches >= 0 && world >= 1 && rank >= 0 && rank < world);
  return {rank * micro_batches / world, (rank + 1) * micro_batches / world};
}

StatusOr<PackedBatch> ReadMicroBatch(const SequenceSource& source, int64_t step,
                                     int64_t global_batch_size, int64_t micro_batch_size,
                                     int64_t m) {
  HEDDLE_CHECK(micro_batch_size >= 1 && global_batch_size % micro_batch_size == 0);
  HEDDLE_CHECK(m >= 0 && m < global_batch_size / micro_batch_size);
  PackedBatch batch;
  const int64_t first = step * global_batch_size + m * micro_batch_size;
  for (int64_t index = first; index < first + micro_batch_size; ++index) {
    RETURN_IF_ERROR(source.Append(index, &batch));
  }
  return batch;
}

SequenceShape TotalShape(const SequenceSource& source, int64_t begin, int64_t end) {
  SequenceShape total;
  total.index = begin;
  for (int64_t index = begin; index < end; ++index) {
    const SequenceShape shape = source.Shape(index);
    total.tokens += shape.tokens;
    total.valid_labels += shape.valid_labels;
    total.segments += shape.segments;
  }
  return total;
}

uint64_t SequenceHash(int64_t index, const std::vector<int64_t>& tokens) {
  const std::vector<uint32_t> ids(tokens.begin(), tokens.end());
  return HashIds(index, ids);
}

uint64_t BatchHash(uint64_t low_sum, uint64_t high_sum) {
  return (high_sum & 0xFFFFFFFFu) << 32 | (low_sum & 0xFFFFFFFFu);
}

}  // namespace heddle::stream
