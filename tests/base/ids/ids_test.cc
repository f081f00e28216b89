#include "base/ids/ids.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "tests/support/status_matchers.h"

namespace heddle {
namespace {

TEST(Ids, JobTextRoundTripsAtTheEdges) {
  for (const uint64_t value : {uint64_t{0}, uint64_t{1}, uint64_t{31}, uint64_t{32},
                               uint64_t{0x8000000000000000}, ~uint64_t{0}}) {
    ASSERT_OK_AND_ASSIGN(const JobId id, ParseJobId(ToText(JobId{value})));
    EXPECT_EQ(id.value, value);
  }
  EXPECT_EQ(ToText(JobId{~uint64_t{0}}), "j-fzzzzzzzzzzzz");
  EXPECT_EQ(ToText(JobId{33}), "j-0000000000011");
}

TEST(Ids, TextSortsLikeTheNumber) {
  uint64_t value = 1;
  std::string before = ToText(JobId{0});
  for (int i = 0; i < 64; ++i, value = value * 2 + (i % 3 == 0)) {
    const std::string text = ToText(JobId{value});
    EXPECT_LT(before, text) << value;
    before = text;
  }
}

TEST(Ids, ParsingForgivesCaseAndLookAlikesOnly) {
  ASSERT_OK_AND_ASSIGN(const JobId id, ParseJobId("J-00000000000OL"));
  EXPECT_EQ(id.value, 1u);
  for (const char* bad :
       {"", "j-", "j-000000000001", "j-00000000000011", "n-0000000000001", "j-000000000000u",
        "j-g000000000000", "0000000000001", "j-00000000 0001"}) {
    EXPECT_STATUS(ParseJobId(bad), StatusCode::kInvalidArgument, Str("\"", bad, "\"")) << bad;
  }
}

TEST(Ids, FenceOrdersByTermThenSequence) {
  const Fence late = Fence::Make(Term{2}, 0);
  const Fence early = Fence::Make(Term{1}, (uint64_t{1} << 40) - 1);
  EXPECT_LT(early, late);
  EXPECT_EQ(late.term(), Term{2});
  EXPECT_EQ(early.sequence(), (uint64_t{1} << 40) - 1);
  ASSERT_OK_AND_ASSIGN(const Fence parsed, ParseFence(ToText(early)));
  EXPECT_EQ(parsed, early);
}

TEST(Ids, FenceRefusesWhatIsNotADecimalNumberOf64Bits) {
  for (const char* bad : {"", "-1", "+1", "0x1", "1 ", "18446744073709551616", "1.0"}) {
    EXPECT_STATUS(ParseFence(bad), StatusCode::kInvalidArgument, "is not a fence") << bad;
  }
}

TEST(IdsDeathTest, FenceSequenceMustFit) {
  EXPECT_DEATH(Fence::Make(Term{1}, uint64_t{1} << 40), "sequence");
  EXPECT_DEATH(Fence::Make(Term{uint32_t{1} << 24}, 0), "term");
}

TEST(Ids, CompositeIdsHaveOneText) {
  EXPECT_EQ(ToText(AttemptId{JobId{1}, 2}), "j-0000000000001#2");
  EXPECT_EQ(ToText(CheckpointId{JobId{1}, 300}), "j-0000000000001@300");
  EXPECT_EQ(Str("at ", NodeId{32}), "at n-0000000000010");
}

TEST(Ids, PrefixFindsTheOneJobOrNamesTheCandidates) {
  const std::vector<JobId> known = {JobId{(uint64_t{1} << 60)}, JobId{(uint64_t{1} << 60) + 1},
                                    JobId{uint64_t{2} << 60}};
  ASSERT_OK_AND_ASSIGN(const JobId by_digit, ResolveJobPrefix("2", known));
  EXPECT_EQ(by_digit, known[2]);
  ASSERT_OK_AND_ASSIGN(const JobId by_text, ResolveJobPrefix("J-1000000000001", known));
  EXPECT_EQ(by_text, known[1]);
  EXPECT_STATUS(ResolveJobPrefix("j-1", known), StatusCode::kInvalidArgument,
                "2 jobs: j-1000000000000, j-1000000000001");
  EXPECT_STATUS(ResolveJobPrefix("j-3", known), StatusCode::kNotFound, "no job j-3");
  EXPECT_STATUS(ResolveJobPrefix("j-", known), StatusCode::kInvalidArgument, "not a job id");
  EXPECT_STATUS(ResolveJobPrefix("u", known), StatusCode::kNotFound, "no job u");
}

TEST(JobIdGenerator, NeverRepeatsWhenTheClockStandsOrGoesBack) {
  JobIdGenerator generator(5);
  JobId before;
  int64_t now = kIdEpochMs + 1000;
  for (int i = 0; i < 30000; ++i) {
    if (i == 20000) {
      now -= 500;
    }
    const JobId id = generator.Next(now);
    ASSERT_GT(id, before);
    ASSERT_EQ((id.value >> 13) & 1023, 5u);
    before = id;
  }
}

TEST(JobIdGenerator, ContinuesAboveTheLastKnownId) {
  JobIdGenerator first(1);
  const JobId last = first.Next(kIdEpochMs + 5000);
  JobIdGenerator second(1, last);
  EXPECT_GT(second.Next(kIdEpochMs + 10), last);
}

TEST(JobIdGenerator, GeneratorsDoNotCollide) {
  std::set<JobId> ids;
  for (uint32_t generator = 0; generator < 8; ++generator) {
    JobIdGenerator ids_of(generator);
    for (int i = 0; i < 100; ++i) {
      EXPECT_TRUE(ids.insert(ids_of.Next(kIdEpochMs + 77)).second);
    }
  }
}

}  // namespace
}  // namespace heddle
