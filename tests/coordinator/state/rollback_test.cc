// A job whose ranks ask to go back (training-runtime.md 16.2): the next attempt starts from the
// newest checkpoint that is old enough, without the data, now and ever after; three times.
#include "coordinator/state/rollback.h"

#include <gtest/gtest.h>

#include "tests/coordinator/state/cluster.h"

namespace heddle::state {
namespace {

namespace v1 = heddle::v1;

struct Saving : Two {
  // A committed checkpoint of the running attempt.
  void Save(JobId job, uint64_t step) {
    Open(*this, job, step, /*request=*/step);
    for (const uint32_t rank : {0u, 1u}) {
      const std::string worker = rank == 0 ? "a" : "b";
      Do(event::ShardSealed{worker, SessionOf(worker),
                            SealOf(*this, job, rank, step, /*request=*/step + 1)});
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

  // `from` > 0: the ranks say that they went on from the checkpoint of that step.
  Outcome StartAgain(JobId job, uint64_t from = 0) {
    const Outcome placed = Place(job, {"a", "b"});
    EXPECT_TRUE(placed.status.ok()) << placed.status;
    TellAll(job, v1::TASK_STATE_PREPARING);
    TellAll(job, v1::TASK_STATE_READY);
    for (const uint32_t task : {0u, 1u}) {
      v1::TaskReport report = Report(job, task, v1::TASK_STATE_RUNNING);
      report.add_joined_ranks(task);
      if (from > 0) report.set_start_step(from);
      Tell(job, report);
    }
    return placed;
  }

  JobId RunningWithRollback() {
    event::JobSubmitted submit = Submission(2);
    submit.config.mutable_training()->set_nan_policy(v1::TrainingConfig::NAN_POLICY_ROLLBACK);
    const JobId job = Do(submit).job;
    StartAgain(job);
    return job;
  }

  void SaveVerified(JobId job, uint64_t step) {
    Save(job, step);
    Do(event::CheckpointVerified{{job, Fence{Attempt(job).fence()}, step}, true, ""});
  }

  Outcome SubmitFrom(JobId parent, uint64_t step) {
    event::JobSubmitted submit = Submission(2);
    for (const CheckpointPtr& one : state.CheckpointsOf(parent)) {
      if (one->step() == step) submit.resume_from = KeyOf(*one);
    }
    EXPECT_TRUE(submit.resume_from.has_value()) << step;
    return Do(submit);
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
  Saving c;
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
  Saving c;
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
  Saving c;
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
  Saving c;
  const JobId job = c.Running();
  c.Save(job, 10);
  c.RollBack(job, 9, 6);
  c.StartAgain(job);
  EXPECT_TRUE(c.Offered(job).empty());
  EXPECT_EQ(c.state.job(job)->skipped_size(), 1);
}

TEST(Rollback, ThreeInAThousandStepsThenTheJobFailsWithTheCause) {
  Saving c;
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
  Saving c;
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
  Saving c;
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

// An update that ruins the weights with finite numbers may come just before a save.
TEST(Rollback, ACheckpointThatIsBadFromItsFirstStepIsLeftBehindToo) {
  Saving c;
  const JobId job = c.Running();
  for (const uint64_t step : {10, 20, 30}) c.Save(job, step);
  c.RollBack(job, 33, 30);
  c.StartAgain(job, 30);
  EXPECT_EQ(c.Offered(job), (Steps{30, 20, 10}));
  c.RollBack(job, 33, 30);
  EXPECT_EQ(c.JobState(job), "QUEUED");
  c.StartAgain(job, 20);
  EXPECT_EQ(c.Offered(job), (Steps{20, 10}));
  // One that has made good steps since says nothing against what it came from.
  c.RollBack(job, 26, 25);
  c.StartAgain(job, 20);
  EXPECT_EQ(c.Offered(job), (Steps{20, 10}));
}

TEST(Rollback, WhatIsAskedForCountsWhereItGoesFurtherBackThanTheStart) {
  Saving c;
  const JobId job = c.Running();
  for (const uint64_t step : {10, 17, 20}) c.Save(job, step);
  c.RollBack(job, 22, 20);
  c.StartAgain(job, 20);
  c.RollBack(job, 21, 16);  // two of the steps that were bad are older than the checkpoint
  c.StartAgain(job, 10);
  EXPECT_EQ(c.Offered(job), (Steps{10}));
}

TEST(Rollback, RetentionKeepsOneThatIsOldEnough) {
  Saving c;
  const JobId job = c.RunningWithRollback();
  for (uint64_t step = 1; step <= 20; ++step) c.SaveVerified(job, step);
  c.RollBack(job, 21, 17);  // a loss that has been high for four steps
  c.StartAgain(job);
  const Steps offered = c.Offered(job);
  ASSERT_FALSE(offered.empty()) << c.state.job(job)->text();
  EXPECT_EQ(offered.front(), 17u);
  // Not more than it takes: 16 to 20, and the newest three are among them.
  size_t kept = 0;
  for (const CheckpointPtr& one : c.state.CheckpointsOf(job)) {
    kept += one->state() == v1::CHECKPOINT_STATE_COMMITTED ? 1 : 0;
  }
  EXPECT_EQ(kept, 5u);
}

TEST(Rollback, WhereAllThatIsOldEnoughIsGoneTheJobFailsAndSaysSo) {
  Saving c;
  const JobId job = c.Running();
  for (const uint64_t step : {10, 20, 30, 40, 50}) c.SaveVerified(job, step);
  c.RollBack(job, 52, 15);
  EXPECT_EQ(c.JobState(job), "DONE");
  EXPECT_EQ(c.state.job(job)->reason(), "NO_CHECKPOINT");
  const std::string text = c.state.job(job)->text();
  for (const char* part : {"step 15", "@10", "EXPIRED", "heddle resume", "12 deviations"}) {
    EXPECT_NE(text.find(part), std::string::npos) << part << ": " << text;
  }
  // Who resumes it chose to.
  EXPECT_TRUE(c.Do(event::JobResumed{{"me", "", "", 0}, job, {}}).status.ok());
  c.StartAgain(job);
  EXPECT_TRUE(c.Offered(job).empty());
}

TEST(Rollback, AJobResumedFromARolledBackOneGoesItsWay) {
  Saving c;
  const JobId parent = c.Running();
  for (const uint64_t step : {10, 20, 30}) c.Save(parent, step);
  c.RollBack(parent, 32, 25);
  const Outcome refused = c.SubmitFrom(parent, 30);
  EXPECT_EQ(refused.status.code(), StatusCode::kFailedPrecondition);
  EXPECT_NE(Message(refused.status).find("left behind"), std::string::npos) << refused.status;
  const Outcome taken = c.SubmitFrom(parent, 20);
  ASSERT_TRUE(taken.status.ok()) << taken.status;
  ASSERT_EQ(c.state.job(taken.job)->skipped_size(), 1);
  EXPECT_EQ(c.state.job(taken.job)->skipped(0).first(), 25u * 8);
  c.StartAgain(taken.job, 20);
  EXPECT_EQ(c.Offered(taken.job), (Steps{20, 10}));
}

// The parent goes back after the child was submitted; the child itself goes back behind its start.
TEST(Rollback, LimitsOfBothJobsHoldForWhatTheParentMade) {
  Saving c;
  const JobId parent = c.Running();
  for (const uint64_t step : {10, 20, 30, 40}) c.Save(parent, step);
  const JobId child = c.SubmitFrom(parent, 40).job;
  c.RollBack(parent, 42, 35);
  c.StartAgain(child, 30);
  EXPECT_EQ(c.Offered(child), (Steps{30, 20, 10}));
  c.RollBack(child, 33, 30);
  EXPECT_EQ(c.JobState(child), "QUEUED");
  c.StartAgain(child, 20);
  EXPECT_EQ(c.Offered(child), (Steps{20, 10}));
}

TEST(Rollback, AResumedJobNeverFallsBackToNothing) {
  Saving c;
  const JobId parent = c.Running();
  c.Save(parent, 40);
  const JobId child = c.SubmitFrom(parent, 40).job;
  c.StartAgain(child, 40);
  c.RollBack(child, 43, 40);
  EXPECT_EQ(c.JobState(child), "DONE");
  EXPECT_EQ(c.state.job(child)->reason(), "NO_CHECKPOINT");
  EXPECT_NE(c.state.job(child)->text().find("@40, is newer"), std::string::npos)
      << c.state.job(child)->text();
}

}  // namespace
}  // namespace heddle::state
