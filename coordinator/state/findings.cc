// What is found out about attempts, into their records (training-runtime.md 17, 18.3).
#include <algorithm>

#include "base/units/units.h"
#include "checkpoint/catalog/lineage.h"
#include "coordinator/state/actions.h"
#include "coordinator/state/causes.h"
#include "coordinator/state/diagnosis.h"
#include "coordinator/state/names.h"
#include "model/model_plan.h"
#include "model/training_plan.h"

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {

constexpr size_t kEvidenceBytesMax = 32 * 1024;
constexpr size_t kStackBytesMax = 8 * 1024;

const char* EventCode(const std::string& kind) {
  if (kind == "HANG") return "RANKS_HUNG";
  if (kind == "MISMATCH") return "RANKS_MISMATCHED";
  if (kind == "STRAGGLER") return "RANK_SLOW";
  if (kind == "NUMERIC") return "NUMBERS_NOT_FINITE";
  return "RANK_OUT_OF_MEMORY";
}

bool IsStandstill(const v1::FindingRecord& finding) {
  return finding.kind() == "HANG" || finding.kind() == "MISMATCH";
}

bool IsNew(const v1::AttemptRecord& attempt, const v1::FindingRecord& finding) {
  return !IsKnown(attempt, finding) && PlaceFor(attempt, finding).has_value();
}

size_t EvidenceBytes(const v1::FindingRecord& finding) {
  size_t bytes = 0;
  for (const std::string& line : finding.evidence()) bytes += line.size();
  return bytes;
}

int64_t ActualOf(const v1::RankOutcome& exit) {
  int64_t most = 0;
  for (const v1::MemoryUse& use : exit.memory()) {
    if (use.name() == "resident") most = std::max(most, static_cast<int64_t>(use.actual()));
  }
  return most;
}

// Plan by category, and what was measured where it was.
void AddMemoryLines(const v1::RankOutcome& exit, const model::RankMemory& plan, int64_t reserved,
                    v1::FindingRecord* finding) {
  const int64_t peak = ActualOf(exit);
  finding->add_evidence(Str(
      "rank ", exit.rank(), ": planned ", ApproximateBytes(plan.Total()), " and ",
      ApproximateBytes(model::kRuntimeBytes), " for the runtime, reserved ",
      reserved > 0 ? ApproximateBytes(reserved) : std::string("without a limit"),
      peak > 0 ? Str(", highest resident memory seen ", ApproximateBytes(peak)) : std::string()));
  for (const model::NamedBytes& one : model::MemoryCategories(plan)) {
    finding->add_evidence(Str("plan: ", one.name, " ", ApproximateBytes(one.bytes)));
  }
  for (const v1::MemoryUse& use : exit.memory()) {
    if (use.name() == "resident" || !use.has_actual()) continue;
    finding->add_evidence(Str(
        "measured: ", use.name(), " ", ApproximateBytes(static_cast<int64_t>(use.actual())),
        use.has_planned() ? Str(", planned ", ApproximateBytes(static_cast<int64_t>(use.planned())))
                          : std::string()));
  }
}

// How the job goes on with other settings: `heddle resume` takes none of these.
std::string SubmitLine(JobId job, bool saved) {
  return saved ? Str("heddle submit CONFIG --resume-from ", ToText(job), "@latest KEY=VALUE")
               : "heddle submit CONFIG KEY=VALUE";
}

std::string MemoryAdvice(const v1::RunConfig& config, const model::RankMemory& plan,
                         int64_t reserved, int64_t peak, JobId job, bool saved) {
  // What the process needs beside the plan is as large as it was.
  const int64_t beside = std::max(model::kRuntimeBytes, peak - plan.Total());
  const int64_t limit = reserved > 0 ? reserved : std::max(peak, plan.Total() + beside);
  // A little less than the limit: the plan is right to a few per cent.
  const int64_t room = (limit - beside) / 100 * 95;
  // More than it had, whatever the plan says: it was not enough.
  const int64_t enough =
      std::max((std::max(plan.Total() + beside, peak) / 100 * 110), reserved / 4 * 5);
  const std::string more = Str("parallel.memory_per_rank=", (enough >> 20) + 1, "MiB");
  const std::string how = Str(" (", SubmitLine(job, saved), ")");
  if (plan.Total() <= room) {
    return Str("the plan fits: something beside it took the memory; or ", more, how);
  }
  // A checkpoint with moments in fp32 does not go on with others.
  const bool fixed = saved && config.training().moments() != v1::TrainingConfig::MOMENTS_BF16;
  std::string text;
  // Its bytes count the runtime alone beside the plan.
  for (const model::Change& change : model::ChangesThatFit(config, room + model::kRuntimeBytes,
                                                           fixed ? "training.moments" : "")) {
    text += Str(text.empty() ? "any of these fits: " : "; ", model::SettingsText(change), " (",
                ApproximateBytes(change.bytes - model::kRuntimeBytes + beside), " a rank; ",
                change.price, ")");
  }
  if (text.empty()) {
    text = Str("no other setting makes it fit: the plan needs ", ApproximateBytes(plan.Total()),
               " and the process ", ApproximateBytes(beside), " beside it, of ",
               ApproximateBytes(limit));
  }
  return Str(text, "; or ", more, how);
}

// What all ranks of a report share: their plan is the same, and the advice is of the highest peak.
// The first that needs it fills it in.
struct MemoryReport {
  JobId job;
  bool saved = false;  // the job has a checkpoint to go on from
  int64_t peak = 0;
  model::RankMemory plan;
  std::string advice;
};

// Who and when, which tells whether it is known: the rest costs a search for what would fit.
v1::FindingRecord MemoryStub(const v1::TaskRecord& task, const v1::RankOutcome& exit) {
  v1::FindingRecord finding;
  finding.set_kind("OOM");
  finding.set_rank(exit.rank());
  finding.set_node(task.worker());
  finding.set_step(exit.step());
  return finding;
}

v1::FindingRecord MemoryFinding(const v1::RunConfig& config, const v1::TaskRecord& task,
                                const v1::RankOutcome& exit, MemoryReport& report) {
  v1::FindingRecord finding = MemoryStub(task, exit);
  finding.set_text(CauseOfExit(exit, task.worker()).detail());
  if (exit.category() == "OOM_GPU" || config.kind() != v1::RunConfig::KIND_TRAIN) {
    finding.set_advice(AdviceFor("OOM_KILLED", "OOM_HOST"));
    return finding;
  }
  const auto reserved = static_cast<int64_t>(task.memory_per_rank());
  if (report.advice.empty()) {
    report.plan = model::EstimateRank(config);
    report.advice =
        MemoryAdvice(config, report.plan, reserved, report.peak, report.job, report.saved);
  }
  AddMemoryLines(exit, report.plan, reserved, &finding);
  finding.set_advice(report.advice);
  return finding;
}

bool RanOutOfMemory(const v1::RankOutcome& exit) {
  return exit.oom() || exit.category() == "OOM_HOST" || exit.category() == "OOM_GPU";
}

// The rank that the finding names first: what does not fit at the end is the least important.
bool AddStack(const v1::RankStack& stack, const std::string& worker, v1::FindingRecord* finding) {
  const std::string head = Str("stacks of rank ", stack.rank(), " on ", worker, ":");
  for (const std::string& line : finding->evidence()) {
    if (line.rfind(head, 0) == 0) return false;  // a repeated answer
  }
  std::string text = Str(head, "\n", stack.text().substr(0, kStackBytesMax));
  while (!text.empty() && text.back() == '\n') text.pop_back();
  if (EvidenceBytes(*finding) + text.size() > kEvidenceBytesMax) return false;
  finding->add_evidence(std::move(text));
  return true;
}

}  // namespace

const v1::FindingRecord* NewestStandstill(const v1::AttemptRecord& attempt) {
  for (int i = attempt.findings_size() - 1; i >= 0; --i) {
    if (IsStandstill(attempt.findings(i))) return &attempt.findings(i);
  }
  return nullptr;
}

bool AddFinding(Decision& d, AttemptId id, v1::FindingRecord finding) {
  if (!IsNew(*d.attempt(id), finding)) {
    return false;
  }
  if (finding.at() == 0) {
    finding.set_at(d.now().wall_ms);
  }
  d.Note(id, EventCode(finding.kind()), finding.text());
  const int place = *PlaceFor(*d.attempt(id), finding);
  auto& findings = *d.Edit(id).mutable_findings();
  if (place < findings.size()) {
    findings.DeleteSubrange(place, 1);  // the newest stays the last
  }
  *findings.Add() = std::move(finding);
  return true;
}

void FindFromExits(Decision& d, AttemptId id, const v1::TaskReport& report) {
  const v1::RunConfig& config = d.job(id.job)->config();
  MemoryReport memory;
  memory.job = id.job;
  const std::vector<CheckpointPtr> checkpoints = d.state().CheckpointsOf(id.job);
  memory.saved = std::any_of(checkpoints.begin(), checkpoints.end(),
                             [](const CheckpointPtr& one) { return checkpoint::IsGood(*one); });
  for (const v1::RankOutcome& exit : report.exits()) {
    if (RanOutOfMemory(exit)) memory.peak = std::max(memory.peak, ActualOf(exit));
  }
  for (const v1::RankOutcome& exit : report.exits()) {
    if (RanOutOfMemory(exit)) {
      const v1::TaskRecord& task = *d.task(id, report.task());
      if (!IsNew(*d.attempt(id), MemoryStub(task, exit))) continue;
      AddFinding(d, id, MemoryFinding(config, task, exit, memory));
    } else if (exit.category() == "NUMERIC" || exit.category() == "ROLLBACK") {
      // All ranks agreed on it: it is no one rank's.
      v1::FindingRecord finding;
      finding.set_kind("NUMERIC");
      finding.set_step(exit.step());
      finding.set_text(exit.detail());
      finding.set_advice(AdviceFor(exit.category() == "ROLLBACK" ? "ROLLED_BACK" : "NUMERIC_HALT",
                                   exit.category()));
      AddFinding(d, id, std::move(finding));
    }
  }
}

Status On(Decision& d, const event::RanksDiagnosed& e) {
  const v1::AttemptRecord* attempt = d.attempt_of(e.fence);
  if (attempt == nullptr) {
    return NotFound(Str("no attempt of fence ", e.fence));
  }
  const AttemptId id = IdOf(*attempt);
  if (attempt->state() != v1::ATTEMPT_STATE_RUNNING &&
      attempt->state() != v1::ATTEMPT_STATE_STOPPING) {
    return FailedPrecondition(Str("attempt ", id, " is ", Name(attempt->state())));
  }
  // Whether or not it is written down.
  const bool mismatch =
      std::any_of(e.findings.begin(), e.findings.end(),
                  [](const v1::FindingRecord& finding) { return finding.kind() == "MISMATCH"; });
  for (const v1::FindingRecord& finding : e.findings) {
    if (AddFinding(d, id, finding) && IsStandstill(finding)) {
      SendCollectStacks(d, id);
    }
  }
  // No waiting helps against it (reliability R23).
  if (mismatch && d.attempt(id)->state() == v1::ATTEMPT_STATE_RUNNING &&
      d.attempt(id)->hang_kill_ms() > 0) {
    AttemptStep step;
    step.attempt = id;
    step.input = AttemptInput::kHang;
    StepAttempt(d, step);
  }
  return OkStatus();
}

Status On(Decision& d, const event::StacksReported& e) {
  RETURN_IF_ERROR(CheckSession(d, e.worker, e.session));
  const v1::AttemptRecord* attempt = d.attempt_of(Fence{e.report.fence()});
  const v1::TaskRecord* task =
      attempt == nullptr ? nullptr : d.task(IdOf(*attempt), e.report.task());
  if (task == nullptr || task->worker() != e.worker) {
    return NotFound(Str("worker ", e.worker, " has no task of fence ", e.report.fence()));
  }
  const AttemptId id = IdOf(*attempt);
  if (NewestStandstill(*attempt) == nullptr || e.report.stacks().empty()) {
    return FailedPrecondition(Str("attempt ", id, " has no finding that stacks belong to"));
  }
  v1::FindingRecord finding = *NewestStandstill(*attempt);
  std::vector<v1::RankStack> stacks(e.report.stacks().begin(), e.report.stacks().end());
  std::stable_sort(
      stacks.begin(), stacks.end(), [&finding](const v1::RankStack& a, const v1::RankStack& b) {
        return finding.has_rank() && a.rank() == finding.rank() && b.rank() != finding.rank();
      });
  int added = 0;
  for (const v1::RankStack& stack : stacks) {
    added += AddStack(stack, e.worker, &finding) ? 1 : 0;
  }
  if (added == 0) {
    return OkStatus();
  }
  auto& findings = *d.Edit(id).mutable_findings();
  for (int i = findings.size() - 1; i >= 0; --i) {
    if (!IsStandstill(findings.Get(i))) continue;
    *findings.Mutable(i) = std::move(finding);
    break;
  }
  d.Note(id, "STACKS_COLLECTED", Str("of ", added, " ranks on ", e.worker));
  return OkStatus();
}

}  // namespace heddle::state
