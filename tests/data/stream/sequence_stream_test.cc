#include "data/stream/sequence_stream.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <set>
#include <thread>
#include <vector>

#include "base/rng/rng.h"
#include "tests/data/stream/stream_test_util.h"
#include "tests/support/status_matchers.h"

namespace heddle::stream {
namespace {

std::unique_ptr<SequenceStream> MakeStream(const TestSet& set, Packing packing, int64_t max_seq_len,
                                           uint64_t seed = 1, bool shuffle = true) {
  StreamOptions options;
  options.seed = seed;
  options.packing = packing;
  options.max_seq_len = max_seq_len;
  options.shuffle = shuffle;
  options.window_documents = 64;
  return *SequenceStream::Create(set.dataset, options);
}

class AnyPacking : public ::testing::TestWithParam<std::tuple<Packing, bool>> {
 protected:
  Packing packing() const { return std::get<0>(GetParam()); }
  bool shuffle() const { return std::get<1>(GetParam()); }
};

// What must hold of a sequence by itself; adds its tokens to `seen`.
void CheckSequence(const TestSet& set, const PackedBatch& batch, int64_t max_seq_len,
                   std::map<int64_t, int64_t>* seen) {
  // Tokens are numbered through the documents, so that the next one is known.
  const auto size = static_cast<int64_t>(batch.tokens.size());
  ASSERT_LE(size, max_seq_len);
  ASSERT_EQ(batch.labels.size(), batch.tokens.size());
  ASSERT_EQ(batch.positions.size(), batch.tokens.size());
  ASSERT_EQ(batch.cu_seqlens.front(), 0);
  ASSERT_EQ(batch.cu_seqlens.back(), size);
  int64_t valid = 0;
  for (size_t s = 0; s + 1 < batch.cu_seqlens.size(); ++s) {
    const int64_t begin = batch.cu_seqlens[s];
    const int64_t end = batch.cu_seqlens[s + 1];
    ASSERT_LT(begin, end);
    for (int64_t k = begin; k < end; ++k) {
      const auto at = static_cast<size_t>(k);
      const int64_t token = batch.tokens[at];
      ++(*seen)[token];
      ASSERT_EQ(batch.positions[at], k - begin);
      // A document's last token, its eos, has no label; every other has the one that follows.
      const int64_t expected = token == 0                          ? kIgnoredLabel
                               : set.last_tokens.count(token) != 0 ? 0
                                                                   : token + 1;
      ASSERT_EQ(batch.labels[at], expected) << "token " << token;
      valid += expected == kIgnoredLabel ? 0 : 1;
      // One document a segment: inside it each token follows the one before.
      if (k > begin) {
        ASSERT_EQ(token, batch.labels[at - 1]);
        ASSERT_FALSE(token != 0 && set.first_tokens.count(token) != 0);
      }
    }
  }
  ASSERT_EQ(batch.valid_labels, valid);
}

TEST_P(AnyPacking, GivesEveryTokenOnceAnEpoch) {
  for (const uint64_t seed : {1, 2, 3}) {
    const std::unique_ptr<TestSet> set = MakeRandomSet(300, seed);
    for (const int64_t max_seq_len : {2, 17, 128, 5000}) {
      const auto stream = MakeStream(*set, packing(), max_seq_len, seed, shuffle());
      for (const int64_t epoch : {0, 1}) {
        std::map<int64_t, int64_t> seen;
        const int64_t first = stream->FirstSequenceOfEpoch(epoch);
        for (int64_t i = first; i < first + stream->SequencesInEpoch(epoch); ++i) {
          PackedBatch batch;
          ASSERT_OK(stream->Append(i, &batch));
          CheckSequence(*set, batch, max_seq_len, &seen);
          if (HasFatalFailure()) return;
          const SequenceShape shape = stream->Shape(i);
          ASSERT_EQ(shape.tokens, static_cast<int64_t>(batch.tokens.size()));
          ASSERT_EQ(shape.valid_labels, batch.valid_labels);
          ASSERT_EQ(shape.segments, static_cast<int64_t>(batch.cu_seqlens.size()) - 1);
          ASSERT_EQ(stream->EpochOf(i), epoch);
        }
        ASSERT_EQ(seen[0], set->dataset->documents());
        seen.erase(0);
        ASSERT_EQ(static_cast<int64_t>(seen.size()),
                  set->dataset->tokens() - set->dataset->documents());
        for (const auto& [token, count] : seen) ASSERT_EQ(count, 1) << "token " << token;
      }
    }
  }
}

TEST_P(AnyPacking, GivesTheSameSequenceHoweverItIsReached) {
  const std::unique_ptr<TestSet> set = MakeRandomSet(200, 5);
  const auto streaming = MakeStream(*set, packing(), 100, 8, shuffle());
  std::vector<PackedBatch> all;
  for (int64_t i = 0; i < 3 * streaming->SequencesInEpoch(0); ++i) {
    all.emplace_back();
    ASSERT_OK(streaming->Append(i, &all.back()));
  }
  RngCursor random(Rng(1, "test.jump"));
  for (int round = 0; round < 30; ++round) {
    // A process that starts at some position, as after a resume.
    const auto resumed = MakeStream(*set, packing(), 100, 8, shuffle());
    const auto from = static_cast<int64_t>(random.Below(all.size()));
    const auto to = std::min(from + 5, static_cast<int64_t>(all.size()));
    for (int64_t i = from; i < to; ++i) {
      PackedBatch batch;
      ASSERT_OK(resumed->Append(i, &batch));
      ASSERT_TRUE(batch == all[static_cast<size_t>(i)]) << "sequence " << i << " from " << from;
    }
  }
}

TEST_P(AnyPacking, GivesTheSameGlobalOrderToAnyNumberOfRanks) {
  const std::unique_ptr<TestSet> set = MakeRandomSet(200, 6);
  constexpr int64_t kGlobal = 12;
  constexpr int64_t kMicro = 2;
  std::vector<std::vector<int64_t>> tokens_of_step;
  std::vector<uint64_t> hash_of_step;
  for (int world = 1; world <= 4; ++world) {
    for (int64_t step = 0; step < 20; ++step) {
      std::vector<int64_t> tokens;
      uint64_t low = 0;
      uint64_t high = 0;
      int64_t valid = 0;
      for (int rank = 0; rank < world; ++rank) {
        const auto stream = MakeStream(*set, packing(), 90, 3, shuffle());  // each rank its own
        const MicroBatchRange range = RankMicroBatches(kGlobal / kMicro, rank, world);
        for (int64_t m = range.begin; m < range.end; ++m) {
          ASSERT_OK_AND_ASSIGN(const PackedBatch batch,
                               ReadMicroBatch(*stream, step, kGlobal, kMicro, m));
          tokens.insert(tokens.end(), batch.tokens.begin(), batch.tokens.end());
          low += batch.hash_low;
          high += batch.hash_high;
          valid += batch.valid_labels;
        }
      }
      const auto stream = MakeStream(*set, packing(), 90, 3, shuffle());
      const SequenceShape total = TotalShape(*stream, step * kGlobal, (step + 1) * kGlobal);
      ASSERT_EQ(total.valid_labels, valid);
      ASSERT_EQ(total.tokens, static_cast<int64_t>(tokens.size()));
      if (world == 1) {
        tokens_of_step.push_back(tokens);
        hash_of_step.push_back(BatchHash(low, high));
      } else {
        ASSERT_EQ(tokens, tokens_of_step[static_cast<size_t>(step)]) << "world " << world;
        ASSERT_EQ(BatchHash(low, high), hash_of_step[static_cast<size_t>(step)]);
      }
    }
  }
  std::set<uint64_t> distinct(hash_of_step.begin(), hash_of_step.end());
  EXPECT_EQ(distinct.size(), hash_of_step.size());
}

INSTANTIATE_TEST_SUITE_P(Packings, AnyPacking,
                         ::testing::Combine(::testing::Values(Packing::kBestFit, Packing::kConcat),
                                            ::testing::Bool()));

TEST(RankMicroBatches, SplitsEvenlyWithoutGapOrOverlap) {
  for (int64_t micro_batches = 0; micro_batches < 20; ++micro_batches) {
    for (int world = 1; world <= 9; ++world) {
      int64_t at = 0;
      for (int rank = 0; rank < world; ++rank) {
        const MicroBatchRange range = RankMicroBatches(micro_batches, rank, world);
        EXPECT_EQ(range.begin, at);
        EXPECT_LE(range.end - range.begin, (micro_batches + world - 1) / world);
        at = range.end;
      }
      EXPECT_EQ(at, micro_batches);
    }
  }
}

TEST(SequenceStream, OrdersEpochsAndSeedsDifferently) {
  const std::unique_ptr<TestSet> set = MakeRandomSet(300, 7);
  const auto order = [&](uint64_t seed, int64_t epoch) {
    const auto stream = MakeStream(*set, Packing::kBestFit, 64, seed);
    std::vector<int64_t> tokens;
    const int64_t first = stream->FirstSequenceOfEpoch(epoch);
    for (int64_t i = first; i < first + stream->SequencesInEpoch(epoch); ++i) {
      PackedBatch batch;
      EXPECT_OK(stream->Append(i, &batch));
      tokens.insert(tokens.end(), batch.tokens.begin(), batch.tokens.end());
    }
    return tokens;
  };
  EXPECT_EQ(order(1, 0), order(1, 0));
  EXPECT_NE(order(1, 0), order(1, 1));
  EXPECT_NE(order(1, 0), order(2, 0));
}

TEST(SequenceStream, NeverChangesItsOrder) {
  // Runs store positions in this order: the hash holds for ever.
  const std::unique_ptr<TestSet> set = MakeRandomSet(100, 1);
  std::vector<uint64_t> hashes;
  for (const Packing packing : {Packing::kBestFit, Packing::kConcat}) {
    const auto stream = MakeStream(*set, packing, 128, 42);
    PackedBatch batch;
    for (int64_t i = 0; i < 100; ++i) ASSERT_OK(stream->Append(i, &batch));
    hashes.push_back(BatchHash(batch.hash_low, batch.hash_high));
  }
  EXPECT_EQ(hashes, (std::vector<uint64_t>{7288553588600830440u, 11050352937782267050u}));
}

TEST(SequenceStream, NamesItsOrderByEverythingItDependsOn) {
  const std::unique_ptr<TestSet> set = MakeRandomSet(20, 1);
  const std::unique_ptr<TestSet> other = MakeRandomSet(20, 2);
  std::set<std::string> fingerprints;
  fingerprints.insert(MakeStream(*set, Packing::kBestFit, 64)->fingerprint());
  fingerprints.insert(MakeStream(*set, Packing::kConcat, 64)->fingerprint());
  fingerprints.insert(MakeStream(*set, Packing::kBestFit, 65)->fingerprint());
  fingerprints.insert(MakeStream(*set, Packing::kBestFit, 64, 2)->fingerprint());
  fingerprints.insert(MakeStream(*set, Packing::kBestFit, 64, 1, false)->fingerprint());
  fingerprints.insert(MakeStream(*other, Packing::kBestFit, 64)->fingerprint());
  EXPECT_EQ(fingerprints.size(), 6u);
  EXPECT_EQ(fingerprints.count(MakeStream(*set, Packing::kConcat, 64)->fingerprint()), 1u);
}

TEST(SequenceStream, HashesTokensWithTheSequenceIndex) {
  const std::unique_ptr<TestSet> set = MakeRandomSet(20, 1);
  const auto stream = MakeStream(*set, Packing::kBestFit, 64);
  PackedBatch batch;
  ASSERT_OK(stream->Append(3, &batch));
  const uint64_t hash = SequenceHash(3, batch.tokens);
  EXPECT_EQ(batch.hash_low, hash & 0xFFFFFFFF);
  EXPECT_EQ(batch.hash_high, hash >> 32);
  EXPECT_EQ(BatchHash(batch.hash_low, batch.hash_high), hash);
  EXPECT_NE(SequenceHash(4, batch.tokens), hash);
  // XXH3-64 of the bytes 05 00 00 00, seed 0.
  EXPECT_EQ(SequenceHash(0, {5}), pack::Xxh3(std::string_view("\5\0\0\0", 4), 0));
  EXPECT_EQ(BatchHash((uint64_t{7} << 32) + 1, 2), (uint64_t{2} << 32) + 1);
}

TEST(SequenceStream, ServesSeveralThreads) {
  const std::unique_ptr<TestSet> set = MakeRandomSet(200, 9);
  const auto stream = MakeStream(*set, Packing::kBestFit, 50);
  const auto reference = MakeStream(*set, Packing::kBestFit, 50);
  std::vector<PackedBatch> expected(400);
  for (size_t i = 0; i < expected.size(); ++i) {
    ASSERT_OK(reference->Append(static_cast<int64_t>(i), &expected[i]));
  }
  std::atomic<int> differing = 0;
  std::vector<std::thread> threads;
  for (uint64_t t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      RngCursor random(Rng(t, "test.thread"));
      for (int n = 0; n < 500; ++n) {
        const uint64_t i = random.Below(expected.size());
        PackedBatch batch;
        const Status status = stream->Append(static_cast<int64_t>(i), &batch);
        if (!status.ok() || !(batch == expected[i])) ++differing;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(differing, 0);
}

TEST(SequenceStream, LeavesTheBatchAloneWhenABlockIsBad) {
  const test::TempFolder root;
  test::WritePackedSet(root.path(),
                       std::vector<std::vector<uint32_t>>(3, std::vector<uint32_t>(600000, 5)));
  std::string bytes = test::ReadBytes(root / "shard-00000.tok");
  bytes[(1 << 20) + 5] ^= 1;
  test::WriteFile(root / "shard-00000.tok", bytes);
  StreamOptions options;
  options.shuffle = false;
  options.packing = Packing::kConcat;
  ASSERT_OK_AND_ASSIGN(std::shared_ptr<const pack::Dataset> dataset,
                       pack::Dataset::Open(root.path()));
  ASSERT_OK_AND_ASSIGN(const auto stream, SequenceStream::Create(dataset, options));
  PackedBatch batch;
  ASSERT_OK(stream->Append(0, &batch));
  const PackedBatch before = batch;
  EXPECT_STATUS(stream->Append(300, &batch), StatusCode::kDataLoss, "block 1");
  EXPECT_TRUE(batch == before);
}

TEST(SequenceStream, RefusesOptionsItCannotMean) {
  const std::unique_ptr<TestSet> set = MakeSet({5});
  StreamOptions options;
  options.max_seq_len = 1;
  EXPECT_STATUS(SequenceStream::Create(set->dataset, options), StatusCode::kInvalidArgument,
                "max_seq_len: must be in [2, ");
  options.max_seq_len = 8;
  options.window_documents = 0;
  EXPECT_STATUS(SequenceStream::Create(set->dataset, options), StatusCode::kInvalidArgument,
                "window");
}

}  // namespace
}  // namespace heddle::stream
