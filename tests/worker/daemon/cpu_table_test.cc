#include "worker/daemon/cpu_table.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
#include <numeric>
#include <set>

#include "tests/support/worker/temp_dir.h"

namespace heddle::worker {
namespace {

using Cpus = std::vector<std::vector<uint32_t>>;

struct Machine {
  test::TempDir dir;
  std::string Task(const std::string& name) {
    const std::string path = dir.path() + "/" + name;
    mkdir(path.c_str(), 0700);
    return path;
  }
  CpuTable Daemon(std::vector<uint32_t> granted) {
    return CpuTable(dir.path() + "/table", std::move(granted), nodes);
  }
  std::vector<numa::Node> nodes;
};

TEST(CpuTable, TwoDaemonsOfOneMachineDoNotShareACore) {
  Machine machine;
  CpuTable one = machine.Daemon({0, 1});
  CpuTable two = machine.Daemon({0, 1});
  const Cpus first = one.Take(machine.Task("a"), 1, 1);
  const Cpus second = two.Take(machine.Task("b"), 1, 1);
  EXPECT_NE(first[0], second[0]);
}

TEST(CpuTable, RanksOfATaskGetDistinctCpusAndThenShare) {
  Machine machine;
  CpuTable table = machine.Daemon({4, 5, 6, 7});
  const Cpus cpus = table.Take(machine.Task("a"), 2, 2);
  EXPECT_EQ(cpus, (Cpus{{4, 5}, {6, 7}}));
  const Cpus more = table.Take(machine.Task("b"), 3, 2);
  std::multiset<uint32_t> use;
  for (const auto& rank : more) use.insert(rank.begin(), rank.end());
  for (const uint32_t cpu : {4, 5, 6, 7}) EXPECT_LE(use.count(cpu), 2u);
}

TEST(CpuTable, ReleasedAndDeletedTasksGiveTheirCpusBack) {
  Machine machine;
  CpuTable table = machine.Daemon({0, 1});
  const std::string a = machine.Task("a"), b = machine.Task("b c");
  EXPECT_EQ(table.Take(a, 1, 1), (Cpus{{0}}));
  EXPECT_EQ(table.Take(b, 1, 1), (Cpus{{1}}));
  table.Release(a);
  EXPECT_EQ(table.Take(machine.Task("c"), 1, 1), (Cpus{{0}}));
  std::filesystem::remove_all(b);
  EXPECT_EQ(table.Take(machine.Task("d"), 1, 1), (Cpus{{1}}));
}

TEST(CpuTable, BindsNothingItCannotBind) {
  Machine machine;
  CpuTable table = machine.Daemon({0, 1});
  EXPECT_EQ(table.Take(machine.Task("a"), 2, 0), (Cpus{{}, {}})) << "a fraction of a CPU";
  EXPECT_EQ(table.Take(machine.Task("b"), 1, 3), (Cpus{{}})) << "more than granted";
  CpuTable broken("/no/such/folder/table", {0}, {});
  EXPECT_EQ(broken.Take(machine.Task("c"), 1, 1), (Cpus{{}}));
}

std::vector<uint32_t> UpTo(uint32_t count) {
  std::vector<uint32_t> cpus(count);
  std::iota(cpus.begin(), cpus.end(), 0);
  return cpus;
}

// CPUs in turns over nodes, as some machines count them.
std::vector<numa::Node> InTurns(int nodes, uint32_t cpus) {
  std::vector<numa::Node> all(static_cast<size_t>(nodes));
  for (int n = 0; n < nodes; ++n) all[static_cast<size_t>(n)].number = n;
  for (uint32_t cpu = 0; cpu < cpus; ++cpu) all[cpu % all.size()].cpus.push_back(cpu);
  return all;
}

TEST(CpuTable, ARankHasTheCpusOfOneNode) {
  Machine machine;
  machine.nodes = InTurns(2, 8);
  CpuTable table = machine.Daemon(UpTo(8));
  EXPECT_EQ(table.Take(machine.Task("a"), 2, 2), (Cpus{{0, 2}, {1, 3}})) << "each a node's memory";
  EXPECT_EQ(table.Take(machine.Task("b"), 2, 2), (Cpus{{4, 6}, {5, 7}}));
}

TEST(CpuTable, ARankGetsTheNodeWithTheMostLeft) {
  Machine machine;
  machine.nodes = {{.number = 0, .cpus = {0, 1, 2}}, {.number = 1, .cpus = {3, 4, 5, 6}}};
  CpuTable table = machine.Daemon(UpTo(7));
  EXPECT_EQ(table.Take(machine.Task("a"), 3, 2), (Cpus{{3, 4}, {0, 1}, {5, 6}}));
}

TEST(CpuTable, ARankThatFitsNoNodeHasAsFewAsCanBe) {
  Machine machine;
  machine.nodes = InTurns(4, 12);
  CpuTable table = machine.Daemon(UpTo(12));
  EXPECT_EQ(table.Take(machine.Task("a"), 2, 5), (Cpus{{0, 1, 4, 5, 8}, {2, 3, 6, 7, 10}}));
}

TEST(CpuTable, NoCpuIsSharedForTheSakeOfANode) {
  Machine machine;
  machine.nodes = InTurns(2, 6);
  CpuTable table = machine.Daemon(UpTo(6));
  EXPECT_EQ(table.Take(machine.Task("a"), 3, 2), (Cpus{{0, 2}, {1, 3}, {4, 5}}));
  // What is left over first, and then beside it.
  const std::string b = machine.Task("b");
  EXPECT_EQ(table.Take(b, 1, 3), (Cpus{{0, 2, 4}}));
  EXPECT_EQ(table.Take(machine.Task("c"), 1, 4), (Cpus{{0, 1, 3, 5}}));
}

TEST(CpuTable, NodesAreThoseOfTheCpusItWasGranted) {
  Machine machine;
  machine.nodes = {{.number = 0, .cpus = {0, 1, 2, 3}}, {.number = 1, .cpus = {4, 5, 6, 7}}};
  CpuTable table = machine.Daemon({2, 4, 5, 6, 9});
  EXPECT_EQ(table.Take(machine.Task("a"), 1, 3), (Cpus{{4, 5, 6}}));
  EXPECT_EQ(table.Take(machine.Task("b"), 1, 2), (Cpus{{2, 9}})) << "9 is of no node";
}

}  // namespace
}  // namespace heddle::worker
