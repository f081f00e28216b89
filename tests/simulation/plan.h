// What one seed simulates: sizes, settings drawn up to their extremes, kinds and rates of faults,
// and the mutant that is planted, if any.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "coordinator/state/leases.h"
#include "coordinator/state/policy.h"
#include "tests/simulation/world.h"

namespace heddle::simulation {

// Faults planted in the code under test or in its peers (control-plane M6).
enum class Mutant {
  kNone,
  kNoFenceCheck,        // seals and commits of fenced attempts are taken
  kFenceByNextOnly,     // FENCING and ENDED do not raise the fence
  kPermitFromReceipt,   // workers count permits from the reply's arrival
  kKeyLost,             // the idempotency key is not in the batch of its effect
  kReplyBeforeSync,     // effects and replies do not wait for the disk
  kNoMassSilence,       // L9 off
  kFinalByNumber,       // the end of a task is heard under a new number only
  kUnacknowledgedGone,  // a task never acknowledged counts as gone at registration
  kTermNotPersisted,    // a restart uses the old term
  kGoneWithoutProof,    // tasks of a lost worker count as dead at once
  kAllocateUnchecked,   // stale placement decisions are applied
};
struct MutantName {
  const char* name;
  Mutant mutant;
};
const std::vector<MutantName>& MutantNames();

struct Plan {
  uint64_t seed = 0;
  Mutant mutant = Mutant::kNone;
  state::Policy policy;
  state::LeaseOptions leases;

  int workers = 2;
  int cpus = 4;
  int jobs = 4;
  int64_t hang_kill_ms = 600'000;  // schedule.hang_kill_after of all jobs; 0: never
  int64_t fault_ms = 120'000;      // faults stop then
  int64_t settle_ms = 7'200'000;   // and by then all must have ended

  // Only the coordinator crashes or is cut off: no attempt may end for that (P2).
  bool coordinator_only = false;
  // Effects for a session whose stream is not open yet are dropped instead of kept.
  bool drop_before_open = false;

  double drop = 0;  // of a message
  double duplicate = 0;
  int64_t delay_max_ms = 50;
  double slow_reply = 0;  // share of messages that take up to slow_ms
  int64_t slow_ms = 0;

  // Mean ms between faults of a kind; 0: none.
  int64_t coordinator_crash_ms = 0;
  int64_t isolate_ms = 0;    // coordinator cut off from everyone
  int64_t partition_ms = 0;  // one worker, either or both directions
  int64_t daemon_crash_ms = 0;
  int64_t daemon_pause_ms = 0;
  int64_t reboot_ms = 0;
  int64_t rank_death_ms = 0;
  int64_t rank_freeze_ms = 0;  // a rank stops for good; only with a limit on hangs
  int64_t shim_death_ms = 0;
  int64_t admin_ms = 0;       // cordon, drain, reopen, forget
  int64_t verb_ms = 0;        // cancel, pause, resume, hold, release, preempt
  int64_t clock_jump_ms = 0;  // of the coordinator's wall clock
  double refuse = 0;          // of tasks
  double damage = 0;          // of loads
  double peer_hang = 0;       // ranks that never notice a dead peer
};

Plan DrawPlan(World& world, uint64_t seed, Mutant mutant);

}  // namespace heddle::simulation
