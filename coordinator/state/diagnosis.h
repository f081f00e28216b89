// What is wrong with the ranks of an attempt, from what they do (training-runtime.md 17): heads in,
// findings out. Pure; the runtime asks after every heartbeat and posts what is new as an event.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "coordinator/state/event.h"
#include "coordinator/state/observation.h"
#include "coordinator/state/policy.h"
#include "heddle/v1/records.pb.h"

namespace heddle::state {

class State;

// Everything that a diagnosis looks at. `ranks` is borrowed.
struct Situation {
  const Observation* ranks = nullptr;
  uint32_t world = 0;
  int64_t layers = 0;          // of the model, for the names of its units
  int64_t now_ms = 0;          // of the clock of RankSeen::at_ms
  int64_t wall_ms = 0;         // for the findings
  uint64_t step = 0;           // done
  int64_t quiet_ms = 0;        // since the last step, else since the attempt runs
  int64_t median_step_ms = 0;  // 0: none was timed yet
  std::function<std::string(uint32_t rank)> node_of;
};

// Two ranks launched different operations under the same number of the same group. It is no matter
// of time: it is reported at once.
std::optional<heddle::v1::FindingRecord> FindMismatch(const Situation& situation);
// No step for max(3 x median step, 5 s), and no rank moved meanwhile; more before the first step
// and while a checkpoint or an evaluation is under way. Nothing without fresh heads of all ranks:
// silence is the lease's matter (W1).
std::optional<heddle::v1::FindingRecord> FindHang(const Situation& situation);
// Where the ranks stand, without a judgement of time: the same sentence and evidence.
heddle::v1::FindingRecord DescribeStandstill(const Situation& situation);
// Ranks whose time for one part of the step is more than 1.3 times that of the others (their
// median) over windows in a row that cover 10 s, by at least a twentieth of the step. Waiting in a
// collective is the time of who arrives last: what a rank waits for others is not counted against
// it.
std::vector<heddle::v1::FindingRecord> FindStragglers(const Situation& situation);

// "#1812 all-gather block.7"; "no collective yet".
std::string PlaceOf(const heddle::v1::RankHead& head, int64_t layers);
// "stopped" for T, "running" for R ...
std::string ProcessText(const std::string& letter);

// What is known of the attempt that owns `fence`; nothing if it has no heads or does not run.
std::optional<Situation> SituationOf(const State& state, Fence fence, Time now);
// What the runtime posts after a heartbeat of `fence`: findings that the attempt's record does not
// have yet. Nothing if there are none.
std::optional<event::RanksDiagnosed> Diagnose(const State& state, Fence fence, Time now);

// The record has this finding already.
bool IsKnown(const heddle::v1::AttemptRecord& attempt, const heddle::v1::FindingRecord& finding);
// Where it goes in the record, which holds eight: behind the others, or in place of the oldest of
// those that weigh least and less than it (a hang that is over, a straggler, a hang, memory,
// numbers, a mismatch). Nothing if all that is there weighs as much: eight stragglers leave no room
// for a ninth, but for everything graver.
std::optional<int> PlaceFor(const heddle::v1::AttemptRecord& attempt,
                            const heddle::v1::FindingRecord& finding);

}  // namespace heddle::state
