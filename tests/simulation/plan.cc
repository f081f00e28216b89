#include "tests/simulation/plan.h"

namespace heddle::state {

// The one place that may plant a fault in Apply (policy.h).
class MutantAccess {
 public:
  static Mutants& Of(Policy& policy) { return policy.mutants_; }
};

}  // namespace heddle::state

namespace heddle::simulation {

const std::vector<MutantName>& MutantNames() {
  static const std::vector<MutantName>* names = new std::vector<MutantName>{
      {"none", Mutant::kNone},
      {"no-fence-check", Mutant::kNoFenceCheck},
      {"fence-by-next-only", Mutant::kFenceByNextOnly},
      {"permit-from-receipt", Mutant::kPermitFromReceipt},
      {"key-lost", Mutant::kKeyLost},
      {"reply-before-sync", Mutant::kReplyBeforeSync},
      {"no-mass-silence", Mutant::kNoMassSilence},
      {"final-by-number", Mutant::kFinalByNumber},
      {"unacknowledged-gone", Mutant::kUnacknowledgedGone},
      {"term-not-persisted", Mutant::kTermNotPersisted},
      {"gone-without-proof", Mutant::kGoneWithoutProof},
      {"allocate-unchecked", Mutant::kAllocateUnchecked},
  };
  return *names;
}

namespace {

// A mean interval in the range, or 0 with the given chance of absence.
int64_t Rate(World& world, double present, int64_t low_ms, int64_t high_ms) {
  return world.Chance(present) ? world.Between(low_ms, high_ms) : 0;
}

void DrawSettings(World& world, Plan& plan) {
  state::Policy& policy = plan.policy;
  policy.max_orphan_ms = world.Chance(0.5) ? world.Between(60'000, 120'000) : 600'000;
  policy.orphan_margin_ms = 40'000;
  policy.stop_grace_ms = world.Between(1'000, 30'000);
  plan.hang_kill_ms = world.Chance(0.8) ? world.Between(30'000, 90'000) : 0;
  policy.prepare_ms = world.Between(20'000, 60'000);
  policy.rendezvous_ms = world.Between(20'000, 60'000);
  policy.backoff_base_ms = world.Between(100, 10'000);
  policy.backoff_ms_max = 30'000;
  policy.checkpoint_open_ms = world.Between(20'000, 120'000);
  policy.idempotency_ms = 86'400'000;
  policy.quarantine_ms = 300'000;
  policy.fail_infeasible = world.Chance(0.3);
  plan.leases.permit_ttl_ms = policy.permit_ttl_ms;
}

void DrawFaults(World& world, Plan& plan) {
  plan.coordinator_crash_ms = Rate(world, 0.6, 3'000, 60'000);
  plan.partition_ms = Rate(world, 0.5, 5'000, 60'000);
  plan.isolate_ms = Rate(world, 0.2, 20'000, 90'000);
  plan.daemon_crash_ms = Rate(world, 0.5, 4'000, 60'000);
  plan.daemon_pause_ms = Rate(world, 0.3, 5'000, 60'000);
  plan.reboot_ms = Rate(world, 0.3, 10'000, 90'000);
  plan.rank_death_ms = Rate(world, 0.6, 4'000, 60'000);
  plan.shim_death_ms = Rate(world, 0.3, 10'000, 90'000);
  plan.admin_ms = Rate(world, 0.3, 10'000, 60'000);
  plan.verb_ms = Rate(world, 0.6, 2'000, 30'000);
  plan.clock_jump_ms = Rate(world, 0.3, 10'000, 60'000);
  plan.drop = world.Chance(0.4) ? 0.02 * world.Between(1, 10) / 2 : 0;
  plan.duplicate = world.Chance(0.4) ? 0.02 * world.Between(1, 10) : 0;
  plan.delay_max_ms = world.Chance(0.5) ? 20 : world.Between(20, 2'000);
  plan.slow_reply = world.Chance(0.3) ? 0.05 : 0;
  plan.slow_ms = 15'000;
  plan.refuse = world.Chance(0.2) ? 0.1 : 0;
  plan.damage = world.Chance(0.2) ? 0.1 : 0;
  plan.peer_hang = world.Chance(0.3) ? 0.3 : 0;
  plan.rank_freeze_ms = plan.hang_kill_ms > 0 ? Rate(world, 0.4, 8'000, 60'000) : 0;
}

void PlantMutant(Plan& plan) {
  state::Mutants& mutants = state::MutantAccess::Of(plan.policy);
  mutants.skip_fence_check = plan.mutant == Mutant::kNoFenceCheck;
  mutants.fence_raised_by_next_only = plan.mutant == Mutant::kFenceByNextOnly;
  mutants.idempotency_key_lost = plan.mutant == Mutant::kKeyLost;
  mutants.final_by_number = plan.mutant == Mutant::kFinalByNumber;
  mutants.unacknowledged_is_gone = plan.mutant == Mutant::kUnacknowledgedGone;
  mutants.gone_without_proof = plan.mutant == Mutant::kGoneWithoutProof;
  mutants.allocate_without_check = plan.mutant == Mutant::kAllocateUnchecked;
  if (plan.mutant == Mutant::kNoMassSilence) {
    plan.leases.mass_hold_ms = 0;
    plan.leases.mass_hold_long_ms = 0;
    plan.leases.mass_window_ms = -1;
  }
}

}  // namespace

Plan DrawPlan(World& world, uint64_t seed, Mutant mutant) {
  Plan plan;
  plan.seed = seed;
  plan.mutant = mutant;
  plan.workers = static_cast<int>(world.Between(1, 5));
  plan.cpus = static_cast<int>(world.Between(1, 4));
  plan.jobs = static_cast<int>(world.Between(1, 6));
  plan.fault_ms = world.Between(30'000, 150'000);
  plan.drop_before_open = world.Chance(0.3);
  DrawSettings(world, plan);
  plan.coordinator_only = world.Chance(0.15);
  if (plan.coordinator_only) {
    plan.workers = static_cast<int>(world.Between(2, 5));
    plan.policy.max_orphan_ms = 600'000;
    plan.coordinator_crash_ms = Rate(world, 0.8, 3'000, 40'000);
    plan.isolate_ms = Rate(world, 0.8, 20'000, 60'000);
    plan.delay_max_ms = world.Between(5, 200);
  } else {
    DrawFaults(world, plan);
  }
  PlantMutant(plan);
  return plan;
}

}  // namespace heddle::simulation
