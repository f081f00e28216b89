#include "data/stream/epoch_plan.h"

#include <algorithm>
#include <utility>

namespace heddle::stream {
namespace {

constexpr size_t kRecentWindows = 16;

}  // namespace

EpochPlan::EpochPlan(const pack::Dataset& dataset, const StreamOptions& options, const Rng& key,
                     int64_t epoch)
    : dataset_(dataset),
      options_(options),
      key_(key.Child(static_cast<uint64_t>(epoch))),
      documents_(key_.Child("documents"), static_cast<uint64_t>(dataset.documents())) {
  if (options_.packing == Packing::kBestFit) {
    PlanBestFit();
  } else {
    PlanConcat();
  }
}

int64_t EpochPlan::DocumentAt(int64_t position) const {
  if (!options_.shuffle) return position;
  return static_cast<int64_t>(documents_.At(static_cast<uint64_t>(position)));
}

EpochPlan::Window EpochPlan::PackWindow(int64_t window) const {
  const int64_t begin = window * options_.window_documents;
  const int64_t end = std::min(begin + options_.window_documents, dataset_.documents());
  std::vector<DocumentLength> documents;
  documents.reserve(static_cast<size_t>(end - begin));
  for (int64_t position = begin; position < end; ++position) {
    const int64_t document = DocumentAt(position);
    documents.push_back({document, dataset_.DocumentLength(document)});
  }
  return PackBestFit(documents, options_.max_seq_len);
}

void EpochPlan::PlanBestFit() {
  const int64_t windows =
      (dataset_.documents() + options_.window_documents - 1) / options_.window_documents;
  first_sequence_.reserve(static_cast<size_t>(windows) + 1);
  for (int64_t window = 0; window < windows; ++window) {
    first_sequence_.push_back(sequences_);
    sequences_ += static_cast<int64_t>(PackWindow(window).size());
  }
  first_sequence_.push_back(sequences_);
}

void EpochPlan::PlanConcat() {
  first_token_.reserve(static_cast<size_t>(dataset_.documents()) + 1);
  int64_t tokens = 0;
  for (int64_t position = 0; position < dataset_.documents(); ++position) {
    first_token_.push_back(tokens);
    tokens += dataset_.DocumentLength(DocumentAt(position));
  }
  first_token_.push_back(tokens);
  sequences_ = (tokens + options_.max_seq_len - 1) / options_.max_seq_len;
}

std::shared_ptr<const EpochPlan::Window> EpochPlan::WindowAt(int64_t window) const {
  {
    const std::lock_guard lock(mutex_);
    const auto found = std::find_if(recent_.begin(), recent_.end(), [window](const auto& cached) {
      return cached.window == window;
    });
    if (found != recent_.end()) {
      std::rotate(recent_.begin(), found, found + 1);
      return recent_.front().sequences;
    }
  }
  auto packed = std::make_shared<const Window>(PackWindow(window));
  const std::lock_guard lock(mutex_);
  recent_.insert(recent_.begin(), {window, packed});
  if (recent_.size() > kRecentWindows) recent_.pop_back();
  return packed;
}

Sequence EpochPlan::BestFitAt(int64_t s) const {
  const auto next = std::upper_bound(first_sequence_.begin(), first_sequence_.end(), s);
  const int64_t window = next - first_sequence_.begin() - 1;
  const std::shared_ptr<const Window> sequences = WindowAt(window);
  auto local = static_cast<uint64_t>(s - first_sequence_[static_cast<size_t>(window)]);
  if (options_.shuffle) {
    // Packing puts long pieces first; the order of training must not.
    const Rng key = key_.Child("window").Child(static_cast<uint64_t>(window));
    local = Permutation(key, sequences->size()).At(local);
  }
  return (*sequences)[local];
}

Sequence EpochPlan::ConcatAt(int64_t s) const {
  if (options_.shuffle) {
    const Permutation order(key_.Child("sequences"), static_cast<uint64_t>(sequences_));
    s = static_cast<int64_t>(order.At(static_cast<uint64_t>(s)));
  }
  int64_t token = s * options_.max_seq_len;
  const int64_t end = std::min(token + options_.max_seq_len, first_token_.back());
  auto next = std::upper_bound(first_token_.begin(), first_token_.end(), token);
  Sequence sequence;
  while (token < end) {
    const auto position = static_cast<int64_t>(next - first_token_.begin()) - 1;
    const int64_t begin = token - first_token_[static_cast<size_t>(position)];
    const int64_t length = std::min(*next, end) - token;
    sequence.push_back({DocumentAt(position), begin, length, token + length == *next});
    token += length;
    ++next;
  }
  return sequence;
}

Sequence EpochPlan::SequenceAt(int64_t s) const {
  return options_.packing == Packing::kBestFit ? BestFitAt(s) : ConcatAt(s);
}

}  // namespace heddle::stream
