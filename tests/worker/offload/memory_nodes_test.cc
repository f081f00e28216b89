// The memory of blocks and the arena come from the nodes that were asked for.
#include <gtest/gtest.h>

#include <array>
#include <fstream>

#include "base/numa/numa.h"
#include "tests/support/numa_policy.h"
#include "tests/worker/offload/offload_test_util.h"

namespace heddle::offload {
namespace {

// Mappings of this process that prefer a node.
int Preferring() {
  std::ifstream maps("/proc/self/numa_maps");
  int count = 0;
  for (std::string line; std::getline(maps, line);) {
    count += line.find(" prefer") != std::string::npos ? 1 : 0;
  }
  return count;
}

class MemoryNodes : public testing::Test {
 protected:
  void SetUp() override {
    if (test::PoliciesForbidden()) GTEST_SKIP() << "memory policies may not be asked for here";
    alignas(kPageBytes) static std::array<std::byte, kPageBytes> page;
    const Status bound = numa::BindMemory(page, std::vector<int>{0});
    if (bound.code() == StatusCode::kPermissionDenied) GTEST_SKIP() << bound;
    EXPECT_OK(bound);
  }
};

TEST_F(MemoryNodes, ThoseOfASetAreThoseOfItsBlocksSmallAndLarge) {
  for (const int64_t bytes : {int64_t{5000}, int64_t{3} << 20}) {
    const BlockTable table = WeightSlots(2, bytes);
    for (const bool bound : {false, true}) {
      ASSERT_OK_AND_ASSIGN(std::unique_ptr<Home> home, MakeHome("", table, DiskMethod::kAuto));
      ResidentSetOptions options = {.budget_bytes = BlockMemoryBytes(bytes)};
      if (bound) options.memory_nodes = {0};
      ASSERT_OK_AND_ASSIGN(const std::unique_ptr<ResidentSet> set,
                           ResidentSet::Create(table, options, std::move(home)));
      ASSERT_OK_AND_ASSIGN(std::byte* const data, set->Pin(1, Kind::kWeights, Access::kOverwrite));
      std::byte* const last = data + bytes - 1;
      *last = std::byte{1};
      EXPECT_EQ(test::PolicyOf(data).Prefers(1), bound) << bytes;
      EXPECT_EQ(test::PolicyOf(last).Prefers(1), bound) << bytes;
      EXPECT_OK(set->Unpin(1, Kind::kWeights));
    }
  }
}

TEST_F(MemoryNodes, ThoseOfAnArenaAreAskedFor) {
  const BlockTable table = WeightSlots(3, 1 << 20);
  const int before = Preferring();
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Arena> anywhere, Arena::Create(table));
  EXPECT_EQ(Preferring(), before);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Home> home,
                       MakeHome("", table, DiskMethod::kAuto, {0}));
  EXPECT_EQ(Preferring(), before + 1);
}

// A node that is not there costs nothing but its nearness.
TEST_F(MemoryNodes, ThatAreNotThereAreNoError) {
  const BlockTable table = WeightSlots(2, 5000);
  ASSERT_OK_AND_ASSIGN(std::unique_ptr<Home> home, MakeHome("", table, DiskMethod::kAuto, {1000}));
  ASSERT_OK_AND_ASSIGN(
      const std::unique_ptr<ResidentSet> set,
      ResidentSet::Create(table, {.budget_bytes = 8192, .memory_nodes = {1000}}, std::move(home)));
  for (uint32_t slot = 0; slot < 2; ++slot) ASSERT_OK(Fill(*set, slot, 1, 5000));
  for (uint32_t slot = 0; slot < 2; ++slot) ASSERT_OK(Check(*set, slot, 1, 5000));
}

}  // namespace
}  // namespace heddle::offload
