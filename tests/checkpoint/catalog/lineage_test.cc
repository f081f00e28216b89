#include "checkpoint/catalog/lineage.h"

#include <gtest/gtest.h>

namespace heddle::checkpoint {
namespace {

using heddle::v1::CheckpointRecord;

struct Make {
  uint64_t fence = 1;
  uint64_t step = 0;
  bool verified = true;
  bool damaged = false;
  bool pinned = false;
  heddle::v1::CheckpointState state = heddle::v1::CHECKPOINT_STATE_COMMITTED;
};

CheckpointRecord Record(const Make& make) {
  CheckpointRecord record;
  record.set_fence(make.fence);
  record.set_step(make.step);
  record.set_state(make.state);
  record.set_verified(make.verified);
  record.set_damaged(make.damaged);
  record.set_pinned(make.pinned);
  return record;
}

std::vector<uint64_t> Steps(const std::vector<CheckpointRecord>& records,
                            const std::vector<size_t>& indices) {
  std::vector<uint64_t> steps;
  for (const size_t i : indices) {
    steps.push_back(records[i].step());
  }
  return steps;
}

using Steps_t = std::vector<uint64_t>;

TEST(RestoreCandidates, NewestGoodFirstAndHigherFenceForOneStep) {
  const std::vector<CheckpointRecord> records = {
      Record({.fence = 1, .step = 10}),
      Record({.fence = 2, .step = 20}),
      Record({.fence = 1, .step = 20}),
      Record({.fence = 2, .step = 30, .damaged = true}),
      Record({.fence = 2, .step = 40, .state = heddle::v1::CHECKPOINT_STATE_SEALING}),
      Record({.fence = 2, .step = 35, .state = heddle::v1::CHECKPOINT_STATE_EXPIRED})};
  EXPECT_EQ(RestoreCandidates(records), (std::vector<size_t>{1, 2, 0}));
  EXPECT_EQ(RestoreCandidates(records, 1), (std::vector<size_t>{1}));
  EXPECT_TRUE(RestoreCandidates({}).empty());
}

TEST(Lineage, FollowsParentsAndStopsAtACircle) {
  std::vector<CheckpointRecord> records = {Record({.fence = 1, .step = 10}),
                                           Record({.fence = 1, .step = 20}),
                                           Record({.fence = 2, .step = 30})};
  records[2].set_parent_fence(1);
  records[2].set_parent_step(20);
  records[1].set_parent_fence(1);
  records[1].set_parent_step(10);
  EXPECT_EQ(Steps(records, Lineage(records, 2)), (Steps_t{30, 20, 10}));
  records[0].set_parent_fence(2);
  records[0].set_parent_step(30);
  EXPECT_EQ(Steps(records, Lineage(records, 2)), (Steps_t{30, 20, 10}));
}

std::vector<CheckpointRecord> Series(std::initializer_list<uint64_t> steps) {
  std::vector<CheckpointRecord> records;
  for (const uint64_t step : steps) {
    records.push_back(Record({.step = step}));
  }
  return records;
}

TEST(Expirable, KeepsTheNewestAndReturnsTheOldestFirst) {
  const auto records = Series({10, 20, 30, 40, 50});
  EXPECT_EQ(Steps(records, Expirable(records, {.keep_last = 3, .in_use = {}})), (Steps_t{10, 20}));
}

TEST(Expirable, KeepsTwoWhateverThePolicySays) {
  const auto records = Series({10, 20, 30});
  EXPECT_EQ(Steps(records, Expirable(records, {.keep_last = 1, .in_use = {}})), (Steps_t{10}));
  const auto two = Series({10, 20});
  EXPECT_TRUE(Expirable(two, {.keep_last = 1, .in_use = {}}).empty());
}

TEST(Expirable, DeletesNothingBeforeTwoNewerOnesAreVerified) {
  auto records = Series({10, 20, 30, 40});
  records[3].set_verified(false);
  records[2].set_verified(false);
  EXPECT_TRUE(Expirable(records, {.keep_last = 2, .in_use = {}}).empty());
  records[2].set_verified(true);
  // 20 has one verified newer one (30), 10 has two (30 and 20).
  EXPECT_EQ(Steps(records, Expirable(records, {.keep_last = 2, .in_use = {}})), (Steps_t{10}));
  EXPECT_EQ(Steps(records, ToVerify(records)), (Steps_t{40}));
}

TEST(Expirable, SparesPinnedOnesMultiplesAndSourcesInUse) {
  auto records = Series({10, 20, 30, 40, 50, 60, 70});
  records[0].set_pinned(true);
  const RetentionPolicy policy{.keep_last = 2, .keep_every = 20, .in_use = {{1, 30}}};
  EXPECT_EQ(Steps(records, Expirable(records, policy)), (Steps_t{50}));
}

TEST(Expirable, ADamagedOneDoesNotCountAsKept) {
  auto records = Series({10, 20, 30, 40});
  records[3].set_damaged(true);
  records[2].set_damaged(true);
  EXPECT_TRUE(Expirable(records, {.keep_last = 2, .in_use = {}}).empty());
}

}  // namespace
}  // namespace heddle::checkpoint
