// Numbers that Apply decides with: defaults are control-plane sections 4 to 6. One value per
// coordinator, given to every call; never read from anywhere else.
#pragma once

#include <cstdint>

namespace heddle::state {

// Test-only faults, one per mutant of control-plane M6. Nothing but tests/simulation can set one:
// Policy keeps them private and only MutantAccess, which lives there, is a friend.
struct Mutants {
  bool skip_fence_check = false;  // checkpoints never look at the fence; open ones outlive it
  bool fence_raised_by_next_only = false;  // not at FENCING and ENDED
  bool idempotency_key_lost = false;       // key not in the batch of its effect
  bool unacknowledged_is_gone = false;     // at registration
  bool gone_without_proof = false;         // LOST task counts as dead at once
  bool allocate_without_check = false;     // stale placement decisions are applied
  bool final_by_number = false;            // the end of a task under an old number is not heard
};

struct Policy {
  int64_t permit_ttl_ms = 20'000;         // L4
  int64_t heartbeat_interval_ms = 2'000;  // L11
  int64_t max_orphan_ms = 1'800'000;      // L5
  int64_t orphan_margin_ms = 120'000;     // clock rate and kill time on top of max_orphan
  int64_t acknowledge_ms = 15'000;        // A2
  int64_t prepare_ms = 600'000;           // A4
  int64_t rendezvous_ms = 300'000;        // A6
  int64_t collect_ms = 250;               // A8
  int64_t stop_grace_ms = 120'000;        // S7, default of pause, preempt, drain, time limit
  int64_t stop_grace_ms_max = 3'600'000;
  int64_t term_ms = 10'000;          // TERM to KILL (A10)
  int64_t unkillable_ms = 60'000;    // A13
  int64_t resend_ms = 5'000;         // unconfirmed commands are sent again
  int64_t settle_ms = 60'000;        // fenced and still not ended: the worker registers anew
  int64_t backoff_base_ms = 10'000;  // 4.6
  int64_t backoff_ms_max = 600'000;
  uint32_t failures_without_progress_max = 3;  // J10
  uint32_t rollbacks_max = 3;                  // training-runtime.md 16.2 ...
  uint64_t rollback_window_steps = 1000;       // ... among so many steps
  int64_t avoid_node_ms = 3'600'000;           // 4.4
  int64_t blame_window_ms = 86'400'000;        // W5
  uint32_t blames_to_quarantine = 3;
  int64_t quarantine_ms = 86'400'000;
  int64_t lost_twice_ms = 600'000;  // W2
  int64_t probation_ms = 60'000;
  int64_t checkpoint_open_ms = 1'800'000;  // K4
  int64_t file_grace_ms = 25'000;          // L6: before files of an aborted checkpoint go
  int64_t idempotency_ms = 86'400'000;     // D1
  uint32_t restore_candidates = 4;         // offered to an attempt, best first
  bool fail_infeasible = false;            // scheduler.infeasible = fail (J22)

 private:
  friend class MutantAccess;
  friend const Mutants& MutantsOf(const Policy& policy);
  Mutants mutants_;
};

inline const Mutants& MutantsOf(const Policy& policy) { return policy.mutants_; }

}  // namespace heddle::state
