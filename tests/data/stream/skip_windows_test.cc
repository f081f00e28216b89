// What a rollback leaves out, and that nothing else changes.
#include "data/stream/skip_windows.h"

#include <gtest/gtest.h>

#include "tests/data/stream/stream_test_util.h"
#include "tests/support/status_matchers.h"

namespace heddle::stream {
namespace {

std::shared_ptr<const SequenceSource> MakeStream(const TestSet& set) {
  StreamOptions options;
  options.seed = 5;
  options.max_seq_len = 64;
  StatusOr<std::unique_ptr<SequenceStream>> stream = SequenceStream::Create(set.dataset, options);
  EXPECT_OK(stream.status());
  return *std::move(stream);
}

TEST(SkipWindows, MergesWhatTouches) {
  const std::vector<Window> merged = MergeWindows({{20, 4}, {8, 8}, {16, 2}, {40, 0}, {10, 2}});
  ASSERT_EQ(merged.size(), 2u);
  EXPECT_EQ(merged[0].first, 8);
  EXPECT_EQ(merged[0].count, 10);
  EXPECT_EQ(merged[1].first, 20);
  EXPECT_EQ(merged[1].count, 4);
}

TEST(SkipWindows, EverySequenceOutsideIsReadOnceUnderItsOwnIndex) {
  const std::unique_ptr<TestSet> set = MakeRandomSet(120, 3);
  const std::shared_ptr<const SequenceSource> whole = MakeStream(*set);
  const std::vector<Window> windows = {{8, 8}, {24, 4}};
  const auto source = SkippingSource::Create(whole, windows);
  ASSERT_OK(source.status());
  int64_t local = 0;
  for (int64_t global = 0; global < 40; ++global) {
    if ((global >= 8 && global < 16) || (global >= 24 && global < 28)) {
      EXPECT_EQ(LocalIndex(windows, global), local) << "the next one that is left";
      continue;
    }
    EXPECT_EQ(GlobalIndex(windows, local), global);
    EXPECT_EQ(LocalIndex(windows, global), local);
    PackedBatch expected;
    PackedBatch read;
    ASSERT_OK(whole->Append(global, &expected));
    ASSERT_OK((*source)->Append(local, &read));
    EXPECT_TRUE(read == expected) << "sequence " << global << ", its hash included";
    EXPECT_EQ((*source)->Shape(local).tokens, whole->Shape(global).tokens);
    ++local;
  }
  EXPECT_EQ((*source)->fingerprint(), whole->fingerprint());
}

// A position of before a rollback means the same sequence after it.
TEST(SkipWindows, AWindowChangesNothingBeforeIt) {
  const std::vector<Window> one = {{8, 8}};
  const std::vector<Window> two = {{8, 8}, {32, 16}};
  for (int64_t i = 0; i <= 24; ++i) {
    EXPECT_EQ(LocalIndex(two, GlobalIndex(one, i)), i);
  }
}

TEST(SkipWindows, RefusesWhatIsNoWindow) {
  const std::unique_ptr<TestSet> set = MakeRandomSet(10, 5);
  EXPECT_EQ(SkippingSource::Create(MakeStream(*set), {{-8, 8}}).status().code(),
            StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace heddle::stream
