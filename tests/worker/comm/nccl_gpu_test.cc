// NCCL on real GPUs: one process per rank and device, as a worker starts them. Label `gpu`.
#include <gtest/gtest.h>
#include <stdlib.h>

#include <algorithm>
#include <cctype>
#include <cstdio>
#include <filesystem>
#include <vector>

#include "tests/checkpoint/temp_dir.h"
#include "tests/worker/comm/exchange_checks.h"
#include "tests/worker/comm/forked_ranks.h"
#include "tests/worker/comm/group_checks.h"
#include "worker/comm/communicator.h"
#include "worker/comm/ordered_sum.h"

namespace heddle::comm {
namespace {

int Devices() {
  int count = 0;
  for (const auto& entry : std::filesystem::directory_iterator("/dev")) {
    const std::string name = entry.path().filename().string();
    const std::string number = name.substr(std::min<size_t>(6, name.size()));
    const bool digits = !number.empty() && std::all_of(number.begin(), number.end(), [](char c) {
      return std::isdigit(static_cast<unsigned char>(c)) != 0;
    });
    if (name.starts_with("nvidia") && digits) ++count;
  }
  return count;
}

std::vector<float> Row(int rank, size_t count) {
  std::vector<float> row(count);
  for (size_t i = 0; i < count; ++i) {
    row[i] = (rank == 0 ? 1.0f : -0.3f) * static_cast<float>(i % 1013) * 1.1f;
  }
  return row;
}

// Empty: the sums have the bits of OrderedSum.
std::string RankProblem(int rank, int world, const std::string& folder) {
  const GroupOptions options = ForkedOptions(folder, rank, world, world);
  StatusOr<std::unique_ptr<Communicator>> group = ConnectNccl(options);
  if (!group.ok()) return Message(group.status());
  // Fewer than ranks, a tail, several buckets.
  for (const size_t count : {size_t{1}, size_t{1003}, (size_t{20} << 20) + 5}) {
    std::vector<float> rows;
    for (int other = 0; other < world; ++other) {
      const std::vector<float> row = Row(other, count);
      rows.insert(rows.end(), row.begin(), row.end());
    }
    std::vector<float> expected(count);
    OrderedSum(rows.data(), static_cast<size_t>(world), count, expected.data());
    std::vector<float> values = Row(rank, count);
    const Status summed = (*group)->AllReduceSum(std::span<float>(values), kNoUnit);
    if (!summed.ok()) return Message(summed);
    if (values != expected) return Str("another sum of ", count, " numbers");
  }
  std::vector<double> few = {1.0, static_cast<double>(rank)};
  const Status summed = (*group)->AllReduceSum(std::span<double>(few));
  if (!summed.ok()) return Message(summed);
  if (few[0] != world) return "another sum of doubles";
  // Gathers and scatters, and sums of a world of one, which nothing rounds.
  const std::vector<float> all = AllResults(rank, group->get());
  if (world == 1 && all != AllResults(0, MakeSolo().get())) return "other bits than without NCCL";
  ExpectAllExchanges(group->get());
  return testing::Test::HasFailure() ? "a collective failed" : "";
}

TEST(NcclOnGpus, SumsHaveTheBitsOfAnAscendingSum) {
  const int devices = Devices();
  if (devices == 0) GTEST_SKIP() << "no GPU here";
  std::error_code ignored;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", ignored);
  if (!std::filesystem::exists(self.parent_path() / "libheddle_cuda.so")) {
    GTEST_SKIP() << "the CUDA plug-in is not built: HEDDLE_WITH_CUDA is off";
  }
  const int world = std::min(devices, 2);  // NCCL takes one rank per device
  std::printf("%d devices, %d ranks\n", devices, world);
  const checkpoint::TempDir folder;
  const std::vector<int> ends = ForkRanks(world, [&](int rank) {
    setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID", 1);
    setenv("CUDA_VISIBLE_DEVICES", Str(rank).c_str(), 1);
    return RankProblem(rank, world, folder.path());
  });
  EXPECT_EQ(ends, std::vector<int>(static_cast<size_t>(world), 0));
}

}  // namespace
}  // namespace heddle::comm
