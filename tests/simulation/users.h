// Users in the simulation: they submit with request ids, repeat what is not answered, stop, hold
// and resume at odd moments, and administer nodes.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "tests/simulation/checkers.h"
#include "tests/simulation/coordinator_node.h"
#include "tests/simulation/network.h"
#include "tests/simulation/plan.h"
#include "tests/simulation/world.h"

namespace heddle::simulation {

class Users {
 public:
  Users(World& world, const Plan& plan, Network& network, Checkers& checkers,
        CoordinatorNode& coordinator)
      : world_(world),
        plan_(plan),
        network_(network),
        checkers_(checkers),
        coordinator_(coordinator) {}

  // All submits of the run, spread over the fault time.
  void PlanSubmits();
  // One random verb on a random job, or on a random node.
  void DoVerb();
  void DoAdmin(const std::vector<std::string>& workers);
  // When faults stop: nodes are opened again.
  void ReopenAll(const std::vector<std::string>& workers);
  // No request is under way.
  bool idle() const { return pending_ == 0; }

 private:
  // Calls until answered, as the CLI does: the same request each time.
  void Call(std::function<state::Event()> make, std::function<void(const state::Outcome&)> done,
            int tries);
  void Submit(int number);
  heddle::v1::RunConfig MakeConfig(int number);

  World& world_;
  const Plan& plan_;
  Network& network_;
  Checkers& checkers_;
  CoordinatorNode& coordinator_;
  JobIdGenerator ids_{1};
  std::vector<JobId> known_;
  uint64_t next_request_ = 0;
  int pending_ = 0;
};

}  // namespace heddle::simulation
