// MPI between processes that no mpirun started: the same bits as Gloo's, for ranks of one task and
// of several; what happens when a rank does not come, stands still or is killed.
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <thread>
#include <vector>

#include "tests/checkpoint/temp_dir.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/comm/fake_rendezvous.h"
#include "tests/worker/comm/forked_ranks.h"
#include "tests/worker/comm/group_checks.h"
#include "tests/worker/comm/subset_checks.h"
#include "worker/comm/communicator.h"

namespace heddle::comm {
namespace {

using std::chrono::milliseconds;

// Four ranks that poll take turns on few cores: what is large is left to the whole group.
constexpr size_t kLargestOfPairs = 100'001;

void Save(const std::string& path, const std::vector<float>& values) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(values.data()),
             static_cast<std::streamsize>(values.size() * sizeof(float)));
}

std::string Bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

// What `rank` of a world over Gloo computes, as bytes; ranks are threads.
std::vector<std::string> OverGloo(int world, int salt = 0, size_t largest = 1'200'001) {
  FakeRendezvous server;
  std::vector<std::string> found(static_cast<size_t>(world));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world; ++rank) {
    threads.emplace_back([&, rank] {
      GroupOptions options = ForkedOptions("", rank, world, world);
      options.rendezvous = [&server, rank](const heddle::v1::RendezvousRequest& request)
          -> StatusOr<heddle::v1::RendezvousReply> {
        return server.Answer(static_cast<uint32_t>(rank), request);
      };
      const auto group = ConnectGloo(options);
      ASSERT_OK(group.status());
      const std::vector<float> values = AllResults(rank, group->get(), salt, largest);
      found[static_cast<size_t>(rank)].assign(reinterpret_cast<const char*>(values.data()),
                                              values.size() * sizeof(float));
    });
  }
  for (std::thread& thread : threads) thread.join();
  return found;
}

// Files of MPI and PMIx that are left in a folder of rendezvous keys.
std::vector<std::string> Leftovers(const std::string& folder) {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("heddle-mpi")) names.push_back(name);
  }
  return names;
}

// First of all tests: the others use threads of LibTorch, which a fork does not take along.
TEST(AMpiGroup, HasTheBitsOfGlooWithinATaskAndBetweenTasks) {
  struct World {
    int ranks;
    int per_task;
  };
  const std::vector<World> worlds = {{1, 1}, {2, 2}, {3, 1}, {4, 2}};
  std::vector<std::unique_ptr<checkpoint::TempDir>> folders;
  for (const World& world : worlds) {
    folders.push_back(std::make_unique<checkpoint::TempDir>());
    const std::string folder = folders.back()->path();
    const auto ends = ForkRanks(world.ranks, [&](int rank) -> std::string {
      const auto group = ConnectMpi(ForkedOptions(folder, rank, world.ranks, world.per_task));
      if (!group.ok()) return Message(group.status());
      if ((*group)->backend() != "mpi") return (*group)->backend();
      Save(folder + "/result-" + std::to_string(rank), AllResults(rank, group->get()));
      ExpectAllExchanges(group->get());
      for (size_t p = 0; world.ranks == 4 && p < kPairs.size(); ++p) {
        Save(Str(folder, "/pair-", p, "-", rank),
             SubsetResults(group->get(), kPairs[p], kLargestOfPairs));
      }
      // OpenMPI left to itself ends a process a second after its launcher.
      if (world.per_task == 2) {
        std::this_thread::sleep_for(milliseconds(1300));
        std::vector<double> one = {1.0};
        if (!(*group)->AllReduceSum(std::span<double>(one)).ok()) return "no sum after a while";
      }
      return testing::Test::HasFailure() ? "a collective failed" : "";
    });
    EXPECT_EQ(ends, std::vector<int>(static_cast<size_t>(world.ranks), 0));
    EXPECT_EQ(Leftovers(folder), std::vector<std::string>());
  }
  for (size_t w = 0; w < worlds.size(); ++w) {
    const std::vector<std::string> expected = OverGloo(worlds[w].ranks);
    for (size_t rank = 0; rank < expected.size(); ++rank) {
      const std::string got = Bytes(folders[w]->path() + "/result-" + std::to_string(rank));
      EXPECT_TRUE(got == expected[rank]) << worlds[w].ranks << " ranks, " << worlds[w].per_task
                                         << " per task, rank " << rank << ": other bits";
    }
  }
  std::vector<std::string> alone[std::size(kSalts) + 1];
  for (const int salt : kSalts) alone[salt] = OverGloo(2, salt, kLargestOfPairs);
  for (int at = 0; at < 8; ++at) {
    const int rank = at % 4;
    const std::vector<int>& members = MembersWith(kPairs[static_cast<size_t>(at / 4)], rank);
    EXPECT_TRUE(Bytes(Str(folders.back()->path(), "/pair-", at / 4, "-", rank)) ==
                alone[SaltOf(members)][members[1] == rank])
        << "rank " << rank << " with " << members[0] << " and " << members[1] << ": other bits";
  }
}

TEST(AMpiGroup, ExchangesSlicesOfSeveralMessages) {
  const checkpoint::TempDir folder;
  const auto ends = ForkRanks(2, [&](int rank) -> std::string {
    const auto group = ConnectMpi(ForkedOptions(folder.path(), rank, 2, 2));
    if (!group.ok()) return Message(group.status());
    // A message is 64 MiB at most.
    const size_t message = size_t{64} << 20;
    ExpectExchanged(group->get(), {{3, message + 5}, {message, 0}}, 1);
    return testing::Test::HasFailure() ? "another slice" : "";
  });
  EXPECT_EQ(ends, (std::vector<int>{0, 0}));
}

TEST(AMpiGroup, NamesRanksThatDisagreeOnASize) {
  for (const Apart& apart : kApart) {
    const checkpoint::TempDir folder;
    const auto ends = ForkRanks(2, [&](int rank) -> std::string {
      const auto group = ConnectMpi(ForkedOptions(folder.path(), rank, 2, 2));
      if (!group.ok()) return Message(group.status());
      (*group)->SetTimeout(milliseconds(1000));
      const Status end = ExchangeApart(group->get(), apart.sent, apart.expected);
      if (rank == 0) return "";
      const bool named = Message(end).find(ApartText(apart)) != std::string::npos;
      if (end.code() != StatusCode::kInternal || !named) return "not named: " + Message(end);
      std::vector<double> one = {1.0};
      return (*group)->AllReduceSum(std::span<double>(one)).ok() ? "the group lives" : "";
    });
    EXPECT_EQ(ends, (std::vector<int>{0, 0})) << ApartText(apart);
  }
}

TEST(AMpiGroup, ASubsetSeesTheDeathOfARankThatIsNoMember) {
  const checkpoint::TempDir folder;
  const std::vector<int> ends = ForkRanks(4, [&](int rank) -> std::string {
    const auto group = ConnectMpi(ForkedOptions(folder.path(), rank, 4, 4));
    return group.ok() ? DieOrSurvive(group->get(), kPairs[0]) : Message(group.status());
  });
  ASSERT_EQ(ends.size(), 4u);
  EXPECT_EQ(std::vector<int>(ends.begin(), ends.end() - 1), std::vector<int>(3, 0));
  EXPECT_TRUE(WIFSIGNALED(ends[3]) && WTERMSIG(ends[3]) == SIGKILL);
}

TEST(AMpiGroup, ARankThatNeverComesEndsTheStartAtTheDeadline) {
  const checkpoint::TempDir folder;
  for (const int missing : {0, 1}) {  // 0 has the server of the task
    const auto ends = ForkRanks(2, [&](int rank) -> std::string {
      if (rank == missing) return "";
      GroupOptions options =
          ForkedOptions(folder.path() + "/" + std::to_string(missing), rank, 2, 2);
      std::filesystem::create_directories(options.scratch);
      options.init_timeout = milliseconds(1500);
      const auto begin = std::chrono::steady_clock::now();
      const auto group = ConnectMpi(options);
      if (group.status().code() != StatusCode::kUnavailable) return Message(group.status());
      const auto took = std::chrono::steady_clock::now() - begin;
      return took < std::chrono::seconds(15) ? "" : "it took too long";
    });
    EXPECT_EQ(ends, (std::vector<int>{0, 0}));
  }
}

TEST(AMpiGroup, APeerThatStandsStillOrIsKilledIsAnErrorAtTheDeadline) {
  for (const int per_task : {2, 1}) {
    for (const int signal : {SIGSTOP, SIGKILL}) {
      const checkpoint::TempDir folder;
      const std::string mark = folder.path() + "/over";
      std::vector<int> ends = ForkRanks(2, [&](int rank) -> std::string {
        const auto group = ConnectMpi(ForkedOptions(folder.path(), rank, 2, per_task));
        if (!group.ok()) return Message(group.status());
        std::ofstream(folder.path() + "/pid-" + std::to_string(rank)) << getpid();
        (*group)->SetTimeout(milliseconds(1000));
        std::vector<float> values(100'000, 1.0f);
        if (!(*group)->AllReduceSum(std::span<float>(values), kNoUnit).ok()) return "no first sum";
        if (rank == 1) {
          raise(signal);
          return "";
        }
        const auto begin = std::chrono::steady_clock::now();
        const Status failed = (*group)->AllReduceSum(std::span<float>(values), kNoUnit);
        const auto took = std::chrono::steady_clock::now() - begin;
        std::string pid;
        while (pid.empty()) std::ifstream(folder.path() + "/pid-1") >> pid;
        kill(static_cast<pid_t>(std::stol(pid)), SIGKILL);  // out of its stop
        if (failed.code() != StatusCode::kUnavailable) return "no error: " + Message(failed);
        if (took > std::chrono::seconds(5)) return "it took too long";
        (*group)->Abort();
        return (*group)->AllReduceSum(std::span<float>(values), kNoUnit).ok() ? "the group lives"
                                                                              : "";
      });
      ASSERT_EQ(ends.size(), 2u);
      EXPECT_EQ(ends[0], 0) << per_task << " per task, signal " << signal;
    }
  }
}

TEST(AMpiGroup, AServerThatCannotStartIsAnErrorThatSaysSo) {
  const checkpoint::TempDir folder;
  const auto ends = ForkRanks(1, [&](int) -> std::string {
    GroupOptions options = ForkedOptions(folder.path(), 0, 1, 1);
    options.scratch = folder.path() + "/nowhere";
    const auto group = ConnectMpi(options);
    if (group.ok()) return "it started";
    return Message(group.status()).find("nowhere") != std::string::npos ? ""
                                                                        : Message(group.status());
  });
  EXPECT_EQ(ends, std::vector<int>{0});
}

}  // namespace
}  // namespace heddle::comm
