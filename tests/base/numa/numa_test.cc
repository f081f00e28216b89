#include "base/numa/numa.h"

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <utility>

#include "tests/support/numa_policy.h"
#include "tests/support/status_matchers.h"

namespace heddle::numa {
namespace {

// A folder as /sys/devices/system/node, made up.
class Machine {
 public:
  explicit Machine(const std::vector<std::string>& cpulists, const std::string& with_memory = "") {
    std::string pattern = std::filesystem::temp_directory_path() / "heddle-numa-XXXXXX";
    EXPECT_NE(mkdtemp(pattern.data()), nullptr);
    path_ = pattern;
    Write("online", Str("0-", cpulists.size() - 1));
    if (!with_memory.empty()) Write("has_memory", with_memory);
    for (size_t node = 0; node < cpulists.size(); ++node) {
      std::filesystem::create_directory(Str(path_, "/node", node));
      Write(Str("node", node, "/cpulist"), cpulists[node]);
    }
  }
  ~Machine() { std::filesystem::remove_all(path_); }
  Machine(const Machine&) = delete;
  Machine& operator=(const Machine&) = delete;

  const std::string& path() const { return path_; }
  std::vector<int> Near(std::vector<uint32_t> cpus) const {
    return NodesNear(ReadNodes(path_), cpus);
  }
  void Write(const std::string& name, const std::string& text) {
    std::ofstream(path_ + "/" + name) << text << '\n';
  }

 private:
  std::string path_;
};

using Numbers = std::vector<int>;
using Cpus = std::vector<uint32_t>;

TEST(Numa, ReadsNodesAndTheirCpus) {
  const Machine machine({"0-3,8-11", "4-7,12", "", "13"}, "0-2");
  const std::vector<Node> nodes = ReadNodes(machine.path());
  ASSERT_EQ(nodes.size(), 4u);
  EXPECT_EQ(nodes[0].cpus, (Cpus{0, 1, 2, 3, 8, 9, 10, 11}));
  EXPECT_EQ(nodes[1].cpus, (Cpus{4, 5, 6, 7, 12}));
  EXPECT_TRUE(nodes[2].cpus.empty());
  EXPECT_TRUE(nodes[2].has_memory);
  EXPECT_EQ(nodes[3].number, 3);
  EXPECT_FALSE(nodes[3].has_memory);
}

TEST(Numa, MemoryIsNearTheNodesOfTheCpus) {
  const Machine two({"0-3", "4-7"});
  EXPECT_EQ(two.Near({1, 2}), (Numbers{0}));
  EXPECT_EQ(two.Near({5}), (Numbers{1}));
  const Machine four({"0,4", "1,5", "2,6", "3,7"});
  EXPECT_EQ(four.Near({4}), (Numbers{0}));
  EXPECT_EQ(four.Near({3, 1}), (Numbers{1, 3}));
}

TEST(Numa, NothingIsToBeDoneWhereEveryNodeIsNear) {
  EXPECT_EQ(Machine({"0-7"}).Near({1, 2}), Numbers()) << "one node";
  const Machine two({"0-3", "4-7"});
  EXPECT_EQ(two.Near({3, 4}), Numbers()) << "both";
  const Machine with_far_memory({"0-3", "4-7", ""});
  EXPECT_EQ(with_far_memory.Near({3, 4}), Numbers()) << "all that have CPUs";
  EXPECT_EQ(with_far_memory.Near({4}), (Numbers{1})) << "not the far one";
  EXPECT_EQ(two.Near({}), Numbers());
}

TEST(Numa, NodesWithoutMemoryAreNotBoundTo) {
  const Machine machine({"0-3", "4-7", "8-11"}, "0,2");
  EXPECT_EQ(machine.Near({4, 8}), (Numbers{2}));
  EXPECT_EQ(machine.Near({4}), Numbers());
}

TEST(Numa, WhatCannotBeReadIsNoMachineWithNodes) {
  EXPECT_TRUE(ReadNodes("/no/such/folder").empty());
  EXPECT_EQ(NodesNear({}, Cpus{0}), Numbers());
  for (const char* list : {"0-", "x", "0;1", "0-3,,5", "99999999999", "0-99999"}) {
    Machine machine({"0", "1"});
    machine.Write("node1/cpulist", list);
    EXPECT_TRUE(ReadNodes(machine.path()).empty()) << list;
  }
}

class Pages {
 public:
  Pages() {
    data_ = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }
  ~Pages() { munmap(data_, kBytes); }
  Pages(const Pages&) = delete;
  Pages& operator=(const Pages&) = delete;
  std::span<std::byte> range() const { return {static_cast<std::byte*>(data_), kBytes}; }
  test::MemoryPolicy policy() const { return test::PolicyOf(data_); }

 private:
  static constexpr size_t kBytes = 1 << 16;
  void* data_;
};

TEST(Numa, MemoryPrefersTheNodeItIsBoundTo) {
  if (test::PoliciesForbidden()) GTEST_SKIP() << "memory policies may not be asked for here";
  const Pages pages;
  EXPECT_EQ(pages.policy().mode, MPOL_DEFAULT);
  const Status bound = BindMemory(pages.range(), Numbers{0});
  if (bound.code() == StatusCode::kPermissionDenied) GTEST_SKIP() << bound;
  ASSERT_OK(bound);
  EXPECT_TRUE(pages.policy().Prefers(1)) << pages.policy().mode << " " << pages.policy().nodes;
}

TEST(Numa, NodesThatAreNotThereBindNothing) {
  if (test::PoliciesForbidden()) GTEST_SKIP() << "memory policies may not be asked for here";
  const Pages pages;
  EXPECT_FALSE(BindMemory(pages.range(), Numbers{1022, 1023}).ok());
  EXPECT_STATUS(BindMemory(pages.range(), Numbers{1024}), StatusCode::kInvalidArgument,
                "memory node 1024");
  Binding binding({1022, 1023});
  binding.Bind(pages.range());
  binding.Bind(pages.range());
  Binding().Bind(pages.range());
  EXPECT_EQ(pages.policy().mode, MPOL_DEFAULT);
  Binding({1023}).Bind(pages.range());
  EXPECT_EQ(pages.policy().nodes, 0u);
}

}  // namespace
}  // namespace heddle::numa
