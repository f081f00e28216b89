// Behaviour that the tables alone do not show: fences, commits, requests repeated, registration,
// retries, and what the simulation found.
#include "tests/coordinator/state/cluster.h"

namespace heddle::state {
namespace {

namespace v1 = heddle::v1;

v1::CheckpointVerdict VerdictOf(const Outcome& outcome) {
  for (const Effect& effect : outcome.effects) {
    if (const auto* reply = std::get_if<effect::SendCheckpointReply>(&effect)) {
      return reply->reply.reply().verdict();
    }
  }
  ADD_FAILURE() << "no verdict";
  return v1::CHECKPOINT_VERDICT_UNAVAILABLE;
}

TEST(Apply, RepeatedRequestGivesTheSameJobAndNoNewEvent) {
  Two c;
  const event::JobSubmitted submit = c.Submission();
  const JobId job = c.Do(submit).job;
  event::JobSubmitted again = submit;
  again.id = JobId{99};
  const Outcome repeat = c.Do(again);
  EXPECT_TRUE(repeat.status.ok());
  EXPECT_EQ(repeat.job, job);
  EXPECT_TRUE(repeat.events.empty());
  again.request.digest = "other";
  EXPECT_EQ(c.Do(again).status.code(), absl::StatusCode::kAlreadyExists);
  EXPECT_EQ(c.state.jobs().size(), 1u);
}

TEST(Apply, FenceRisesAtStartAndEndOfEveryAttempt) {
  Two c;
  const JobId job = c.Submit();
  const uint64_t queued = c.state.job(job)->current_fence();
  c.Place(job, {"a", "b"});
  const uint64_t placed = c.state.job(job)->current_fence();
  EXPECT_GT(placed, queued);
  EXPECT_EQ(c.Attempt(job).fence(), placed);
  EXPECT_EQ(PermitsFor(c.state, "a", c.policy).size(), 1u);
  c.TellAll(job, v1::TASK_STATE_PREPARING);
  c.TellExit(job, 0, 1);
  c.TellExit(job, 1, 0, 9);
  EXPECT_EQ(c.AttemptState(job), "ENDED");
  EXPECT_GT(c.state.job(job)->current_fence(), placed);
  EXPECT_TRUE(PermitsFor(c.state, "a", c.policy).empty());
}

TEST(Apply, CommitsWhenTheLastRankSealsAndTellsEveryRank) {
  Two c;
  const JobId job = c.Running();
  EXPECT_EQ(VerdictOf(Open(c, job, 10)), v1::CHECKPOINT_VERDICT_OK);
  EXPECT_EQ(VerdictOf(c.Do(event::ShardSealed{"a", c.SessionOf("a"), SealOf(c, job, 0, 10)})),
            v1::CHECKPOINT_VERDICT_OK);
  const Outcome last = c.Do(event::ShardSealed{"b", c.SessionOf("b"), SealOf(c, job, 1, 10)});
  EXPECT_EQ(VerdictOf(last), v1::CHECKPOINT_VERDICT_COMMITTED);
  EXPECT_EQ(Count<effect::SendCheckpointReply>(last), 2);
  EXPECT_EQ(c.state.job(job)->last_checkpoint().step(), 10u);
  // The same seal again is answered alike; another one under its name is not taken.
  v1::RankSealShard other = SealOf(c, job, 1, 10);
  EXPECT_EQ(VerdictOf(c.Do(event::ShardSealed{"b", c.SessionOf("b"), other})),
            v1::CHECKPOINT_VERDICT_COMMITTED);
  other.mutable_seal()->mutable_files(0)->set_digest(std::string(16, 'x'));
  EXPECT_EQ(VerdictOf(c.Do(event::ShardSealed{"b", c.SessionOf("b"), other})),
            v1::CHECKPOINT_VERDICT_REFUSED);
}

TEST(Apply, RefusesTheCommitOfAFencedAttempt) {
  Two c;
  const JobId job = c.Running();
  Open(c, job, 10);
  c.Do(event::ShardSealed{"a", c.SessionOf("a"), SealOf(c, job, 0, 10)});
  const v1::RankSealShard late = SealOf(c, job, 1, 10);
  c.Do(event::WorkerSuspect{"a", c.SessionOf("a"), "silent"});
  c.Do(event::WorkerLost{"a", c.SessionOf("a")});
  EXPECT_EQ(c.AttemptState(job), "FENCING");
  EXPECT_EQ(c.JobState(job), "QUEUED") << "a train job goes on at once (L7)";
  EXPECT_EQ(VerdictOf(c.Do(event::ShardSealed{"b", c.SessionOf("b"), late})),
            v1::CHECKPOINT_VERDICT_FENCED);
  EXPECT_EQ(c.state.job(job)->last_checkpoint().step(), 0u);
  EXPECT_EQ(c.state.job(job)->restarts(), 0u) << "a lost node burns no budget";
}

TEST(Apply, KeepsTheNodeOfALostTaskBookedUntilItIsProvedDead) {
  Two c;
  const JobId job = c.Running();
  c.Do(event::WorkerSuspect{"a", c.SessionOf("a"), "silent"});
  c.Do(event::WorkerLost{"a", c.SessionOf("a")});
  c.TellExit(job, 1, 0, 9);
  EXPECT_EQ(c.state.nodes().at("a").booked.size(), 1u);
  EXPECT_TRUE(c.state.nodes().at("b").booked.empty());
  c.Pass(c.policy.max_orphan_ms + c.policy.orphan_margin_ms - 1);
  EXPECT_EQ(c.state.nodes().at("a").booked.size(), 1u);
  c.Pass(2);
  EXPECT_TRUE(c.state.nodes().at("a").booked.empty());
  EXPECT_EQ(Name(c.state.attempt(job, 1)->outcome()), "LOST");
}

TEST(Apply, CollectsErrorsBeforeItKillsAndNamesTheEarliestRootCause) {
  Two c;
  const JobId job = c.Running();
  c.now_ms += 100;
  c.TellExit(job, 1, 86);  // lost its peer, told first
  EXPECT_EQ(c.AttemptState(job), "STOPPING");
  v1::TaskReport root = c.Report(job, 0, v1::TASK_STATE_EXITED);
  v1::RankOutcome& exit = *root.add_exits();
  exit.set_rank(0);
  exit.set_signal(9);
  exit.set_at(c.now_ms - 50);
  c.Tell(job, root);
  EXPECT_EQ(c.AttemptState(job), "ENDED");
  EXPECT_EQ(c.state.attempt(job, 1)->cause().code(), "KILLED_BY_SIGNAL");
  EXPECT_EQ(c.state.attempt(job, 1)->cause().rank(), 0u);
}

TEST(Apply, KillsTheOthersAfterTheCollectingTime) {
  Two c;
  const JobId job = c.Running();
  const Outcome first = c.TellExit(job, 0, 1);
  EXPECT_EQ(Count<effect::SendStop>(first), 0);
  c.now_ms += c.policy.collect_ms;
  const Outcome kill = c.Do(event::TimerFired{*c.state.timers().begin()});
  ASSERT_EQ(Count<effect::SendStop>(kill), 1);
  for (const Effect& effect : kill.effects) {
    if (const auto* stop = std::get_if<effect::SendStop>(&effect)) {
      EXPECT_EQ(stop->worker, "b");
      EXPECT_TRUE(stop->stop.kill_now());
    }
  }
}

TEST(Apply, RegistrationSettlesEveryTask) {
  Two c;
  const JobId running = c.Running();
  const JobId fresh = c.Submit(1);
  c.Place(fresh, {"a"});
  v1::RegisterRequest request;
  request.set_worker_id("a");
  request.set_instance("boot1");
  request.set_session(++c.session);
  request.mutable_capacity()->set_cpus(8);
  *request.add_tasks() = c.Report(running, 0, v1::TASK_STATE_RUNNING);
  v1::TaskReport stranger;
  stranger.set_fence(5);
  stranger.set_state(v1::TASK_STATE_RUNNING);
  *request.add_tasks() = stranger;
  const Outcome outcome = c.Do(event::WorkerRegistered{request});
  ASSERT_TRUE(outcome.registration.has_value());
  EXPECT_EQ(outcome.registration->tasks(0).verdict(), v1::TASK_VERDICT_ADOPT);
  EXPECT_EQ(outcome.registration->tasks(1).verdict(), v1::TASK_VERDICT_KILL_FENCED);
  EXPECT_EQ(Count<effect::SendAssign>(outcome), 1) << "never acknowledged: assigned again";
  EXPECT_EQ(c.AttemptState(fresh), "ALLOCATED");

  request.set_session(++c.session);
  request.clear_tasks();
  c.Do(event::WorkerRegistered{request});
  EXPECT_EQ(c.AttemptState(running), "STOPPING")
      << "an acknowledged task that is not there is gone";
  request.set_session(1);
  EXPECT_EQ(c.Do(event::WorkerRegistered{request}).status.code(), absl::StatusCode::kAborted);
}

// Found by the simulation (seed 7089).
// Its daemon saw late that the shim was killed; until then there was but the peer's complaint. It
// is no failure of the job: neither budget nor back-off, and never the same failure twice.
TEST(Apply, ShimLostIsTheRootAlsoAfterTheCollectingTime) {
  Two c;
  const JobId job = c.Running();
  c.TellExit(job, 1, 86);
  c.Pass(c.policy.collect_ms + 10);
  EXPECT_EQ(c.Attempt(job).cause().code(), "PEER_FAILED");
  v1::TaskReport late = c.Report(job, 0, v1::TASK_STATE_EXITED);
  v1::RankOutcome& exit = *late.add_exits();
  exit.set_rank(0);
  exit.set_at(c.now_ms);
  exit.set_signal(9);
  exit.set_category("CONTROL_PLANE");
  exit.set_detail("SHIM_LOST: the process that owned the ranks was killed");
  c.Tell(job, late);
  EXPECT_EQ(c.AttemptState(job), "ENDED");
  EXPECT_EQ(c.Attempt(job).cause().code(), "SHIM_LOST");
  EXPECT_EQ(c.JobState(job), "QUEUED") << "no back-off";
  EXPECT_EQ(c.state.job(job)->failures(), 0u);
}

// A rank that our own KILL ends tells nothing about the cause.
TEST(Apply, RanksKilledByOrderLeaveThePeersComplaintTheCause) {
  Two c;
  const JobId job = c.Running();
  c.TellExit(job, 1, 86);
  c.Pass(c.policy.collect_ms + 10);
  c.TellExit(job, 0, 0, 9);
  EXPECT_EQ(c.AttemptState(job), "ENDED");
  EXPECT_EQ(c.Attempt(job).cause().code(), "PEER_FAILED");
}

// Of a worker whose machine lost power: its count of reports fell back, its tasks are gone.
TEST(Apply, EndOfATaskIsHeardWhateverItsNumber) {
  Two c;
  const JobId job = c.Running();
  v1::TaskReport last = c.Report(job, 1, v1::TASK_STATE_EXITED);
  last.set_seq(1);
  ASSERT_LT(last.seq(), c.state.task(job, 1, 1)->seq());
  v1::TaskReport old = c.Report(job, 1, v1::TASK_STATE_PREPARING);
  old.set_seq(1);
  c.Tell(job, old);
  EXPECT_EQ(Name(c.state.task(job, 1, 1)->state()), std::string("RUNNING")) << "old news";
  c.Tell(job, last);
  EXPECT_EQ(Name(c.state.task(job, 1, 1)->state()), std::string("EXITED"));

  v1::RegisterRequest request;
  request.set_worker_id("a");
  request.set_instance("boot2");
  request.set_session(++c.session);
  *request.add_tasks() = c.Report(job, 0, v1::TASK_STATE_GONE);
  request.mutable_tasks(0)->set_seq(0);
  const Outcome outcome = c.Do(event::WorkerRegistered{request});
  EXPECT_EQ(outcome.registration->tasks(0).verdict(), v1::TASK_VERDICT_FORGET);
  EXPECT_EQ(c.AttemptState(job), "ENDED") << "told to forget what was not heard";
}

// A worker without a task that it once took answers no order: it is asked what it has.
TEST(Apply, WorkerOfATaskThatDoesNotEndRegistersAnewOnceAMinute) {
  Two c;
  const JobId job = c.Running();
  c.Stop(job, v1::STOP_VERB_CANCEL, 0);
  c.TellExit(job, 0, 0);
  const auto stale = [&](int64_t ms) {
    int count = 0;
    const int64_t end = c.now_ms + ms;
    while (!c.state.timers().empty() && c.state.timers().begin()->at_ms <= end) {
      c.now_ms = std::max(c.now_ms, c.state.timers().begin()->at_ms);
      count += Count<effect::SendStale>(c.Do(event::TimerFired{*c.state.timers().begin()}));
    }
    c.now_ms = end;
    return count;
  };
  int asked = stale(c.policy.term_ms + c.policy.unkillable_ms + 1'000);
  ASSERT_EQ(c.AttemptState(job), "FENCING");
  EXPECT_EQ(asked, 0) << "the ordinary end of a task needs no registration";
  asked = stale(10 * c.policy.settle_ms);
  EXPECT_GE(asked, 9);
  EXPECT_LE(asked, 11);
  c.Join("b");  // without the task
  EXPECT_EQ(c.AttemptState(job), "ENDED");
}

// Its daemon was stopped and goes on: answers to its heartbeats alone would keep its ranks alive.
TEST(Apply, LostWorkerWhoseStreamHeldIsToldToRegisterAnew) {
  Two c;
  const JobId job = c.Running();
  const uint64_t session = c.SessionOf("a");
  c.Do(event::WorkerSuspect{"a", session, "no heartbeat"});
  const Outcome lost = c.Do(event::WorkerLost{"a", session});
  ASSERT_EQ(c.AttemptState(job), "FENCING");
  int told = 0;
  for (const Effect& effect : lost.effects) {
    const auto* stale = std::get_if<effect::SendStale>(&effect);
    told += stale != nullptr && stale->worker == "a" && stale->session == session ? 1 : 0;
  }
  EXPECT_EQ(told, 1);
}

TEST(Apply, NodeIsDrainedWhenItsLastTaskIsGone) {
  Two c;
  const JobId job = c.Running();
  const uint64_t session = c.SessionOf("a");
  c.Do(event::NodeAdministered{{"me", "", "", 0}, "a", v1::NODE_VERB_DRAIN, "why", {}});
  c.Do(event::WorkerSuspect{"a", session, "no heartbeat"});
  c.Do(event::WorkerLost{"a", session});
  c.TellExit(job, 1, 0, 9);
  ASSERT_EQ(c.AttemptState(job), "FENCING");
  EXPECT_EQ(c.state.worker("a")->admin(), v1::WORKER_ADMIN_DRAINING);
  c.Pass(c.policy.max_orphan_ms + c.policy.orphan_margin_ms + 1'000);
  EXPECT_EQ(c.AttemptState(job), "ENDED");
  EXPECT_EQ(c.state.worker("a")->admin(), v1::WORKER_ADMIN_DRAINED);
}

// Found by the simulation (seed 22691): nobody had heard of the instance in between.
TEST(Apply, LateRegistrationOfAnInstanceNeverHeardOfKeepsNobodyOut) {
  Two c;
  const auto registers = [&c](const char* instance, uint64_t boot) {
    v1::RegisterRequest request;
    request.set_worker_id("a");
    request.set_instance(instance);
    request.set_boot(boot);
    request.set_session(++c.session);
    return c.Do(event::WorkerRegistered{request}).status.code();
  };
  EXPECT_EQ(registers("boot3", 3), StatusCode::kOk);
  EXPECT_EQ(registers("boot2", 2), StatusCode::kAborted);
  EXPECT_EQ(registers("boot3", 3), StatusCode::kOk);
  EXPECT_EQ(registers("boot4", 4), StatusCode::kOk);
  EXPECT_EQ(registers("boot3", 3), StatusCode::kAborted);
}

TEST(Apply, LateRegistrationOfBeforeARestartIsRefused) {
  Two c;
  v1::RegisterRequest request;
  request.set_worker_id("a");
  request.set_instance("boot2");
  request.set_session(1);
  request.mutable_capacity()->set_cpus(8);
  EXPECT_TRUE(c.Do(event::WorkerRegistered{request}).status.ok());
  const JobId job = c.Running();
  request.set_instance("boot1");
  request.set_session(1'000);
  EXPECT_EQ(c.Do(event::WorkerRegistered{request}).status.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(c.AttemptState(job), "RUNNING");
}

TEST(Apply, StaleSessionIsToldToRegisterAnew) {
  Two c;
  const JobId job = c.Running();
  const Outcome outcome =
      c.Do(event::TaskReported{"a", 999, c.Report(job, 0, v1::TASK_STATE_EXITED)});
  EXPECT_EQ(outcome.status.code(), absl::StatusCode::kAborted);
  EXPECT_EQ(Count<effect::SendStale>(outcome), 1);
  EXPECT_EQ(c.AttemptState(job), "RUNNING");
}

TEST(Apply, FirstFailureWaitsByBackOffAndTheSameTwiceEndsTheJob) {
  Two c;
  const JobId job = c.Running();
  c.TellExit(job, 0, 1);
  c.TellExit(job, 1, 86);
  EXPECT_EQ(c.JobState(job), "BACKOFF");
  EXPECT_EQ(c.state.job(job)->restarts(), 1u);
  c.Pass(15'000);
  ASSERT_EQ(c.JobState(job), "QUEUED");
  c.Place(job, {"a", "b"});
  c.TellAll(job, v1::TASK_STATE_PREPARING);
  c.TellExit(job, 0, 1);
  c.TellExit(job, 1, 86);
  EXPECT_EQ(c.JobState(job), "DONE");
  EXPECT_EQ(c.state.job(job)->reason(), "SAME_FAILURE");
}

TEST(Apply, ProgressMakesTheFirstFailureRestartAtOnce) {
  Two c;
  const JobId job = c.Running();
  c.state.NoteProgress(Fence{c.Attempt(job).fence()}, 20, {c.now_ms, c.now_ms}, c.policy);
  c.TellExit(job, 0, 0, 9);
  c.TellExit(job, 1, 86);
  EXPECT_EQ(c.JobState(job), "QUEUED");
  EXPECT_EQ(c.state.job(job)->best_step(), 20u);
}

TEST(Apply, DoneJobResumesOnlyWithSomethingLeftAndKeepsItsResult) {
  Two c;
  const JobId job = c.Running();
  c.state.NoteProgress(Fence{c.Attempt(job).fence()}, 100, {c.now_ms, c.now_ms}, c.policy);
  c.TellExit(job, 0, 0);
  c.TellExit(job, 1, 0);
  EXPECT_EQ(c.JobResult(job), "SUCCEEDED");
  const ClientRequest request{"me", "", "", 0};
  EXPECT_EQ(c.Do(event::JobResumed{request, job, {}}).status.code(),
            absl::StatusCode::kFailedPrecondition);
  v1::RunConfig other = c.state.job(job)->config();
  other.mutable_model()->set_n_layers(77);
  EXPECT_EQ(c.Do(event::JobResumed{request, job, other}).status.code(),
            absl::StatusCode::kInvalidArgument);
  v1::RunConfig more = c.state.job(job)->config();
  more.mutable_training()->set_max_steps(200);
  EXPECT_TRUE(c.Do(event::JobResumed{request, job, more}).status.ok());
  EXPECT_EQ(c.JobState(job), "QUEUED");
  ASSERT_EQ(c.state.job(job)->runs_size(), 1);
  EXPECT_EQ(c.state.job(job)->runs(0).result(), v1::JOB_RESULT_SUCCEEDED);
}

// Found by the simulation (seed 4087).
TEST(Apply, ResumedJobWhoseDependencyEndedOtherwiseDoesNotWaitForEver) {
  Two c;
  const JobId first = c.Submit();
  event::JobSubmitted submit = c.Submission();
  submit.after.emplace_back().set_job(first.value);
  const JobId second = c.Do(submit).job;
  c.Stop(second, v1::STOP_VERB_PAUSE);
  c.Stop(first, v1::STOP_VERB_CANCEL);
  c.Do(event::JobResumed{{"me", "", "", 0}, second, {}});
  EXPECT_EQ(c.JobState(second), "DONE");
  EXPECT_EQ(c.state.job(second)->reason(), "DEP_NEVER");
}

TEST(Apply, ReplayOfTheJournalGivesTheRecords) {
  Two c;
  const JobId job = c.Running();
  Open(c, job, 10);
  c.Stop(job, v1::STOP_VERB_CANCEL);
  c.TellExit(job, 0, 85);
  c.TellExit(job, 1, 85);
  State replayed;
  for (const v1::EventRecord& event : c.journal) {
    v1::EventRecord stored;
    ASSERT_TRUE(stored.ParseFromString(event.SerializeAsString()));
    replayed.Commit(stored);
  }
  const auto a = c.state.Dump();
  const auto b = replayed.Dump();
  ASSERT_EQ(a.size(), b.size());
  for (size_t i = 0; i < a.size(); ++i) {
    EXPECT_EQ(a[i].SerializeAsString(), b[i].SerializeAsString());
  }
}

TEST(Apply, RefusesWhatNoCodeStandsBehindYet) {
  Two c;
  event::JobSubmitted submit = c.Submission();
  submit.config.mutable_parallel()->mutable_ranks()->set_max(4);
  EXPECT_EQ(c.Do(submit).status.code(), absl::StatusCode::kInvalidArgument);
  submit = c.Submission();
  submit.config.mutable_schedule()->set_account("team");
  EXPECT_EQ(c.Do(submit).status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(c.state.jobs().empty());
}

}  // namespace
}  // namespace heddle::state
