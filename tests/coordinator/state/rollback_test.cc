// A job whose ranks ask to go back (training-runtime.md 16.2): the next attempt starts from the
// newest checkpoint that is old enough, without the data, now and ever after; three times.
#include "coordinator/state/rollback.h"

#include <gtest/gtest.h>

#include "tests/coordinator/state/cluster.h"

namespace heddle::state {
namespace {

namespace v1 = heddle::v1;

struct Two : Cluster {
  Two() {
    Join("a");
    Join("b");
  }

  // A committed checkpoint of the running attempt.
  void Save(JobId job, uint64_t step) {
    v1::RankOpenCheckpoint open;
    open.set_job(job.value);
    open.set_fence(Attempt(job).fence());
    open.mutable_open()->set_request(step);
    open.mutable_open()->set_step(step);
    Do(event::CheckpointOpened{"a", SessionOf("a"), open, true});
    for (const uint32_t rank : {0u, 1u}) {
      v1::RankSealShard message;
      message.set_job(job.value);
      message.set_fence(Attempt(job).fence());
      message.set_rank(rank);
      v1::SealShard& seal = *message.mutable_seal();
      seal.set_request(step + rank + 1);
      seal.set_step(step);
      seal.set_rank(rank);
      v1::ShardFile& file = *seal.add_files();
      file.set_name(Str("rank-", rank, "-0.sst"));
      file.set_bytes(10);
      file.set_entries(1);
      file.set_digest(std::string(16, 'd'));
      v1::ElementRange& range = *file.add_ranges();
      range.set_tensor(1);
      range.set_tensor_class(v1::TENSOR_CLASS_MASTER);
      range.set_first(5 * rank);
      range.set_count(5);
      if (rank == 0) {
        v1::TensorInfo& tensor = *seal.add_tensors();
        tensor.set_id(1);
        tensor.set_name("w");
        tensor.add_shape(10);
        tensor.add_classes(v1::TENSOR_CLASS_MASTER);
        seal.mutable_train_state()->set_step(step);
      }
      const std::string worker = rank == 0 ? "a" : "b";
      Do(event::ShardSealed{worker, SessionOf(worker), message});
    }
    EXPECT_EQ(state.job(job)->last_checkpoint().step(), step);
  }

  // Both ranks leave at `step` and ask for a place at or before `to`.
  void RollBack(JobId job, uint64_t step, uint64_t to) {
    for (const uint32_t task : {0u, 1u}) {
      v1::TaskReport report = Report(job, task, v1::TASK_STATE_EXITED);
      v1::RankOutcome& exit = *report.add_exits();
      exit.set_rank(task);
      exit.set_at(now_ms);
      exit.set_exit_code(90);
      exit.set_category("ROLLBACK");
      exit.set_detail("loss 9 is 12 deviations above 2");
      exit.set_step(step);
      exit.set_rollback_to_step(to);
      exit.mutable_skip()->set_first(to * 8);
      exit.mutable_skip()->set_count((step - to) * 8);
      Tell(job, report);
    }
  }

  Outcome StartAgain(JobId job) {
    const Outcome placed = Place(job, {"a", "b"});
    EXPECT_TRUE(placed.status.ok()) << placed.status;
    TellAll(job, v1::TASK_STATE_PREPARING);
    TellAll(job, v1::TASK_STATE_READY);
    TellAll(job, v1::TASK_STATE_RUNNING, true);
    return placed;
  }

  // Steps that the newest attempt was offered, best first.
  std::vector<uint64_t> Offered(JobId job) const {
    std::vector<uint64_t> steps;
    for (const v1::CheckpointKeyRecord& key : Attempt(job).restore()) steps.push_back(key.step());
    return steps;
  }
};

using Steps = std::vector<uint64_t>;

TEST(Rollback, GoesOnAtOnceFromTheNewestOldEnoughCheckpointWithoutTheData) {
  Two c;
  const JobId job = c.Running();
  for (const uint64_t step : {10, 20, 30}) c.Save(job, step);
  c.RollBack(job, 32, 29);
  EXPECT_EQ(c.JobState(job), "QUEUED") << "no delay";
  EXPECT_EQ(c.state.job(job)->restarts(), 0u) << "no budget of restarts is burnt";
  EXPECT_EQ(c.Attempt(job).cause().code(), "ROLLED_BACK");
  ASSERT_EQ(c.Attempt(job).findings_size(), 1) << "once, not once a rank";
  EXPECT_EQ(c.Attempt(job).findings(0).kind(), "NUMERIC");

  const Outcome placed = c.StartAgain(job);
  EXPECT_EQ(c.Offered(job), (Steps{20, 10}));
  int assigned = 0;
  for (const Effect& effect : placed.effects) {
    if (const auto* assign = std::get_if<effect::SendAssign>(&effect)) {
      ++assigned;
      ASSERT_EQ(assign->assign.skipped_size(), 1);
      EXPECT_EQ(assign->assign.skipped(0).first(), 29u * 8);
      EXPECT_EQ(assign->assign.skipped(0).count(), 3u * 8);
    }
  }
  EXPECT_EQ(assigned, 2);
}

TEST(Rollback, WhatItLeftBehindIsNeverOfferedAgain) {
  Two c;
  const JobId job = c.Running();
  for (const uint64_t step : {10, 20, 30}) c.Save(job, step);
  c.RollBack(job, 32, 29);
  c.StartAgain(job);
  // It dies before it has saved: the checkpoint of step 30 is still on the way that was left.
  c.TellExit(job, 0, 0, 9);
  c.TellExit(job, 1, 86);
  c.Pass(60'000);
  c.StartAgain(job);
  EXPECT_EQ(c.Offered(job), (Steps{20, 10}));
  // Its own ones count, at that step and beyond.
  c.Save(job, 25);
  c.Save(job, 31);
  c.TellExit(job, 0, 0, 9);
  c.TellExit(job, 1, 86);
  c.Pass(60'000);
  c.StartAgain(job);
  EXPECT_EQ(c.Offered(job), (Steps{31, 25, 20, 10}));
}

// Retention keeps the newest: those that nobody may use must not push out the ones in use.
TEST(Rollback, WhatItLeftBehindDoesNotCountAsKept) {
  Two c;
  const JobId job = c.Running();
  for (const uint64_t step : {10, 28, 29, 30}) c.Save(job, step);
  c.RollBack(job, 31, 12);
  c.StartAgain(job);
  EXPECT_EQ(c.Offered(job), (Steps{10}));
  for (const uint64_t step : {14, 15, 16}) {
    c.Save(job, step);
    for (const CheckpointPtr& one : c.state.CheckpointsOf(job)) {
      if (one->state() == v1::CHECKPOINT_STATE_COMMITTED && !one->verified()) {
        c.Do(event::CheckpointVerified{KeyOf(*one), true, ""});
      }
    }
  }
  c.TellExit(job, 0, 0, 9);
  c.TellExit(job, 1, 86);
  c.Pass(60'000);
  c.StartAgain(job);
  const Steps offered = c.Offered(job);
  ASSERT_GE(offered.size(), 3u);
  EXPECT_EQ(Steps(offered.begin(), offered.begin() + 3), (Steps{16, 15, 14}));
}

TEST(Rollback, WithoutAnOldEnoughCheckpointItStartsAnewWithoutTheData) {
  Two c;
  const JobId job = c.Running();
  c.Save(job, 10);
  c.RollBack(job, 9, 6);
  c.StartAgain(job);
  EXPECT_TRUE(c.Offered(job).empty());
  EXPECT_EQ(c.state.job(job)->skipped_size(), 1);
}

TEST(Rollback, ThreeInAThousandStepsThenTheJobFailsWithTheCause) {
  Two c;
  const JobId job = c.Running();
  for (const uint64_t step : {100, 200, 300}) {
    c.RollBack(job, step, step - 3);
    EXPECT_EQ(c.JobState(job), "QUEUED") << step;
    c.StartAgain(job);
  }
  c.RollBack(job, 400, 397);
  EXPECT_EQ(c.JobState(job), "DONE");
  EXPECT_EQ(c.JobResult(job), "FAILED");
  EXPECT_EQ(c.state.job(job)->reason(), "NO_ROLLBACKS");
  EXPECT_NE(c.state.job(job)->text().find("12 deviations"), std::string::npos)
      << c.state.job(job)->text();
  EXPECT_EQ(c.state.job(job)->skipped_size(), 4);
  // A user may go on: the budget is new, the way is not the old one.
  EXPECT_TRUE(c.Do(event::JobResumed{{"me", "", "", 0}, job, {}}).status.ok());
  c.StartAgain(job);
  c.RollBack(job, 410, 405);
  EXPECT_EQ(c.JobState(job), "QUEUED");
}

TEST(Rollback, OnesThatAreLongPastDoNotCount) {
  Two c;
  const JobId job = c.Running();
  for (const uint64_t step : {100, 600, 1050, 1101, 1601, 2051, 2102}) {
    c.RollBack(job, step, step - 1);
    EXPECT_EQ(c.JobState(job), "QUEUED") << step;
    c.StartAgain(job);
  }
  c.RollBack(job, 2103, 2102);
  EXPECT_EQ(c.JobState(job), "DONE");
}

// A rank that lost its last words must not make a job go round for ever.
TEST(Rollback, WithoutWordsItStillCounts) {
  Two c;
  const JobId job = c.Running();
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(c.JobState(job), "ACTIVE") << i;
    c.TellExit(job, 0, 90);
    c.TellExit(job, 1, 90);
    if (i < 3) c.StartAgain(job);
  }
  EXPECT_EQ(c.JobState(job), "DONE");
  EXPECT_EQ(c.state.job(job)->reason(), "NO_ROLLBACKS");
}

}  // namespace
}  // namespace heddle::state
