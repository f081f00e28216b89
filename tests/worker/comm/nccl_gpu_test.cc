// NCCL on real GPUs: one process per rank and device, as a worker starts them. Label `gpu`.
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <thread>
#include <vector>

#include "heddle/v1/control.pb.h"
#include "tests/checkpoint/temp_dir.h"
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

// A rendezvous of processes: the id lies in a file.
RendezvousCall ThroughFile(const std::string& path) {
  return
      [path](
          const heddle::v1::RendezvousRequest& request) -> StatusOr<heddle::v1::RendezvousReply> {
        heddle::v1::RendezvousReply reply;
        if (request.verb() == heddle::v1::RENDEZVOUS_VERB_SET) {
          std::ofstream(path + ".tmp", std::ios::binary) << request.values(0);
          std::filesystem::rename(path + ".tmp", path);
          return reply;
        }
        const auto deadline =
            std::chrono::steady_clock::now() + std::chrono::milliseconds(request.timeout_ms());
        while (!std::filesystem::exists(path)) {
          if (std::chrono::steady_clock::now() > deadline) return Unavailable("no id came");
          std::this_thread::sleep_for(std::chrono::milliseconds(10));
        }
        std::ifstream file(path, std::ios::binary);
        reply.add_values(std::string(std::istreambuf_iterator<char>(file), {}));
        return reply;
      };
}

std::vector<float> Row(int rank, size_t count) {
  std::vector<float> row(count);
  for (size_t i = 0; i < count; ++i) {
    row[i] = (rank == 0 ? 1.0f : -0.3f) * static_cast<float>(i % 1013) * 1.1f;
  }
  return row;
}

// Empty: the sums have the bits of OrderedSum.
std::string RankProblem(int rank, int world, const std::string& path) {
  GroupOptions options;
  options.rank = rank;
  options.world_size = world;
  options.rendezvous = ThroughFile(path);
  options.init_timeout = std::chrono::milliseconds(60'000);
  options.step_timeout = std::chrono::milliseconds(60'000);
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
    const Status summed = (*group)->AllReduceSum(std::span<float>(values));
    if (!summed.ok()) return Message(summed);
    if (values != expected) return Str("another sum of ", count, " numbers");
  }
  std::vector<double> few = {1.0, static_cast<double>(rank)};
  const Status summed = (*group)->AllReduceSum(std::span<double>(few));
  if (!summed.ok()) return Message(summed);
  return few[0] == world ? "" : "another sum of doubles";
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
  std::vector<pid_t> ranks;
  for (int rank = 0; rank < world; ++rank) {
    ranks.push_back(fork());
    if (ranks.back() == 0) {
      setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID", 1);
      setenv("CUDA_VISIBLE_DEVICES", Str(rank).c_str(), 1);
      const std::string problem = RankProblem(rank, world, folder.path() + "/id");
      if (!problem.empty()) std::fprintf(stderr, "rank %d: %s\n", rank, problem.c_str());
      _exit(problem.empty() ? 0 : 1);
    }
  }
  for (const pid_t rank : ranks) {
    int status = -1;
    ASSERT_EQ(waitpid(rank, &status, 0), rank);
    EXPECT_EQ(status, 0);
  }
}

}  // namespace
}  // namespace heddle::comm
