// Subsets of a group over sockets and in shared memory: the bits of a group of the members alone,
// one record and one order for all, and the death of a rank that is no member.
#include <gtest/gtest.h>
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <thread>
#include <vector>

#include "base/rank_words/rank_words.h"
#include "tests/support/status_matchers.h"
#include "tests/support/worker/temp_dir.h"
#include "tests/worker/comm/forked_ranks.h"
#include "tests/worker/comm/subset_checks.h"
#include "tests/worker/comm/thread_ranks.h"
#include "worker/comm/recorder.h"
#include "worker/comm/shared_memory.h"
#include "worker/control/rank_page.h"

namespace heddle::comm {
namespace {

using std::chrono::milliseconds;

// First of all tests: the others use threads of LibTorch, which a fork does not take along.
TEST(ASubset, SeesTheDeathOfARankThatIsNoMember) {
  for (const bool in_memory : {false, true}) {
    for (const Pairs& pairs : kPairs) {
      const test::TempDir folder;
      const std::vector<int> ends = ForkRanks(4, [&](int rank) -> std::string {
        auto group = ConnectGloo(ForkedOptions(folder.path(), rank, 4, 4));
        std::string why_not;
        if (group.ok() && in_memory) group = OverSharedMemory(*std::move(group), &why_not);
        if (!group.ok()) return Message(group.status());
        return why_not.empty() ? DieOrSurvive(group->get(), pairs) : why_not;
      });
      ASSERT_EQ(ends.size(), 4u);
      EXPECT_EQ(std::vector<int>(ends.begin(), ends.end() - 1), std::vector<int>(3, 0));
      EXPECT_TRUE(WIFSIGNALED(ends[3]) && WTERMSIG(ends[3]) == SIGKILL);
    }
  }
}

TEST(ASubset, HasTheBitsOfAGroupOfItsMembersAlone) {
  std::vector<float> alone[std::size(kSalts) + 1][2];  // by salt and place
  OnRanks(2, [&](int rank, Communicator* group) {
    group->SetTimeout(milliseconds(20'000));
    for (const int salt : kSalts) alone[salt][rank] = AllResults(rank, group, salt);
  });
  for (const bool in_memory : {false, true}) {
    OnRanks(
        4,
        [&](int rank, Communicator* whole) {
          whole->SetTimeout(milliseconds(30'000));
          for (const Pairs& pairs : kPairs) {
            const std::vector<int>& members = MembersWith(pairs, rank);
            const std::vector<float>& expected = alone[SaltOf(members)][members[1] == rank];
            const std::vector<float> found = SubsetResults(whole, pairs);
            ASSERT_EQ(found.size(), expected.size());
            EXPECT_EQ(std::memcmp(found.data(), expected.data(), found.size() * sizeof(float)), 0)
                << "rank " << rank << " with " << members[0] << " and " << members[1];
          }
        },
        in_memory);
  }
}

// Of one rank each, and of all: nothing is special about them.
TEST(ASubset, MayBeOneRankOrAll) {
  OnRanks(3, [](int rank, Communicator* whole) {
    whole->SetTimeout(milliseconds(20'000));
    const auto one = MakeSubset(whole, {rank});
    EXPECT_TRUE(AllResults(0, one.get()) == AllResults(0, MakeSolo().get()));
    ExpectAllExchanges(one.get(), rank);
    const auto all = MakeSubset(whole, {0, 1, 2});
    EXPECT_TRUE(AllResults(rank, all.get()) == AllResults(rank, whole));
    ExpectAllExchanges(all.get());
  });
}

TEST(ASubset, NamesRanksOfTheWholeThatDisagreeOnASize) {
  for (const bool in_memory : {false, true}) {
    std::vector<Status> ends(4);
    OnRanks(
        4,
        [&](int rank, Communicator* whole) {
          const auto subset = MakeSubset(whole, MembersWith(kPairs[1], rank));
          const bool disagree = rank % 2 == 1;
          ends[static_cast<size_t>(rank)] = ExchangeApart(subset.get(), 100, disagree ? 60 : 100);
        },
        in_memory);
    EXPECT_STATUS(ends[3], StatusCode::kInternal,
                  "rank 1 sends 100 bytes to rank 3, which expects 60");
  }
}

TEST(ASubset, IsRecordedInTheOneOrderOfTheWhole) {
  const test::TempDir dir;
  FakeRendezvous server;
  std::vector<uint64_t> launched(4);
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < 4; ++rank) {
    ranks.emplace_back([&, rank] {
      const auto page = control::RankPage::Create(Str(dir.path(), "/", rank));
      auto group = ConnectGloo(OptionsOf(&server, rank, 4));
      ASSERT_OK(group.status());
      const auto whole = MakeRecorded(*std::move(group), 0, page.get());
      const auto subset = MakeSubset(whole.get(), MembersWith(kPairs[0], rank));
      const std::vector<float> mine(4, static_cast<float>(rank));
      std::vector<float> sum(2);
      auto scatter = subset->StartReduceScatterSum(mine, sum, Wire::kFp32, 6);
      ASSERT_OK(scatter.status());
      ASSERT_OK((*scatter)->Wait());
      EXPECT_EQ(sum, std::vector<float>(2, rank < 2 ? 1.0f : 5.0f));
      const control::CollectiveEntry entry = page->NewestCollective();
      EXPECT_EQ(CollectiveText(entry.seq, entry.op, entry.unit, 8), "#1 all-to-all block.5");
      EXPECT_EQ(entry.count, 16u);
      launched[static_cast<size_t>(rank)] = whole->Launched();
    });
  }
  for (std::thread& rank : ranks) rank.join();
  EXPECT_EQ(launched, std::vector<uint64_t>(4, launched[0]));
}

}  // namespace
}  // namespace heddle::comm
