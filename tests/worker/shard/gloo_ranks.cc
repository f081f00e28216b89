#include "tests/worker/shard/gloo_ranks.h"

#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <thread>

#include "tests/support/status_matchers.h"
#include "tests/worker/comm/thread_ranks.h"
#include "worker/comm/shared_memory.h"

namespace heddle::shard {
namespace {

// Three ranks talk as ranks of several hosts do, other numbers as those of one host.
bool OverSockets(int world) { return world == 3; }

StatusOr<std::unique_ptr<comm::Communicator>> Connect(comm::FakeRendezvous* server, int rank,
                                                      int world) {
  if (world == 1) return comm::MakeSolo();
  comm::GroupOptions options = comm::OptionsOf(server, rank, world);
  options.step_timeout = std::chrono::milliseconds(20000);
  ASSIGN_OR_RETURN(std::unique_ptr<comm::Communicator> group, comm::ConnectGloo(options));
  if (OverSockets(world)) return group;
  std::string why_not;
  ASSIGN_OR_RETURN(group, comm::OverSharedMemory(std::move(group), &why_not));
  if (!why_not.empty()) return FailedPrecondition(why_not);
  return group;
}

// The ranks' groups of a world, made once: connecting takes longer than a case.
const std::vector<std::unique_ptr<comm::Communicator>>& GroupsOf(int world) {
  static std::map<int, std::vector<std::unique_ptr<comm::Communicator>>> all;
  static std::map<int, comm::FakeRendezvous> servers;
  auto& groups = all[world];
  if (!groups.empty()) return groups;
  comm::FakeRendezvous* server = &servers[world];
  groups.resize(static_cast<size_t>(world));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world; ++rank) {
    threads.emplace_back([&groups, server, rank, world] {
      auto group = Connect(server, rank, world);
      ASSERT_OK(group.status());
      groups[static_cast<size_t>(rank)] = *std::move(group);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return groups;
}

}  // namespace

Outcome RunOnRanks(const Case& c) {
  std::vector<Outcome> found(static_cast<size_t>(c.world), NoOutcome(c));
  const auto& groups = GroupsOf(c.world);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < c.world; ++rank) {
    threads.emplace_back([&, rank] {
      const size_t r = static_cast<size_t>(rank);
      ASSERT_OK(RunRank(c, groups[r].get(), &found[r]));
    });
  }
  for (std::thread& thread : threads) thread.join();
  Outcome all = found.front();
  for (const Outcome& rank : found) {
    Merge(rank.masters, &all.masters);
    Merge(rank.first_gradients, &all.first_gradients);
  }
  return all;
}

}  // namespace heddle::shard
