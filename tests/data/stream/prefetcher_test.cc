#include "data/stream/prefetcher.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "tests/data/stream/stream_test_util.h"
#include "tests/support/status_matchers.h"

namespace heddle::stream {
namespace {

// Counts what was read and fails from some sequence on.
class CountingSource : public SequenceSource {
 public:
  explicit CountingSource(int64_t fails_at = 1 << 30) : fails_at_(fails_at) {}
  Status AppendAs(int64_t index, int64_t, PackedBatch* batch) const override {
    ++reads_;
    if (index >= fails_at_) return DataLoss(Str("block of sequence ", index));
    batch->tokens.push_back(index);
    return OkStatus();
  }
  SequenceShape Shape(int64_t index) const override { return {index, 1, 1, 1}; }
  std::string fingerprint() const override { return "counting"; }
  int reads() const { return reads_; }

 private:
  int64_t fails_at_;
  mutable std::atomic<int> reads_ = 0;
};

PrefetchOptions Options(int rank, int world) {
  PrefetchOptions options;
  options.first_step = 5;
  options.global_batch_size = 12;
  options.micro_batch_size = 2;
  options.rank = rank;
  options.world = world;
  options.depth = 3;
  return options;
}

TEST(Prefetcher, GivesTheMicroBatchesOfItsRankInOrder) {
  const std::unique_ptr<TestSet> set = MakeRandomSet(100, 1);
  StreamOptions stream_options;
  stream_options.max_seq_len = 50;
  ASSERT_OK_AND_ASSIGN(std::shared_ptr<const SequenceSource> stream,
                       SequenceStream::Create(set->dataset, stream_options));
  for (int world = 1; world <= 4; ++world) {
    for (int rank = 0; rank < world; ++rank) {
      ASSERT_OK_AND_ASSIGN(const auto prefetcher, Prefetcher::Create(stream, Options(rank, world)));
      const MicroBatchRange range = RankMicroBatches(6, rank, world);
      for (int64_t step = 5; step < 9; ++step) {
        for (int64_t m = range.begin; m < range.end; ++m) {
          ASSERT_OK_AND_ASSIGN(const PackedBatch batch, prefetcher->Next(step, m - range.begin));
          ASSERT_OK_AND_ASSIGN(const PackedBatch expected, ReadMicroBatch(*stream, step, 12, 2, m));
          ASSERT_TRUE(batch == expected) << "world " << world << " rank " << rank;
        }
      }
    }
  }
}

TEST(Prefetcher, ReadsNoFurtherAheadThanItsRing) {
  const auto source = std::make_shared<CountingSource>();
  ASSERT_OK_AND_ASSIGN(const auto prefetcher, Prefetcher::Create(source, Options(0, 1)));
  ASSERT_OK(prefetcher->Next(5, 0));
  while (prefetcher->stats().queue_depth < 3) std::this_thread::yield();
  EXPECT_EQ(source->reads(), (1 + 3) * 2);  // taken and ready, two sequences each
  ASSERT_OK(prefetcher->Next(5, 1));
  while (prefetcher->stats().queue_depth < 3) std::this_thread::yield();
  EXPECT_EQ(source->reads(), (2 + 3) * 2);
}

TEST(Prefetcher, RefusesToJump) {
  const auto source = std::make_shared<CountingSource>();
  ASSERT_OK_AND_ASSIGN(const auto prefetcher, Prefetcher::Create(source, Options(1, 2)));
  EXPECT_STATUS(prefetcher->Next(5, 1), StatusCode::kFailedPrecondition, "is not the next");
  ASSERT_OK(prefetcher->Next(5, 0));
  EXPECT_STATUS(prefetcher->Next(5, 0), StatusCode::kFailedPrecondition, "is not the next");
  EXPECT_STATUS(prefetcher->Next(6, 0), StatusCode::kFailedPrecondition, "is not the next");
  ASSERT_OK(prefetcher->Next(5, 1));
  ASSERT_OK(prefetcher->Next(5, 2));
  ASSERT_OK(prefetcher->Next(6, 0));
}

TEST(Prefetcher, GivesAnErrorWithTheMicroBatchThatMeetsIt) {
  // Step 5 is sequences 60 to 71; the fourth micro-batch meets 67.
  const auto source = std::make_shared<CountingSource>(67);
  ASSERT_OK_AND_ASSIGN(const auto prefetcher, Prefetcher::Create(source, Options(0, 1)));
  for (int64_t k = 0; k < 3; ++k) ASSERT_OK(prefetcher->Next(5, k));
  EXPECT_STATUS(prefetcher->Next(5, 3), StatusCode::kDataLoss, "sequence 67");
  EXPECT_STATUS(prefetcher->Next(5, 3), StatusCode::kDataLoss, "sequence 67");
}

TEST(Prefetcher, ServesARankWithoutMicroBatches) {
  const auto source = std::make_shared<CountingSource>();
  ASSERT_OK_AND_ASSIGN(const auto prefetcher, Prefetcher::Create(source, Options(0, 9)));
  EXPECT_STATUS(prefetcher->Next(5, 0), StatusCode::kFailedPrecondition, "has 0 a step");
  EXPECT_EQ(source->reads(), 0);
}

TEST(Prefetcher, RefusesImpossibleBatches) {
  const auto source = std::make_shared<CountingSource>();
  PrefetchOptions options = Options(0, 1);
  options.micro_batch_size = 5;
  EXPECT_STATUS(Prefetcher::Create(source, options), StatusCode::kInvalidArgument, "multiple");
  EXPECT_STATUS(Prefetcher::Create(source, Options(2, 2)), StatusCode::kInvalidArgument, "rank 2");
}

}  // namespace
}  // namespace heddle::stream
