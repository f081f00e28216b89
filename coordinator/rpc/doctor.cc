#include "coordinator/rpc/doctor.h"

#include <algorithm>
#include <array>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "base/rank_words/rank_words.h"
#include "coordinator/rpc/slow_offload.h"
#include "coordinator/schedule/schedule.h"
#include "coordinator/state/causes.h"
#include "coordinator/state/diagnosis.h"
#include "coordinator/state/names.h"

namespace heddle::rpc {
namespace {

// From the gravest on.
constexpr std::array<std::string_view, 9> kGravity = {"MISMATCH",  "HANG",         "OOM",
                                                      "NUMERIC",   "FAILED",       "STRAGGLER",
                                                      "SLOW_DATA", "SLOW_OFFLOAD", "WAITING"};
// Of a step that ranks may wait for data.
constexpr double kSlowDataShare = 0.2;

size_t Gravity(const v1::Finding& finding) {
  const auto found = std::find(kGravity.begin(), kGravity.end(), finding.kind());
  return static_cast<size_t>(found - kGravity.begin());
}

v1::Finding Stored(const v1::FindingRecord& record, uint32_t attempt) {
  v1::Finding finding;
  finding.set_kind(record.kind());
  finding.set_at(record.at());
  finding.set_attempt(attempt);
  if (record.has_rank()) finding.set_rank(record.rank());
  if (!record.node().empty()) finding.set_node(record.node());
  finding.set_step(record.step());
  finding.set_text(record.text());
  *finding.mutable_evidence() = record.evidence();
  finding.set_advice(record.advice());
  return finding;
}

// Causes that tell of a fault; an attempt that was told to leave had none.
bool IsFault(const v1::AttemptRecord& attempt) {
  const bool failed = attempt.outcome() == v1::ATTEMPT_OUTCOME_FAILED ||
                      attempt.outcome() == v1::ATTEMPT_OUTCOME_LOST ||
                      attempt.outcome() == v1::ATTEMPT_OUTCOME_NEVER_STARTED;
  return attempt.has_cause() && (failed || attempt.stop_reason() == v1::STOP_REASON_FAIL);
}

// The findings say it already.
bool IsTold(const v1::AttemptRecord& attempt) {
  const std::string& category = attempt.cause().category();
  return std::any_of(
      attempt.findings().begin(), attempt.findings().end(),
      [&category](const v1::FindingRecord& one) {
        return (one.kind() == "OOM" && category.rfind("OOM", 0) == 0) ||
               (one.kind() == "NUMERIC" && (category == "NUMERIC" || category == "ROLLBACK")) ||
               ((one.kind() == "HANG" || one.kind() == "MISMATCH") && category == "HUNG");
      });
}

v1::Finding Failure(const v1::AttemptRecord& attempt) {
  const v1::CauseRecord& cause = attempt.cause();
  v1::Finding finding;
  finding.set_kind("FAILED");
  finding.set_at(cause.at());
  finding.set_attempt(attempt.number());
  if (cause.has_rank()) finding.set_rank(cause.rank());
  if (!cause.node().empty()) finding.set_node(cause.node());
  finding.set_step(cause.step());
  finding.set_text(Str(cause.code(), ": ", cause.detail()));
  finding.set_advice(state::AdviceFor(cause.code(), cause.category()));
  for (const v1::CauseRecord& other : attempt.others()) {
    finding.add_evidence(Str("also ", other.code(), ": ", other.detail()));
  }
  return finding;
}

bool Waits(v1::JobState state) {
  return state == v1::JOB_STATE_QUEUED || state == v1::JOB_STATE_WAITING ||
         state == v1::JOB_STATE_BACKOFF || state == v1::JOB_STATE_HELD ||
         state == v1::JOB_STATE_PAUSED;
}

v1::Finding Waiting(const Core& core, JobId id) {
  const schedule::WaitReason why = schedule::Explain(core.state(), id, core.Now());
  v1::Finding finding;
  finding.set_kind("WAITING");
  finding.set_at(core.Now().wall_ms);
  finding.set_text(Str(why.code, why.text.empty() ? "" : ": ", why.text));
  finding.set_advice(why.advice);
  return finding;
}

// Every rank waits for data: no straggler, but slow all the same.
std::optional<v1::Finding> SlowData(const state::Situation& situation, uint32_t attempt) {
  const auto& times = situation.ranks->times();
  double least = 1;
  for (const auto& [rank, t] : times) {
    const double step = t.compute + t.data + t.disk + t.waited;
    least = std::min(least, step > 0 ? t.data / step : 0);
  }
  if (times.empty() || least < kSlowDataShare) return std::nullopt;
  v1::Finding finding;
  finding.set_kind("SLOW_DATA");
  finding.set_at(situation.wall_ms);
  finding.set_attempt(attempt);
  finding.set_step(situation.step);
  finding.set_text(
      Str("every rank waits for data, at least ", static_cast<int>(least * 100), " % of a step"));
  finding.set_advice(
      "raise data.num_workers, or put the data set (data.path) on a faster disk of each node");
  return finding;
}

void AddRanks(const state::Situation& situation, v1::DoctorReply* reply) {
  for (const auto& [rank, seen] : situation.ranks->ranks()) {
    v1::RankStatus* status = reply->add_ranks();
    status->set_rank(rank);
    status->set_node(situation.node_of(rank));
    status->set_step(seen.head.step());
    status->set_phase(PhaseText(seen.head.phase()));
    status->set_phase_age_ms(seen.head.phase_age_ms() + situation.now_ms - seen.at_ms);
    status->set_operation(state::PlaceOf(seen.head, situation.layers));
    status->set_waiting(seen.head.waiting());
    status->set_process_state(state::ProcessText(seen.head.process_state()));
  }
}

uint64_t LastStep(const state::State& state, const v1::AttemptRecord& attempt) {
  const state::Progress* progress = state.progress(Fence{attempt.fence()});
  return std::max(attempt.last_step(), progress == nullptr ? uint64_t{0} : progress->step);
}

// From the newest steps of an attempt, also of one that ended.
std::optional<v1::Finding> OffloadOf(Core& core, const v1::JobRecord& job,
                                     const v1::AttemptRecord& attempt) {
  if (!job.config().memory().expert_offloading().enabled()) return std::nullopt;
  const uint64_t last = LastStep(core.state(), attempt);
  const uint64_t after = last - std::min<uint64_t>(last, kOffloadSteps);
  const StatusOr<std::vector<v1::MetricPoint>> points =
      core.ReadPoints(job.id(), {attempt.number(), after}, kOffloadSteps);
  // While the store is reopened nothing is known of the steps; the next call will tell.
  if (!points.ok()) return std::nullopt;
  std::optional<v1::Finding> slow = SlowOffload(job.config(), *points);
  if (!slow.has_value()) return slow;
  slow->set_at(attempt.has_ended_at() ? attempt.ended_at() : core.Now().wall_ms);
  slow->set_attempt(attempt.number());
  for (const state::TaskPtr& task : core.state().TasksOf(JobId{job.id()}, attempt.number())) {
    if (task->first_rank() == slow->rank()) slow->set_node(task->worker());
  }
  return slow;
}

// A hang that ended by itself is history, and so is a rank that is slow no more.
bool Holds(const Core& core, const v1::Finding& finding, const v1::JobRecord& job) {
  const state::State& state = core.state();
  const v1::AttemptRecord* attempt = state.attempt(JobId{job.id()}, finding.attempt());
  if (attempt == nullptr) return true;  // of the job itself
  if (finding.kind() == "HANG") return LastStep(state, *attempt) <= finding.step();
  if (finding.kind() != "STRAGGLER") return true;
  const std::optional<state::Situation> now =
      state::SituationOf(state, Fence{attempt->fence()}, core.Now());
  if (!now.has_value()) return false;
  const std::vector<v1::FindingRecord> slow = state::FindStragglers(*now);
  return std::any_of(slow.begin(), slow.end(), [&finding](const v1::FindingRecord& one) {
    return one.rank() == finding.rank();
  });
}

bool IsCurrent(const Core& core, const v1::Finding& finding, const v1::JobRecord& job) {
  return finding.attempt() == job.attempts() &&
         core.state().attempt(JobId{job.id()}, finding.attempt()) != nullptr &&
         Holds(core, finding, job);
}

std::string Summary(const Core& core, const v1::JobRecord& job, const v1::DoctorReply& reply) {
  const auto gravest = std::find_if(reply.findings().begin(), reply.findings().end(),
                                    [&](const v1::Finding& one) { return Holds(core, one, job); });
  const v1::Finding* first = gravest == reply.findings().end() ? nullptr : &*gravest;
  if (job.state() == v1::JOB_STATE_DONE) {
    const bool good = job.result() == v1::JOB_RESULT_SUCCEEDED;
    if (good && first == nullptr) return "nothing is wrong: the job succeeded";
    if (good)
      return Str("the job succeeded; on the way, in attempt ", first->attempt(), ": ",
                 first->text());
    return Str("the job ended ", state::Name(job.result()),
               job.reason().empty() ? "" : Str(" (", job.reason(), ")"),
               first == nullptr ? "" : ": ", first == nullptr ? std::string() : first->text());
  }
  for (const v1::Finding& finding : reply.findings()) {
    if (finding.kind() == "WAITING") return Str("the job waits: ", finding.text());
  }
  for (const v1::Finding& finding : reply.findings()) {
    if (IsCurrent(core, finding, job)) return finding.text();
  }
  const v1::AttemptRecord* attempt = core.state().attempt(JobId{job.id()}, job.attempts());
  if (attempt == nullptr) return "nothing is wrong: the job has not started yet";
  if (attempt->state() != v1::ATTEMPT_STATE_RUNNING) {
    return Str("nothing is wrong: attempt ", attempt->number(), " is ",
               state::Name(attempt->state()));
  }
  const state::Progress* progress = core.state().progress(Fence{attempt->fence()});
  return Str("nothing is wrong: attempt ", attempt->number(), " is at step ",
             progress == nullptr ? attempt->start_step() : progress->step, " of ",
             job.config().training().max_steps(),
             progress == nullptr || progress->at_ms == 0
                 ? std::string()
                 : Str(", its last step was ", (core.Now().ms - progress->at_ms) / 1000, " s ago"));
}

}  // namespace

v1::DoctorReply DoctorView(Core& core, const v1::JobRecord& job) {
  const state::State& state = core.state();
  const JobId id{job.id()};
  v1::DoctorReply reply;
  reply.set_id(ToText(id));
  reply.set_state(state::Name(job.state()));
  std::vector<v1::Finding> findings;
  for (const state::AttemptPtr& attempt : state.AttemptsOf(id)) {
    const std::optional<state::Situation> situation =
        state::SituationOf(state, Fence{attempt->fence()}, core.Now());
    for (const v1::FindingRecord& record : attempt->findings()) {
      v1::Finding finding = Stored(record, attempt->number());
      const uint64_t last = LastStep(state, *attempt);
      if (record.kind() == "HANG" && last > record.step()) {
        finding.add_evidence(Str("the attempt went on later, to step ", last));
      }
      findings.push_back(std::move(finding));
    }
    if (IsFault(*attempt) && !IsTold(*attempt)) findings.push_back(Failure(*attempt));
    if (attempt->number() != job.attempts()) continue;
    if (std::optional<v1::Finding> slow = OffloadOf(core, job, *attempt); slow.has_value()) {
      findings.push_back(*std::move(slow));
    }
    if (!situation.has_value()) continue;
    if (std::optional<v1::Finding> slow = SlowData(*situation, attempt->number());
        slow.has_value()) {
      findings.push_back(*std::move(slow));
    }
    AddRanks(*situation, &reply);
  }
  if (Waits(job.state())) findings.push_back(Waiting(core, id));
  std::stable_sort(findings.begin(), findings.end(),
                   [](const v1::Finding& a, const v1::Finding& b) {
                     return std::pair(Gravity(a), -a.at()) < std::pair(Gravity(b), -b.at());
                   });
  for (v1::Finding& finding : findings) *reply.add_findings() = std::move(finding);
  reply.set_summary(Summary(core, job, reply));
  return reply;
}

}  // namespace heddle::rpc
