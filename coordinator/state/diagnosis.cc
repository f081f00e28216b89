#include "coordinator/state/diagnosis.h"

#include <algorithm>
#include <map>
#include <set>
#include <utility>

#include "base/rank_words/rank_words.h"
#include "coordinator/state/state.h"

namespace heddle::state {

namespace v1 = heddle::v1;

namespace {

constexpr int kFindingsMax = 8;
constexpr size_t kEvidenceRanksMax = 16;
// A head older than this says nothing of now: the worker is silent.
constexpr int64_t kFreshMs = 10'000;
constexpr int64_t kHangMsMin = 5'000;
// Own limits (17.3): the first step warms everything up; saves and evaluations have no step.
constexpr int64_t kFirstStepMs = 60'000;
constexpr int64_t kSaveMs = 60'000;
constexpr double kSlowRatio = 1.3;
constexpr double kSlowShare = 0.05;  // of a step; less is noise

std::string Seconds(int64_t ms) {
  return ms < 10'000 ? Str(ms / 1000, ".", ms % 1000 / 100, " s") : Str(ms / 1000, " s");
}

std::string Ms(double ms) {
  return ms < 10 ? Str(static_cast<int64_t>(ms * 10) / 10, ".", static_cast<int64_t>(ms * 10) % 10,
                       " ms")
                 : Str(static_cast<int64_t>(ms), " ms");
}

// "rank 1", "ranks 1, 2 and 5", "ranks 1, 2, 3, 4 and 12 more".
std::string RanksText(const std::vector<uint32_t>& ranks) {
  constexpr size_t kShown = 4;
  std::string text = ranks.size() == 1 ? "rank " : "ranks ";
  const size_t shown = ranks.size() > kShown + 1 ? kShown : ranks.size();
  for (size_t i = 0; i < shown; ++i) {
    const bool last = i + 1 == shown && shown == ranks.size();
    text += Str(i == 0 ? "" : last ? " and " : ", ", ranks[i]);
  }
  return shown == ranks.size() ? text : Str(text, " and ", ranks.size() - shown, " more");
}

int64_t AgeNow(const RankSeen& seen, int64_t age_ms, int64_t now_ms) {
  return age_ms + std::max<int64_t>(0, now_ms - seen.at_ms);
}

v1::FindingRecord NewFinding(const Situation& s, const char* kind) {
  v1::FindingRecord finding;
  finding.set_kind(kind);
  finding.set_at(s.wall_ms);
  finding.set_step(s.step);
  return finding;
}

void NameRank(const Situation& s, uint32_t rank, v1::FindingRecord* finding) {
  finding->set_rank(rank);
  if (s.node_of) finding->set_node(s.node_of(rank));
}

// One line per rank.
void AddEvidence(const Situation& s, v1::FindingRecord* finding) {
  size_t lines = 0;
  for (const auto& [rank, seen] : s.ranks->ranks()) {
    if (++lines > kEvidenceRanksMax) {
      finding->add_evidence(
          Str("and ", s.ranks->ranks().size() - kEvidenceRanksMax, " more ranks"));
      return;
    }
    const v1::RankHead& head = seen.head;
    finding->add_evidence(Str(
        "rank ", rank, s.node_of ? " on " : "", s.node_of ? s.node_of(rank) : std::string(),
        ": step ", head.step(), ", in ", PhaseText(head.phase()), " for ",
        Seconds(AgeNow(seen, head.phase_age_ms(), s.now_ms)), ", ", PlaceOf(head, s.layers),
        head.seq() == 0 ? std::string()
                        : Str(" launched ", Seconds(AgeNow(seen, head.age_ms(), s.now_ms)), " ago"),
        head.waiting() ? ", waits" : "", ", process ", ProcessText(head.process_state())));
  }
}

// Who keeps the others waiting, by the surest sign that some ranks show and others do not.
std::vector<uint32_t> Culprits(const Situation& s) {
  if (s.ranks->ranks().size() == 1) return {s.ranks->ranks().begin()->first};
  std::vector<uint32_t> halted;
  std::vector<uint32_t> busy;
  std::vector<uint32_t> behind;
  uint64_t newest = 0;
  for (const auto& [rank, seen] : s.ranks->ranks()) newest = std::max(newest, seen.head.seq());
  for (const auto& [rank, seen] : s.ranks->ranks()) {
    if (IsStopped(seen.head) || IsDead(seen.head)) halted.push_back(rank);
    if (!seen.head.waiting()) busy.push_back(rank);
    if (seen.head.seq() < newest) behind.push_back(rank);
  }
  for (std::vector<uint32_t>* ranks : {&halted, &busy, &behind}) {
    if (!ranks->empty() && ranks->size() < s.ranks->ranks().size()) return *ranks;
  }
  return halted;  // all of them, or none
}

template <typename Is>
bool AllRanks(const Situation& s, Is is) {
  return std::all_of(s.ranks->ranks().begin(), s.ranks->ranks().end(),
                     [&is](const auto& one) { return is(one.second.head); });
}

bool AllWait(const Situation& s) {
  return AllRanks(s, [](const v1::RankHead& head) { return head.waiting(); });
}

// "all ranks are in save", of ranks of which none holds the others up.
std::string AllText(const Situation& s) {
  if (AllWait(s)) return "all ranks wait";
  const uint32_t phase = s.ranks->ranks().begin()->second.head.phase();
  return AllRanks(s, [phase](const v1::RankHead& head) { return head.phase() == phase; })
             ? Str("all ranks are in ", PhaseText(phase))
             : "all ranks are busy, in different phases";
}

// "#1813 reduce-scatter block.7", or the span of several places.
std::string PlacesOf(const Situation& s, const std::vector<uint32_t>& ranks) {
  const RankSeen* first = nullptr;
  const RankSeen* last = nullptr;
  for (const uint32_t rank : ranks) {
    const RankSeen& seen = s.ranks->ranks().at(rank);
    if (first == nullptr || seen.head.seq() < first->head.seq()) first = &seen;
    if (last == nullptr || seen.head.seq() > last->head.seq()) last = &seen;
  }
  const std::string from = PlaceOf(first->head, s.layers);
  const std::string to = PlaceOf(last->head, s.layers);
  return from == to ? from : Str("between ", from, " and ", to);
}

// Why this rank does not go on: the process's state first, else where it has been for so long.
std::string Condition(const Situation& s, uint32_t rank) {
  const RankSeen& seen = s.ranks->ranks().at(rank);
  const v1::RankHead& head = seen.head;
  if (IsDead(head)) return Str("rank ", rank, " is dead");
  if (IsStopped(head)) {
    return Str("rank ", rank, " is stopped (", head.process_state(), ") in ",
               PhaseText(head.phase()));
  }
  const int64_t age = AgeNow(seen, head.phase_age_ms(), s.now_ms);
  const bool disk = head.process_state() == "D";
  return Str("rank ", rank, " has been in ", PhaseText(head.phase()), " for ", Seconds(age),
             disk ? ", asleep in the kernel (D)" : "", head.waiting() ? ", waiting" : "");
}

std::string HangAdvice(const Situation& s, const std::vector<uint32_t>& culprits) {
  constexpr char kDisks[] = "it sleeps in the kernel: check the disks and file servers of its node";
  constexpr char kStacks[] =
      "the stacks below say what it does; the attempt ends and another starts after "
      "schedule.hang_kill_after";
  const bool disks =
      AllRanks(s, [](const v1::RankHead& head) { return head.process_state() == "D"; });
  if (disks && s.world > 1) {
    return "all ranks sleep in the kernel: check the disks and the file server that they share";
  }
  if (culprits.empty()) {
    return AllWait(s) ? "every rank waits: look at the network between the nodes" : kStacks;
  }
  const v1::RankHead& head = s.ranks->ranks().at(culprits.front()).head;
  if (IsStopped(head))
    return "a signal or a debugger stopped it: kill -CONT its process, or look who stops processes "
           "on its node";
  return head.process_state() == "D" ? kDisks : kStacks;
}

int64_t HangLimit(const Situation& s) {
  int64_t limit = s.median_step_ms == 0 ? kFirstStepMs : std::max(kHangMsMin, 3 * s.median_step_ms);
  for (const auto& [rank, seen] : s.ranks->ranks()) {
    const bool slow = seen.head.phase() == kSavePhase || seen.head.phase() == kEvaluatePhase;
    // Who waits for others there saves nothing himself.
    if (slow && !seen.head.waiting() && !IsStopped(seen.head) && !IsDead(seen.head)) {
      limit = std::max(limit, kSaveMs);
    }
  }
  return limit;
}

// The value in the middle of the others', the lower one of two.
double MedianOfOthers(const std::map<uint32_t, double>& values, uint32_t rank) {
  std::vector<double> others;
  for (const auto& [other, value] : values) {
    if (other != rank) others.push_back(value);
  }
  std::sort(others.begin(), others.end());
  return others.empty() ? values.at(rank) : others[(others.size() - 1) / 2];
}

// What stays when a record is full; a hang with steps after it is the first to go.
int WeightOf(const v1::FindingRecord& finding, uint64_t step) {
  const std::string& kind = finding.kind();
  if (kind == "HANG") return finding.step() < step ? 0 : 2;
  if (kind == "STRAGGLER") return 1;
  if (kind == "OOM") return 3;
  return kind == "NUMERIC" ? 4 : 5;
}

struct Part {
  const char* verb;  // of the sentence
  const char* advice;
  std::map<uint32_t, double> ms;
};

// Every part of the step, per rank. A rank waits at least until the last one arrives; what it waits
// beyond that the exchange itself took.
std::vector<Part> PartsOf(const std::map<uint32_t, RankTimes>& times) {
  Part compute{"computes",
               "its CPUs are slower, shared or throttled: compare the nodes with heddle node ls",
               {}};
  Part data{"reads data", "its copy of the data is slow: check that node's disk or network", {}};
  Part disk{"saves", "its disk is slow: check that node's disk", {}};
  Part exchange{"exchanges", "its network is slow: check that node's links", {}};
  double latest = 0;
  for (const auto& [rank, t] : times) latest = std::max(latest, t.compute + t.data + t.disk);
  for (const auto& [rank, t] : times) {
    compute.ms[rank] = t.compute;
    data.ms[rank] = t.data;
    disk.ms[rank] = t.disk;
    exchange.ms[rank] = std::max(0.0, t.waited - (latest - t.compute - t.data - t.disk));
  }
  return {std::move(compute), std::move(data), std::move(disk), std::move(exchange)};
}

struct Slow {
  size_t part = 0;  // of PartsOf, in which it is behind most
  double others = 0;
};

// By rank, in one window.
std::map<uint32_t, Slow> SlowRanks(const std::map<uint32_t, RankTimes>& times) {
  std::map<uint32_t, Slow> found;
  if (times.size() < 2) return found;
  double step_ms = 0;
  for (const auto& [rank, t] : times) {
    step_ms = std::max(step_ms, t.compute + t.data + t.disk + t.waited);
  }
  const std::vector<Part> parts = PartsOf(times);
  for (const auto& [rank, t] : times) {
    double most = 0;
    for (size_t i = 0; i < parts.size(); ++i) {
      const double own = parts[i].ms.at(rank);
      const double others = MedianOfOthers(parts[i].ms, rank);
      const bool slow = own > kSlowRatio * others && own - others > kSlowShare * step_ms;
      if (slow && own - others > most) {
        most = own - others;
        found[rank] = {i, others};
      }
    }
  }
  return found;
}

v1::FindingRecord StragglerFinding(const Situation& s, uint32_t rank, const Part& part,
                                   double others) {
  const double own = part.ms.at(rank);
  const int64_t tenths = others > 0 ? static_cast<int64_t>(own / others * 10) : 0;
  v1::FindingRecord finding = NewFinding(s, "STRAGGLER");
  NameRank(s, rank, &finding);
  finding.set_text(Str(
      "rank ", rank, " ", part.verb, " for ", Ms(own), " a step, the others for ", Ms(others),
      tenths > 0 && tenths < 10'000 ? Str(" (", tenths / 10, ".", tenths % 10, " times as long)")
                                    : std::string(),
      ": they wait for it"));
  for (const auto& [other, t] : s.ranks->times()) {
    if (finding.evidence_size() >= static_cast<int>(kEvidenceRanksMax)) break;
    finding.add_evidence(Str("rank ", other, s.node_of ? " on " : "",
                             s.node_of ? s.node_of(other) : std::string(), ": per step compute ",
                             Ms(t.compute), ", data ", Ms(t.data), ", disk ", Ms(t.disk),
                             ", waits in collectives ", Ms(t.waited)));
  }
  finding.set_advice(part.advice);
  return finding;
}

}  // namespace

std::string PlaceOf(const v1::RankHead& head, int64_t layers) {
  if (head.seq() == 0) return "no collective yet";
  return CollectiveText(head.seq(), head.op(), static_cast<int64_t>(head.unit()), layers);
}

std::string ProcessText(const std::string& letter) {
  if (letter == "R") return "running";
  if (letter == "S") return "sleeping";
  if (letter == "D") return "disk";
  if (letter == "T" || letter == "t") return "stopped";
  if (letter.empty() || letter == "Z" || letter == "X") return "dead";
  return letter;
}

std::optional<v1::FindingRecord> FindMismatch(const Situation& s) {
  // By (group, number): who launched what.
  std::map<std::pair<uint32_t, uint64_t>, std::map<uint64_t, std::vector<uint32_t>>> launched;
  for (const auto& [rank, seen] : s.ranks->ranks()) {
    if (seen.head.seq() == 0) continue;
    launched[{seen.head.group(), seen.head.seq()}][seen.head.fingerprint()].push_back(rank);
  }
  for (const auto& [at, kinds] : launched) {
    if (kinds.size() < 2) continue;
    const auto fewer = [](const auto& a, const auto& b) {
      return a.second.size() < b.second.size();
    };
    const auto odd = std::min_element(kinds.begin(), kinds.end(), fewer);
    v1::FindingRecord finding = NewFinding(s, "MISMATCH");
    std::string text;
    for (const auto& [fingerprint, ranks] : kinds) {
      const v1::RankHead& head = s.ranks->ranks().at(ranks.front()).head;
      const std::string words = Str(RanksText(ranks), " launched ", PlaceOf(head, s.layers), " of ",
                                    head.count(), " elements");
      // Who is alone of its kind first.
      text = fingerprint == odd->first ? Str(words, text.empty() ? "" : ", ", text)
                                       : Str(text, text.empty() ? "" : ", ", words);
      if (fingerprint == odd->first && ranks.size() * 2 < s.ranks->ranks().size()) {
        NameRank(s, ranks.front(), &finding);
      }
    }
    finding.set_text(Str(text, ": the ranks do not run the same program"));
    AddEvidence(s, &finding);
    finding.set_advice(
        "same heddle, configuration and data on every node? heddle node ls shows versions; if they "
        "are equal this is a bug of heddle: report it with these lines");
    return finding;
  }
  return std::nullopt;
}

v1::FindingRecord DescribeStandstill(const Situation& s) {
  v1::FindingRecord finding = NewFinding(s, "HANG");
  const std::vector<uint32_t> culprits = Culprits(s);
  std::vector<uint32_t> others;
  for (const auto& [rank, seen] : s.ranks->ranks()) {
    if (std::find(culprits.begin(), culprits.end(), rank) == culprits.end()) others.push_back(rank);
  }
  if (culprits.empty()) {
    finding.set_text(
        Str(AllText(s), AllWait(s) ? ", at " : ", last launched ", PlacesOf(s, others)));
  } else {
    NameRank(s, culprits.front(), &finding);
    const bool one = culprits.size() == 1;
    finding.set_text(Str(RanksText(culprits), one ? " is at " : " are at ", PlacesOf(s, culprits),
                         others.empty()
                             ? std::string()
                             : Str(others.size() == 1 ? Str(", rank ", others.front(), " at ")
                                                      : std::string(", the others at "),
                                   PlacesOf(s, others)),
                         "; ", Condition(s, culprits.front())));
  }
  AddEvidence(s, &finding);
  finding.set_advice(HangAdvice(s, culprits));
  return finding;
}

std::optional<v1::FindingRecord> FindHang(const Situation& s) {
  if (s.ranks->ranks().size() < s.world) return std::nullopt;
  const int64_t limit = HangLimit(s);
  if (s.quiet_ms < limit) return std::nullopt;
  for (const auto& [rank, seen] : s.ranks->ranks()) {
    if (s.now_ms - seen.at_ms > kFreshMs) return std::nullopt;
    // As it was when the rank was looked at: a late heartbeat tells nothing of the time since.
    if (seen.head.phase_age_ms() < kHangMsMin) return std::nullopt;
  }
  v1::FindingRecord finding = DescribeStandstill(s);
  finding.set_text(Str("no step for ", Seconds(s.quiet_ms), ": ", finding.text()));
  return finding;
}

std::vector<v1::FindingRecord> FindStragglers(const Situation& s) {
  std::vector<v1::FindingRecord> findings;
  if (!s.ranks->confirms()) return findings;
  std::map<uint32_t, Slow> slow = SlowRanks(s.ranks->times());
  for (const Window& window : s.ranks->windows()) {
    const std::map<uint32_t, Slow> then = SlowRanks(window.times);
    std::erase_if(slow, [&then](const auto& one) {
      const auto it = then.find(one.first);
      return it == then.end() || it->second.part != one.second.part;
    });
  }
  const std::vector<Part> parts = PartsOf(s.ranks->times());
  for (const auto& [rank, one] : slow) {
    findings.push_back(StragglerFinding(s, rank, parts[one.part], one.others));
  }
  return findings;
}

// ---- of an attempt ----

std::optional<Situation> SituationOf(const State& state, Fence fence, Time now) {
  const v1::AttemptRecord* attempt = state.attempt_of(fence);
  const Observation* ranks = state.observed(fence);
  if (attempt == nullptr || ranks == nullptr || ranks->ranks().empty()) return std::nullopt;
  const JobId id{attempt->job()};
  const Progress* progress = state.progress(fence);
  Situation s;
  s.ranks = ranks;
  s.world = attempt->world_size();
  s.layers = state.job(id)->config().model().n_layers();
  s.now_ms = now.ms;
  s.wall_ms = now.wall_ms;
  s.step = attempt->start_step();
  // Not hang_from_ms: a long evaluation is given more time, and is told of all the same.
  int64_t from = std::max(attempt->running_ms(), state.meta().started_ms());
  if (progress != nullptr) {
    s.step = std::max(s.step, progress->step);
    from = std::max(from, progress->at_ms);
    s.median_step_ms = progress->MedianStepMs();
  }
  s.quiet_ms = now.ms - from;
  s.node_of = [tasks = state.TasksOf(id, attempt->number())](uint32_t rank) {
    for (const TaskPtr& task : tasks) {
      if (rank >= task->first_rank() && rank < task->first_rank() + task->ranks()) {
        return task->worker();
      }
    }
    return std::string();
  };
  return s;
}

bool IsKnown(const v1::AttemptRecord& attempt, const v1::FindingRecord& finding) {
  return std::any_of(
      attempt.findings().begin(), attempt.findings().end(), [&](const v1::FindingRecord& known) {
        if (known.kind() != finding.kind()) return false;
        // A hang may end by itself, and another one come later.
        if (finding.kind() == "HANG") return known.step() == finding.step();
        if (finding.kind() == "MISMATCH") return true;
        return known.has_rank() == finding.has_rank() && known.rank() == finding.rank();
      });
}

std::optional<int> PlaceFor(const v1::AttemptRecord& attempt, const v1::FindingRecord& finding) {
  if (attempt.findings_size() < kFindingsMax) return attempt.findings_size();
  int least = 0;
  for (int i = 1; i < attempt.findings_size(); ++i) {
    if (WeightOf(attempt.findings(i), finding.step()) <
        WeightOf(attempt.findings(least), finding.step())) {
      least = i;
    }
  }
  if (WeightOf(attempt.findings(least), finding.step()) >= WeightOf(finding, finding.step())) {
    return std::nullopt;
  }
  return least;
}

std::optional<event::RanksDiagnosed> Diagnose(const State& state, Fence fence, Time now) {
  const v1::AttemptRecord* attempt = state.attempt_of(fence);
  if (attempt == nullptr) return std::nullopt;
  const bool running = attempt->state() == v1::ATTEMPT_STATE_RUNNING;
  const bool collecting = attempt->state() == v1::ATTEMPT_STATE_STOPPING &&
                          attempt->stop_phase() == v1::STOP_PHASE_COLLECT;
  const std::optional<Situation> situation = SituationOf(state, fence, now);
  if (!situation.has_value() || (!running && !collecting)) return std::nullopt;
  std::vector<v1::FindingRecord> found;
  if (std::optional<v1::FindingRecord> one = FindMismatch(*situation); one.has_value()) {
    found.push_back(*std::move(one));
  }
  // Once ranks have ended, their ends tell more; the others wait for nobody.
  const std::vector<TaskPtr> tasks = state.TasksOf(JobId{attempt->job()}, attempt->number());
  const bool whole = std::all_of(tasks.begin(), tasks.end(),
                                 [](const TaskPtr& task) { return task->exits().empty(); });
  if (running && whole) {
    if (std::optional<v1::FindingRecord> one = FindHang(*situation); one.has_value()) {
      found.push_back(*std::move(one));
    }
    for (v1::FindingRecord& one : FindStragglers(*situation)) found.push_back(std::move(one));
  }
  std::erase_if(found, [&](const v1::FindingRecord& one) {
    return IsKnown(*attempt, one) || !PlaceFor(*attempt, one).has_value();
  });
  if (found.empty()) return std::nullopt;
  return event::RanksDiagnosed{fence, std::move(found)};
}

}  // namespace heddle::state
