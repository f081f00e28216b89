// Findings through Apply: from heads to the attempt's record, its cause, and the worker's evidence.
#include "coordinator/state/diagnosis.h"
#include "tests/coordinator/state/cluster.h"

namespace heddle::state {
namespace {

namespace v1 = heddle::v1;

class Found : public Cluster {
 public:
  Found() {
    Join("a");
    Join("b");
    event::JobSubmitted submit = Submission();
    submit.config.mutable_model()->set_n_layers(2);
    submit.config.mutable_schedule()->set_hang_kill_after(20'000);
    submit.config.mutable_parallel()->set_memory_per_rank(64 << 20);
    job = Do(submit).job;
    Place(job, {"a", "b"});
    TellAll(job, v1::TASK_STATE_PREPARING);
    TellAll(job, v1::TASK_STATE_READY);
    TellAll(job, v1::TASK_STATE_RUNNING, true);
    state.NoteProgress(fence(), 10, {now_ms, now_ms}, policy);
    now_ms += 500;
    state.NoteProgress(fence(), 11, {now_ms, now_ms}, policy);
  }

  const v1::AttemptRecord& attempt() const { return *state.attempt(job, 1); }
  Fence fence() const { return Fence{attempt().fence()}; }

  // What a heartbeat of both workers brings; rank 1 is stopped.
  void Beat(int64_t phase_age_ms, uint64_t other_fingerprint = 7) {
    for (uint32_t rank = 0; rank < 2; ++rank) {
      v1::Heartbeat::TaskBeat beat;
      v1::RankHead& head = *beat.add_heads();
      head.set_rank(rank);
      head.set_step(11);
      head.set_phase(9);
      head.set_phase_age_ms(phase_age_ms);
      head.set_seq(40);
      head.set_op(3);
      head.set_unit(1);
      head.set_fingerprint(rank == 1 ? other_fingerprint : 7);
      head.set_waiting(rank == 0);
      head.set_process_state(rank == 1 ? "T" : "S");
      state.NoteHeads(fence(), beat.heads(), {now_ms, now_ms});
    }
  }
  // As the runtime does after a heartbeat.
  std::optional<Outcome> Look() {
    std::optional<event::RanksDiagnosed> found = Diagnose(state, fence(), {now_ms, now_ms});
    if (!found.has_value()) return std::nullopt;
    return Do(*found);
  }
  v1::StackReport Stacks(uint32_t task) {
    v1::StackReport report;
    report.set_job(job.value);
    report.set_fence(fence().value);
    report.set_task(task);
    v1::RankStack& stack = *report.add_stacks();
    stack.set_rank(task);
    stack.set_text("thread 5 heddle-trainer T\n");
    return report;
  }

  JobId job;
};

TEST(Findings, AHangIsRecordedOnceAndStacksAreAskedOfEveryWorker) {
  Found c;
  c.now_ms += 6'000;
  c.Beat(6'000);
  const std::optional<Outcome> outcome = c.Look();
  ASSERT_TRUE(outcome.has_value());
  EXPECT_TRUE(outcome->status.ok());
  EXPECT_EQ(Count<effect::CollectStacks>(*outcome), 2);
  ASSERT_EQ(c.attempt().findings_size(), 1);
  EXPECT_EQ(c.attempt().findings(0).kind(), "HANG");
  EXPECT_EQ(c.attempt().findings(0).rank(), 1u);
  EXPECT_EQ(c.attempt().findings(0).node(), "b");
  EXPECT_EQ(outcome->events.front().code(), "RANKS_HUNG");
  c.now_ms += 2'000;
  c.Beat(8'000);
  EXPECT_FALSE(c.Look().has_value()) << "it is known";
  EXPECT_EQ(Name(c.attempt().state()), "RUNNING") << "told, not ended";
}

TEST(Findings, StacksBecomeEvidenceOfTheHangAndRepeatsDoNot) {
  Found c;
  c.now_ms += 6'000;
  c.Beat(6'000);
  ASSERT_TRUE(c.Look().has_value());
  const int before = c.attempt().findings(0).evidence_size();
  const event::StacksReported told{"b", c.SessionOf("b"), c.Stacks(1)};
  EXPECT_TRUE(c.Do(told).status.ok());
  ASSERT_EQ(c.attempt().findings(0).evidence_size(), before + 1);
  EXPECT_EQ(c.attempt().findings(0).evidence(before),
            "stacks of rank 1 on b:\nthread 5 heddle-trainer T");
  EXPECT_TRUE(c.Do(told).events.empty());
  // Not its task; an old session; no finding to belong to.
  EXPECT_EQ(c.Do(event::StacksReported{"a", c.SessionOf("a"), c.Stacks(1)}).status.code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(c.Do(event::StacksReported{"b", 999, c.Stacks(1)}).status.code(),
            absl::StatusCode::kAborted);
  Found calm;
  EXPECT_EQ(calm.Do(event::StacksReported{"b", calm.SessionOf("b"), calm.Stacks(1)}).status.code(),
            absl::StatusCode::kFailedPrecondition);
}

// A9: schedule.hang_kill_after ends it, and the cause says who stood where.
TEST(Findings, TheEndOfAHangNamesRankAndOperation) {
  Found c;
  c.now_ms += 6'000;
  c.Beat(6'000);
  ASSERT_TRUE(c.Look().has_value());
  c.now_ms += 13'000;
  c.Pass(0);
  EXPECT_EQ(Name(c.attempt().state()), "RUNNING") << "19 s of 20";
  c.now_ms += 1'500;
  c.Pass(0);
  EXPECT_EQ(Name(c.attempt().state()), "STOPPING");
  EXPECT_EQ(c.attempt().cause().code(), "HUNG");
  EXPECT_EQ(c.attempt().cause().rank(), 1u);
  EXPECT_EQ(c.attempt().cause().node(), "b");
  EXPECT_EQ(c.attempt().cause().detail(),
            "no step for 20 s: rank 1 is at #40 all-gather block.0, rank 0 at #40 all-gather "
            "block.0; rank 1 is stopped (T) in backward");
}

// Evaluations and saves have no steps, however short schedule.hang_kill_after is.
TEST(Findings, AnEvaluationOrASaveIsNoHangWhileARankIsBusyWithIt) {
  for (const uint32_t phase : {6u, 7u}) {
    Found c;
    const auto beat = [&c](uint32_t at_phase, int64_t age_ms, const char* process) {
      v1::Heartbeat::TaskBeat beat;
      for (uint32_t rank = 0; rank < 2; ++rank) {
        v1::RankHead& head = *beat.add_heads();
        head.set_rank(rank);
        head.set_step(11);
        head.set_phase(at_phase);
        head.set_phase_age_ms(age_ms);
        head.set_waiting(rank == 0);
        head.set_process_state(process);
      }
      c.state.NoteHeads(c.fence(), beat.heads(), {c.now_ms, c.now_ms});
    };
    for (int64_t age_ms = 2'000; age_ms <= 120'000; age_ms += 2'000) {
      c.now_ms += 2'000;
      beat(phase, age_ms, "R");
      c.Pass(0);
      ASSERT_EQ(Name(c.attempt().state()), "RUNNING") << phase << " for " << age_ms;
    }
    c.now_ms += 19'000;  // it is over; the next step takes its time too
    beat(3, 5'000, "R");
    c.Pass(0);
    EXPECT_EQ(Name(c.attempt().state()), "RUNNING");
    c.now_ms += 2'000;
    c.Pass(0);
    EXPECT_EQ(Name(c.attempt().state()), "STOPPING") << "no step for 20 s after it";

    Found stopped;
    stopped.now_ms += 21'000;
    v1::Heartbeat::TaskBeat heads;
    for (uint32_t rank = 0; rank < 2; ++rank) {
      v1::RankHead& head = *heads.add_heads();
      head.set_rank(rank);
      head.set_phase(phase);
      head.set_phase_age_ms(20'000);
      head.set_waiting(rank == 0);
      head.set_process_state(rank == 0 ? "S" : "T");
    }
    stopped.state.NoteHeads(stopped.fence(), heads.heads(), {stopped.now_ms, stopped.now_ms});
    stopped.Pass(0);
    EXPECT_EQ(Name(stopped.attempt().state()), "STOPPING") << "a stopped rank saves nothing";
  }
}

// But not for ever.
TEST(Findings, ASaveWithoutEndIsAHang) {
  Found c;
  int64_t age_ms = 0;
  for (; age_ms < 700'000 && Name(c.attempt().state()) == std::string("RUNNING"); age_ms += 2'000) {
    c.now_ms += 2'000;
    v1::Heartbeat::TaskBeat beat;
    for (uint32_t rank = 0; rank < 2; ++rank) {
      v1::RankHead& head = *beat.add_heads();
      head.set_rank(rank);
      head.set_phase(6);
      head.set_phase_age_ms(age_ms);
      head.set_process_state("D");
    }
    c.state.NoteHeads(c.fence(), beat.heads(), {c.now_ms, c.now_ms});
    c.Pass(0);
  }
  EXPECT_EQ(Name(c.attempt().state()), "STOPPING");
  EXPECT_GE(age_ms, 600'000);
}

TEST(Findings, ZeroNeverEndsAHang) {
  Found c;
  event::JobSubmitted submit = c.Submission();
  submit.config.mutable_schedule()->set_hang_kill_after(0);
  const JobId other = c.Do(submit).job;
  c.Place(other, {"a", "b"});
  c.TellAll(other, v1::TASK_STATE_PREPARING);
  c.TellAll(other, v1::TASK_STATE_READY);
  c.TellAll(other, v1::TASK_STATE_RUNNING, true);
  EXPECT_EQ(c.state.attempt(other, 1)->hang_kill_ms(), 0);
  for (const Timer& timer : c.state.timers()) {
    EXPECT_FALSE(timer.kind == TimerKind::kAttemptHang && timer.job == other.value);
  }
}

// Reliability R23: no waiting helps against it.
TEST(Findings, AMismatchEndsTheAttemptAtOnce) {
  Found c;
  c.Beat(100, /*other_fingerprint=*/8);
  const std::optional<Outcome> outcome = c.Look();
  ASSERT_TRUE(outcome.has_value());
  EXPECT_EQ(Name(c.attempt().state()), "STOPPING");
  EXPECT_EQ(c.attempt().cause().code(), "COLLECTIVE_MISMATCH");
  EXPECT_EQ(c.attempt().cause().category(), "HUNG");
  EXPECT_NE(c.attempt().cause().detail().find("rank 1 launched #40 all-gather block.0"),
            std::string::npos)
      << c.attempt().cause().detail();
}

// The ranks that fail of a mismatch say only that their peer is gone.
TEST(Findings, AMismatchSeenWhileRanksEndIsTheRoot) {
  Found c;
  v1::TaskReport report = c.Report(c.job, 0, v1::TASK_STATE_RUNNING);
  v1::RankOutcome& exit = *report.add_exits();
  exit.set_rank(0);
  exit.set_at(c.now_ms);
  exit.set_exit_code(86);
  exit.set_category("NETWORK");
  c.Tell(c.job, report);
  ASSERT_EQ(c.attempt().cause().code(), "PEER_FAILED");
  c.Beat(100, /*other_fingerprint=*/8);
  ASSERT_TRUE(c.Look().has_value());
  c.TellExit(c.job, 0, 86);
  c.TellExit(c.job, 1, 86);
  EXPECT_EQ(c.attempt().cause().code(), "COLLECTIVE_MISMATCH");
}

TEST(Findings, OfAnEndedAttemptAreRefused) {
  Found c;
  event::RanksDiagnosed found{c.fence(), {}};
  found.findings.emplace_back().set_kind("HANG");
  c.TellExit(c.job, 0, 1);
  c.TellExit(c.job, 1, 86);
  EXPECT_EQ(c.Do(found).status.code(), absl::StatusCode::kFailedPrecondition);
  found.fence = Fence{99};
  EXPECT_EQ(c.Do(found).status.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(c.attempt().findings_size(), 0);
}

TEST(Findings, AreAtMostEight) {
  Found c;
  for (uint32_t rank = 0; rank < 12; ++rank) {
    event::RanksDiagnosed found{c.fence(), {}};
    v1::FindingRecord& one = found.findings.emplace_back();
    one.set_kind("STRAGGLER");
    one.set_rank(rank);
    EXPECT_TRUE(c.Do(found).status.ok());
  }
  EXPECT_EQ(c.attempt().findings_size(), 8);
}

// A full record hides nothing that is graver than what it holds.
TEST(Findings, EightStragglersHideNoMismatch) {
  Found c;
  for (uint32_t rank = 0; rank < 8; ++rank) {
    event::RanksDiagnosed found{c.fence(), {}};
    v1::FindingRecord& one = found.findings.emplace_back();
    one.set_kind("STRAGGLER");
    one.set_rank(rank);
    c.Do(found);
  }
  ASSERT_EQ(c.attempt().findings_size(), 8);
  c.Beat(100, /*other_fingerprint=*/8);
  ASSERT_TRUE(c.Look().has_value());
  EXPECT_EQ(Name(c.attempt().state()), "STOPPING");
  EXPECT_EQ(c.attempt().cause().code(), "COLLECTIVE_MISMATCH");
  ASSERT_EQ(c.attempt().findings_size(), 8);
  EXPECT_EQ(c.attempt().findings(7).kind(), "MISMATCH");
  EXPECT_EQ(c.attempt().findings(0).rank(), 1u) << "the oldest straggler gave way";
}

TEST(Findings, HangsThatAreOverGiveWayToTheNewOneAndToMemory) {
  Found c;
  for (uint64_t step = 1; step <= 20; ++step) {
    event::RanksDiagnosed found{c.fence(), {}};
    v1::FindingRecord& one = found.findings.emplace_back();
    one.set_kind("HANG");
    one.set_step(step);
    EXPECT_EQ(Count<effect::CollectStacks>(c.Do(found)), 2) << step;
  }
  ASSERT_EQ(c.attempt().findings_size(), 8);
  EXPECT_EQ(c.attempt().findings(7).step(), 20u);
  v1::TaskReport report = c.Report(c.job, 1, v1::TASK_STATE_EXITED);
  v1::RankOutcome& exit = *report.add_exits();
  exit.set_rank(1);
  exit.set_at(c.now_ms);
  exit.set_step(20);
  exit.set_exit_code(86);
  exit.set_category("OOM_HOST");
  c.Tell(c.job, report);
  ASSERT_EQ(c.attempt().findings_size(), 8);
  EXPECT_EQ(c.attempt().findings(7).kind(), "OOM");
  EXPECT_EQ(c.attempt().findings(6).step(), 20u);
}

// ---- ends of ranks ----

v1::RunConfig Trained() {
  v1::RunConfig config;
  v1::ModelConfig& model = *config.mutable_model();
  model.set_vocab_size(4096);
  model.set_d_model(256);
  model.set_n_layers(4);
  model.set_n_heads(4);
  model.set_d_ffn(512);
  config.mutable_training()->set_micro_batch_size(16);
  config.mutable_training()->set_max_seq_len(512);
  config.mutable_training()->set_max_steps(100);
  config.mutable_parallel()->mutable_ranks()->set_min(2);
  config.mutable_parallel()->mutable_ranks()->set_max(2);
  return config;
}

// A job whose rank 1 takes all of the `mib` that are reserved for it; `saved`: after a checkpoint.
JobId RunOutOfMemory(Cluster& c, int64_t mib, bool saved) {
  event::JobSubmitted submit = c.Submission();
  submit.config = Trained();
  submit.config.mutable_parallel()->set_memory_per_rank(mib << 20);
  const JobId job = c.Do(submit).job;
  c.Place(job, {"a", "b"});
  c.TellAll(job, v1::TASK_STATE_PREPARING);
  c.TellAll(job, v1::TASK_STATE_READY);
  c.TellAll(job, v1::TASK_STATE_RUNNING, true);
  if (saved) {
    Open(c, job, 10);
    c.Do(event::ShardSealed{"a", c.SessionOf("a"), SealOf(c, job, 0, 10)});
    c.Do(event::ShardSealed{"b", c.SessionOf("b"), SealOf(c, job, 1, 10)});
  }
  v1::TaskReport report = c.Report(job, 1, v1::TASK_STATE_EXITED);
  v1::RankOutcome& exit = *report.add_exits();
  exit.set_rank(1);
  exit.set_at(c.now_ms);
  exit.set_step(12);
  exit.set_signal(9);
  exit.set_oom(true);
  exit.set_detail("in backward of block.1 at step 12");
  v1::MemoryUse& use = *exit.add_memory();
  use.set_name("resident");
  use.set_actual(static_cast<uint64_t>(mib) << 20);
  use.set_planned(static_cast<uint64_t>(mib) << 20);
  c.Tell(job, report);
  return job;
}

TEST(Findings, MemoryThatRanOutShowsPlanAndActualAndWhatWouldFit) {
  Two c;
  const JobId job = RunOutOfMemory(c, 450, /*saved=*/false);
  const v1::AttemptRecord& attempt = *c.state.attempt(job, 1);
  ASSERT_EQ(attempt.findings_size(), 1);
  const v1::FindingRecord& finding = attempt.findings(0);
  EXPECT_EQ(finding.kind(), "OOM");
  EXPECT_EQ(finding.rank(), 1u);
  EXPECT_EQ(finding.text(), "rank 1: killed for lack of memory: in backward of block.1 at step 12");
  EXPECT_NE(finding.evidence(0).find("reserved 450MiB, highest resident memory seen 450MiB"),
            std::string::npos)
      << finding.evidence(0);
  std::string lines;
  for (const std::string& line : finding.evidence()) lines += line + "\n";
  EXPECT_NE(lines.find("plan: activations"), std::string::npos) << lines;
  EXPECT_NE(lines.find("plan: moments"), std::string::npos) << lines;
  EXPECT_NE(finding.advice().find("training.micro_batch_size="), std::string::npos)
      << finding.advice();
  EXPECT_NE(finding.advice().find("parallel.memory_per_rank="), std::string::npos);
  // What `heddle resume` would refuse is not advised.
  EXPECT_NE(finding.advice().find("heddle submit CONFIG KEY=VALUE"), std::string::npos)
      << finding.advice();
  EXPECT_EQ(finding.advice().find("the plan fits"), std::string::npos) << finding.advice();
  EXPECT_EQ(attempt.cause().category(), "OOM_HOST");
}

// A job with a checkpoint goes on from it, which fixes the type of its moments.
TEST(Findings, AdviceAfterACheckpointGoesOnFromIt) {
  Two c;
  const JobId job = RunOutOfMemory(c, 450, /*saved=*/true);
  ASSERT_EQ(c.state.job(job)->last_checkpoint().step(), 10u);
  const std::string advice = c.state.attempt(job, 1)->findings(0).advice();
  EXPECT_NE(advice.find(Str("heddle submit CONFIG --resume-from ", ToText(job), "@latest")),
            std::string::npos)
      << advice;
  EXPECT_NE(advice.find("training.micro_batch_size="), std::string::npos) << advice;
  EXPECT_EQ(advice.find("training.moments"), std::string::npos) << advice;
}

TEST(Findings, SaysThatNothingFitsWhereNothingDoes) {
  Two c;
  const JobId job = RunOutOfMemory(c, 90, /*saved=*/false);
  const std::string advice = c.state.attempt(job, 1)->findings(0).advice();
  EXPECT_EQ(advice.rfind("no other setting makes it fit: the plan needs ", 0), 0u) << advice;
  EXPECT_NE(advice.find("of 90MiB; or parallel.memory_per_rank="), std::string::npos) << advice;
}

TEST(Findings, NumbersThatAreNotFiniteAreNoOneRanks) {
  Found c;
  for (const uint32_t task : {0u, 1u}) {
    v1::TaskReport report = c.Report(c.job, task, v1::TASK_STATE_EXITED);
    v1::RankOutcome& exit = *report.add_exits();
    exit.set_rank(task);
    exit.set_at(c.now_ms);
    exit.set_exit_code(88);
    exit.set_category("NUMERIC");
    exit.set_step(11);
    exit.set_detail("step 11: loss or gradient is not finite, first in blocks.0.mlp");
    c.Tell(c.job, report);
  }
  ASSERT_EQ(c.attempt().findings_size(), 1);
  EXPECT_EQ(c.attempt().findings(0).kind(), "NUMERIC");
  EXPECT_FALSE(c.attempt().findings(0).has_rank());
  EXPECT_EQ(c.attempt().findings(0).step(), 11u);
}

}  // namespace
}  // namespace heddle::state
