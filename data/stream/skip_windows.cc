#include "data/stream/skip_windows.h"

#include <algorithm>
#include <utility>

namespace heddle::stream {

namespace {

constexpr int64_t kIndexMax = int64_t{1} << 62;

}  // namespace

std::vector<Window> MergeWindows(std::vector<Window> windows) {
  std::erase_if(windows, [](const Window& window) { return window.count <= 0; });
  std::sort(windows.begin(), windows.end(),
            [](const Window& a, const Window& b) { return a.first < b.first; });
  std::vector<Window> merged;
  for (const Window& window : windows) {
    if (merged.empty() || window.first > merged.back().first + merged.back().count) {
      merged.push_back(window);
      continue;
    }
    const int64_t end =
        std::max(merged.back().first + merged.back().count, window.first + window.count);
    merged.back().count = end - merged.back().first;
  }
  return merged;
}

int64_t GlobalIndex(const std::vector<Window>& merged, int64_t index) {
  for (const Window& window : merged) {
    if (index < window.first) break;
    index += window.count;
  }
  return index;
}

int64_t LocalIndex(const std::vector<Window>& merged, int64_t global_index) {
  int64_t skipped = 0;
  for (const Window& window : merged) {
    if (global_index <= window.first) break;
    skipped += std::min(window.count, global_index - window.first);
  }
  return global_index - skipped;
}

StatusOr<std::unique_ptr<SkippingSource>> SkippingSource::Create(
    std::shared_ptr<const SequenceSource> source, const std::vector<Window>& windows) {
  for (const Window& window : windows) {
    if (window.first < 0 || window.first > kIndexMax || window.count > kIndexMax) {
      return InvalidArgument(Str("skipped data: no window of sequences begins at ", window.first,
                                 " and has ", window.count));
    }
  }
  return std::unique_ptr<SkippingSource>(
      new SkippingSource(std::move(source), MergeWindows(windows)));
}

Status SkippingSource::AppendAs(int64_t index, int64_t global_index, PackedBatch* batch) const {
  const int64_t place = GlobalIndex(windows_, index);
  // Append() knows no other index than this source's own.
  return source_->AppendAs(place, global_index == index ? place : global_index, batch);
}

SequenceShape SkippingSource::Shape(int64_t index) const {
  SequenceShape shape = source_->Shape(GlobalIndex(windows_, index));
  shape.index = index;
  return shape;
}

}  // namespace heddle::stream
