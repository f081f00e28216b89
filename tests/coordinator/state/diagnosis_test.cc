// Heads in, findings out: what is named, when, and what is not.
#include "coordinator/state/diagnosis.h"

#include <gtest/gtest.h>

#include "base/status/status.h"

namespace heddle::state {
namespace {

namespace v1 = heddle::v1;

struct Seen {
  uint64_t seq = 1812;
  uint32_t op = 3;  // all-gather
  uint64_t unit = 8;
  bool waiting = true;
  std::string process = "S";
  uint32_t phase = 9;  // backward
  int64_t phase_age_ms = 8'000;
  uint64_t count = 100;
};

class Diagnosis : public ::testing::Test {
 protected:
  Situation Of(const std::vector<Seen>& ranks, int64_t age_ms = 0) {
    observation_ = Observation();
    const auto world = static_cast<uint32_t>(ranks.size());
    for (uint32_t rank = 0; rank < world; ++rank) {
      const Seen& seen = ranks[rank];
      v1::RankHead head;
      head.set_rank(rank);
      head.set_step(60);
      head.set_phase(seen.phase);
      head.set_phase_age_ms(seen.phase_age_ms);
      head.set_seq(seen.seq);
      head.set_op(seen.op);
      head.set_unit(seen.unit);
      head.set_count(seen.count);
      head.set_fingerprint(seen.op * 1000 + seen.count);
      head.set_waiting(seen.waiting);
      head.set_age_ms(7'500);
      head.set_process_state(seen.process);
      observation_.Add(head, world, kNow - age_ms);
    }
    Situation s;
    s.ranks = &observation_;
    s.world = world;
    s.layers = 12;
    s.now_ms = kNow;
    s.wall_ms = 5'000'000;
    s.step = 60;
    s.quiet_ms = 8'000;
    s.median_step_ms = 500;
    s.node_of = [](uint32_t rank) { return Str("w-", rank); };
    return s;
  }

  static constexpr int64_t kNow = 1'000'000;
  Observation observation_;
};

using Hang = Diagnosis;

// The sentence of training-runtime.md P5.
TEST_F(Hang, NamesTheStoppedRankBehindAndItsOperation) {
  const Situation s = Of({{.seq = 1813, .op = 4},
                          {.seq = 1812, .waiting = false, .process = "T"},
                          {.seq = 1813, .op = 4}});
  const std::optional<v1::FindingRecord> finding = FindHang(s);
  ASSERT_TRUE(finding.has_value());
  EXPECT_EQ(finding->text(),
            "no step for 8.0 s: rank 1 is at #1812 all-gather block.7, the others at #1813 "
            "reduce-scatter block.7; rank 1 is stopped (T) in backward");
  EXPECT_EQ(finding->rank(), 1u);
  EXPECT_EQ(finding->node(), "w-1");
  EXPECT_EQ(finding->step(), 60u);
  ASSERT_EQ(finding->evidence_size(), 3);
  EXPECT_EQ(finding->evidence(1),
            "rank 1 on w-1: step 60, in backward for 8.0 s, #1812 all-gather block.7 launched 7.5 "
            "s ago, process stopped");
  EXPECT_NE(finding->advice().find("kill -CONT"), std::string::npos);
}

TEST_F(Hang, NamesTheRankThatIsBusyElsewhereWhileOthersWait) {
  const Situation s = Of({{}, {.waiting = false, .phase = 2, .phase_age_ms = 12'000}});
  const std::optional<v1::FindingRecord> finding = FindHang(s);
  ASSERT_TRUE(finding.has_value());
  EXPECT_EQ(finding->text(),
            "no step for 8.0 s: rank 1 is at #1812 all-gather block.7, rank 0 at #1812 all-gather "
            "block.7; rank 1 has been in data for 12 s");
}

TEST_F(Hang, ADiskIsTold) {
  const Situation s = Of({{}, {.waiting = false, .process = "D", .phase = 2}});
  EXPECT_NE(FindHang(s)->text().find("asleep in the kernel (D)"), std::string::npos);
  EXPECT_NE(FindHang(s)->advice().find("disks"), std::string::npos);
}

TEST_F(Hang, NamesTheRankBehindWhenAllWait) {
  const Situation s = Of({{.seq = 1813}, {.seq = 1811}, {.seq = 1813}});
  EXPECT_EQ(FindHang(s)->rank(), 1u);
}

TEST_F(Hang, NamesNobodyWhenAllWaitForTheSame) {
  const std::optional<v1::FindingRecord> finding = FindHang(Of({{}, {}, {}}));
  ASSERT_TRUE(finding.has_value());
  EXPECT_FALSE(finding->has_rank());
  EXPECT_EQ(finding->text(), "no step for 8.0 s: all ranks wait, at #1812 all-gather block.7");
  EXPECT_NE(finding->advice().find("network"), std::string::npos);
}

TEST_F(Hang, SaysThatAllAreBusyWhereNobodyWaits) {
  const Seen busy{.waiting = false, .phase = 5};
  std::optional<v1::FindingRecord> finding = FindHang(Of({busy, busy}));
  ASSERT_TRUE(finding.has_value());
  EXPECT_EQ(
      finding->text(),
      "no step for 8.0 s: all ranks are in optimizer, last launched #1812 all-gather block.7");
  EXPECT_EQ(finding->advice().find("network"), std::string::npos) << finding->advice();
  Seen other = busy;
  other.phase = 2;
  EXPECT_NE(FindHang(Of({busy, other}))->text().find("all ranks are busy, in different phases"),
            std::string::npos);
  Seen asleep = busy;
  asleep.process = "D";
  finding = FindHang(Of({asleep, asleep}));
  EXPECT_NE(finding->advice().find("disks"), std::string::npos) << finding->advice();
  // Alone it can only be this one.
  finding = FindHang(Of({busy}));
  EXPECT_EQ(finding->rank(), 0u);
  EXPECT_TRUE(finding->has_rank());
  EXPECT_NE(finding->text().find("rank 0 has been in optimizer for 8.0 s"), std::string::npos)
      << finding->text();
}

TEST_F(Hang, IsCountedFromThreeStepsOrFiveSeconds) {
  Situation s = Of({{}, {.process = "T"}});
  s.quiet_ms = 4'999;
  EXPECT_FALSE(FindHang(s).has_value());
  s.quiet_ms = 5'000;
  EXPECT_TRUE(FindHang(s).has_value());
  s.median_step_ms = 3'000;
  EXPECT_FALSE(FindHang(s).has_value()) << "less than three steps of 3 s";
  s.quiet_ms = 9'000;
  EXPECT_TRUE(FindHang(s).has_value());
  s.median_step_ms = 0;
  EXPECT_FALSE(FindHang(s).has_value()) << "the first step has a limit of its own";
  s.quiet_ms = 60'000;
  EXPECT_TRUE(FindHang(s).has_value());
}

TEST_F(Hang, SavesAndEvaluationsHaveTheirOwnLimit) {
  for (const uint32_t phase : {6u, 7u}) {
    Situation s = Of({{}, {.waiting = false, .phase = phase}});
    s.quiet_ms = 20'000;
    EXPECT_FALSE(FindHang(s).has_value()) << phase;
    s.quiet_ms = 60'000;
    EXPECT_TRUE(FindHang(s).has_value()) << phase;
    s = Of({{.phase = phase}, {.waiting = false, .process = "T", .phase = phase}});
    EXPECT_TRUE(FindHang(s).has_value()) << "a stopped rank saves nothing, nor who waits for it";
  }
}

TEST_F(Hang, IsNoneWhileARankMovesOrIsNotHeard) {
  EXPECT_FALSE(FindHang(Of({{}, {.phase_age_ms = 100}})).has_value()) << "it moves";
  EXPECT_FALSE(FindHang(Of({{}, {}}, /*age_ms=*/11'000)).has_value()) << "heads are old";
  Situation s = Of({{}, {}});
  s.world = 3;
  EXPECT_FALSE(FindHang(s).has_value()) << "of one rank nothing is known";
}

using Mismatch = Diagnosis;

TEST_F(Mismatch, NamesTheRankThatIsAloneAndBothOperations) {
  const std::optional<v1::FindingRecord> finding =
      FindMismatch(Of({{}, {.op = 4, .count = 64}, {}}));
  ASSERT_TRUE(finding.has_value());
  EXPECT_EQ(finding->rank(), 1u);
  EXPECT_EQ(finding->text(),
            "rank 1 launched #1812 reduce-scatter block.7 of 64 elements, ranks 0 and 2 launched "
            "#1812 all-gather block.7 of 100 elements: the ranks do not run the same program");
}

TEST_F(Mismatch, OfTwoNobodyIsAloneButBothAreTold) {
  const std::optional<v1::FindingRecord> finding = FindMismatch(Of({{}, {.count = 64}}));
  ASSERT_TRUE(finding.has_value());
  EXPECT_FALSE(finding->has_rank());
  EXPECT_NE(finding->text().find("rank 0 launched"), std::string::npos);
  EXPECT_NE(finding->text().find("rank 1 launched"), std::string::npos);
}

TEST_F(Mismatch, RanksAtDifferentNumbersAreOnlyApart) {
  EXPECT_FALSE(FindMismatch(Of({{}, {.seq = 1813, .op = 4}})).has_value());
  EXPECT_FALSE(FindMismatch(Of({{}, {}})).has_value());
  EXPECT_FALSE(FindMismatch(Of({{.seq = 0}, {.seq = 0, .op = 4}})).has_value()) << "none launched";
}

// ---- stragglers ----

struct Spent {
  double compute = 80;
  double data = 1;
  double waited = 20;
  double save = 0;
};

v1::RankHead HeadAt(uint32_t rank, uint64_t step, const Spent& per_step) {
  const auto ns = [step](double ms) { return static_cast<uint64_t>(ms * 1e6) * step; };
  v1::RankHead head;
  head.set_rank(rank);
  head.set_step(step);
  // Waiting is inside of the phases that wait.
  for (uint32_t phase = 0; phase < 10; ++phase) {
    head.add_phase_ns(phase == 2   ? ns(per_step.data)
                      : phase == 3 ? ns(per_step.compute)
                      : phase == 4 ? ns(per_step.waited)
                      : phase == 6 ? ns(per_step.save)
                                   : 0);
  }
  head.set_waited_ns(ns(per_step.waited));
  return head;
}

std::vector<v1::FindingRecord> StragglersOf(const std::vector<Spent>& ranks, uint64_t steps = 20,
                                            uint64_t windows = 2, int64_t window_ms = 5'000) {
  const auto world = static_cast<uint32_t>(ranks.size());
  Observation observation;
  for (uint64_t window = 0; window <= windows; ++window) {
    for (uint32_t rank = 0; rank < world; ++rank) {
      observation.Add(HeadAt(rank, 5 + window * steps, ranks[rank]), world,
                      1000 + static_cast<int64_t>(window) * window_ms);
    }
  }
  Situation s;
  s.ranks = &observation;
  s.world = world;
  return FindStragglers(s);
}

TEST(Straggler, IsNamedWithItsPhaseAndTheOthersWaitingIsNotTheirs) {
  // The slow one waits for nobody; what the others wait is charged to it.
  const std::vector<v1::FindingRecord> found =
      StragglersOf({{.waited = 60}, {.compute = 130, .waited = 10}, {.waited = 60}});
  ASSERT_EQ(found.size(), 1u);
  EXPECT_EQ(found[0].rank(), 1u);
  EXPECT_EQ(found[0].text(),
            "rank 1 computes for 130 ms a step, the others for 80 ms (1.6 times as long): they "
            "wait for it");
}

TEST(Straggler, EveryPartOfTheStepIsCompared) {
  const auto lead = [](const Spent& slow) {
    const std::vector<v1::FindingRecord> found = StragglersOf({{}, {}, slow});
    return found.size() == 1 && found[0].rank() == 2 ? found[0].text().substr(0, 16) : "none";
  };
  EXPECT_EQ(lead({.data = 40, .waited = 0}), "rank 2 reads dat");
  EXPECT_EQ(lead({.waited = 0, .save = 30}), "rank 2 saves for");
  EXPECT_EQ(lead({.waited = 50}), "rank 2 exchanges");
  EXPECT_EQ(lead({}), "none");
}

TEST(Straggler, SmallDifferencesAndShortWindowsAreNoise) {
  EXPECT_TRUE(StragglersOf({{}, {.compute = 100, .waited = 0}}).empty()) << "1.25 times";
  EXPECT_TRUE(StragglersOf({{}, {.data = 3}}).empty()) << "three times, but of nothing";
  EXPECT_TRUE(StragglersOf({{}, {.compute = 400}}, 19).empty()) << "19 steps";
  EXPECT_EQ(StragglersOf({{}, {.compute = 400, .waited = 0}}, 20).size(), 1u);
  EXPECT_TRUE(StragglersOf({{.compute = 400}}).empty()) << "alone";
}

TEST(Straggler, IsSlowInWindowsInARowThatCoverTenSeconds) {
  const std::vector<Spent> ranks = {{}, {.compute = 400, .waited = 0}};
  EXPECT_TRUE(StragglersOf(ranks, 20, 1, 60'000).empty()) << "one window";
  EXPECT_TRUE(StragglersOf(ranks, 20, 4, 2'000).empty()) << "8 s";
  EXPECT_EQ(StragglersOf(ranks, 20, 5, 2'000).size(), 1u);
  // Slow in the first and the last window, not between them.
  Observation observation;
  double spent = 0;
  for (uint64_t window = 0; window < 4; ++window) {
    spent += window == 2 ? 80 : 400;
    v1::RankHead slow = HeadAt(1, 20 * (window + 1), {});
    slow.set_phase_ns(3, static_cast<uint64_t>(spent * 20e6));
    observation.Add(HeadAt(0, 20 * (window + 1), {}), 2, static_cast<int64_t>(window) * 4'000);
    observation.Add(slow, 2, static_cast<int64_t>(window) * 4'000);
  }
  Situation s;
  s.ranks = &observation;
  s.world = 2;
  EXPECT_TRUE(FindStragglers(s).empty());
}

// What ranks do in an evaluation is no part of a step, and they wait for each other there.
TEST(Straggler, AnEvaluatingJobHasNone) {
  Observation observation;
  for (uint64_t window = 0; window < 5; ++window) {
    for (uint32_t rank = 0; rank < 2; ++rank) {
      v1::RankHead head = HeadAt(rank, 5 + window * 20, {});
      head.set_phase_ns(7, window * (rank == 0 ? 9'000'000'000 : 4'000'000'000));
      observation.Add(head, 2, static_cast<int64_t>(window) * 8'000);
    }
  }
  Situation s;
  s.ranks = &observation;
  s.world = 2;
  EXPECT_TRUE(observation.confirms());
  EXPECT_TRUE(FindStragglers(s).empty());
}

// A page may hold anything: older trainers send no times, numbers may go back.
TEST(Observation, OddHeadsAreTaken) {
  Observation observation;
  v1::RankHead head;
  head.set_rank(7);
  observation.Add(head, 2, 0);
  EXPECT_TRUE(observation.ranks().empty()) << "no rank of this attempt";
  for (const uint64_t step : {100, 200, 50, 300}) {
    for (uint32_t rank = 0; rank < 2; ++rank) {
      head.set_rank(rank);
      head.set_step(step);
      head.set_waited_ns(step == 300 ? 0 : step);
      observation.Add(head, 2, 0);
    }
  }
  EXPECT_EQ(observation.times().size(), 2u);
  EXPECT_GE(observation.times().at(0).compute, 0.0);
}

}  // namespace
}  // namespace heddle::state
