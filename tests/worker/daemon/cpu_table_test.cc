#include "worker/daemon/cpu_table.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <filesystem>
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
    return CpuTable(dir.path() + "/table", std::move(granted));
  }
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
  CpuTable broken("/no/such/folder/table", {0});
  EXPECT_EQ(broken.Take(machine.Task("c"), 1, 1), (Cpus{{}}));
}

}  // namespace
}  // namespace heddle::worker
