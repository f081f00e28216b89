// Uneven all-to-alls over sockets and in shared memory: sizes of all kinds, ranks that disagree on
// them, that stay away, hang or are told to stop; what the recorder notes.
#include <gtest/gtest.h>

#include <chrono>
#include <thread>
#include <vector>

#include "base/rank_words/rank_words.h"
#include "tests/support/status_matchers.h"
#include "tests/support/worker/temp_dir.h"
#include "tests/worker/comm/exchange_checks.h"
#include "tests/worker/comm/thread_ranks.h"
#include "worker/comm/communicator.h"
#include "worker/comm/recorder.h"
#include "worker/control/rank_page.h"

namespace heddle::comm {
namespace {

using std::chrono::milliseconds;

Status ExchangeBytes(Communicator* group, size_t bytes) {
  Exchanged mine(static_cast<size_t>(group->rank()), EqualSizes(group->world_size(), bytes), 0);
  ASSIGN_OR_RETURN(const std::unique_ptr<Pending> pending, mine.Start(group));
  return pending->Wait();
}

// True: ranks share memory.
class AllToAll : public testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Over, AllToAll, testing::Bool(),
                         [](const auto& memory) { return memory.param ? "SharedMemory" : "Gloo"; });

TEST_P(AllToAll, BringsEverySliceToItsRank) {
  for (const int world : {2, 3, 4}) {
    OnRanks(
        world,
        [](int, Communicator* group) {
          group->SetTimeout(milliseconds(20'000));
          ExpectAllExchanges(group);
        },
        GetParam());
  }
}

TEST_P(AllToAll, NamesRanksThatDisagreeOnASizeAndTakesNoForeignBytes) {
  for (const Apart& apart : kApart) {
    std::vector<Status> ends(3);
    OnRanks(
        3,
        [&](int rank, Communicator* group) {
          ends[static_cast<size_t>(rank)] = ExchangeApart(group, apart.sent, apart.expected);
          if (rank == 1) {
            EXPECT_FALSE(ExchangeBytes(group, 8).ok()) << "the group is dead";
          }
        },
        GetParam());
    EXPECT_STATUS(ends[1], StatusCode::kInternal, ApartText(apart));
  }
}

TEST_P(AllToAll, RefusesSizesThatDoNotAddUp) {
  OnRanks(
      2,
      [](int, Communicator* group) {
        const std::vector<std::byte> sent(10);
        std::vector<std::byte> received(10);
        const auto end = [&](std::vector<size_t> to, std::vector<size_t> from) {
          return group->StartAllToAll(sent, to, received, from, 0).status();
        };
        EXPECT_STATUS(end({5, 4}, {5, 5}), StatusCode::kInvalidArgument, "together 9 of 10");
        EXPECT_STATUS(end({5, 5}, {5, 6}), StatusCode::kInvalidArgument, "together 11 of 10");
        EXPECT_STATUS(end({10}, {5, 5}), StatusCode::kInvalidArgument, "1 sizes");
        EXPECT_STATUS(end({5, 5}, {}), StatusCode::kInvalidArgument, "0 sizes");
      },
      GetParam());
}

TEST_P(AllToAll, ARankThatLeavesIsAnErrorInTime) {
  for (const size_t bytes : {size_t{0}, size_t{1000}}) {
    OnRanks(
        3,
        [&](int rank, Communicator* group) {
          ASSERT_OK(ExchangeBytes(group, 8));
          group->SetTimeout(milliseconds(500));
          if (rank == 1) return;
          const auto begin = std::chrono::steady_clock::now();
          EXPECT_EQ(ExchangeBytes(group, bytes).code(), StatusCode::kUnavailable);
          EXPECT_LT(std::chrono::steady_clock::now() - begin, milliseconds(2500));
          EXPECT_EQ(ExchangeBytes(group, bytes).code(), StatusCode::kUnavailable);
        },
        GetParam());
  }
}

TEST_P(AllToAll, ARankThatHangsIsAnErrorAtTheDeadline) {
  OnRanks(
      2,
      [](int rank, Communicator* group) {
        group->SetTimeout(milliseconds(300));
        if (rank == 1) {
          std::this_thread::sleep_for(milliseconds(1500));
          return;
        }
        EXPECT_EQ(ExchangeBytes(group, 1000).code(), StatusCode::kUnavailable);
      },
      GetParam());
}

TEST(AllToAllInMemory, AbortEndsAWait) {
  OnRanksOfOneHost(2, [](int rank, Communicator* group) {
    if (rank == 1) {
      std::this_thread::sleep_for(milliseconds(100));
      return;
    }
    group->SetTimeout(milliseconds(30'000));
    std::thread aborter([group] {
      std::this_thread::sleep_for(milliseconds(50));
      group->Abort();
    });
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_FALSE(ExchangeBytes(group, 10).ok());
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
    aborter.join();
  });
}

TEST(AllToAllSolo, IsACopyInAWorldOfOne) {
  const std::unique_ptr<Communicator> solo = MakeSolo();
  ExpectAllExchanges(solo.get());
  Exchanged mine(0, EqualSizes(1, 5), 0);
  mine.received_bytes = {4};
  EXPECT_STATUS(mine.Start(solo.get()).status(), StatusCode::kInvalidArgument, "4 of 5");
  mine.received.resize(4);
  EXPECT_STATUS(mine.Start(solo.get()).status(), StatusCode::kInternal,
                "rank 0 sends 5 bytes to rank 0, which expects 4");
  solo->Abort();
  EXPECT_EQ(ExchangeBytes(solo.get(), 1).code(), StatusCode::kUnavailable);
}

// Sizes are each rank's own: they make no difference between ranks, units do.
TEST(AllToAllRecorded, ByItsUnitAndAlikeOnAllRanks) {
  const test::TempDir dir;
  for (const bool apart : {false, true}) {
    FakeRendezvous server;
    uint64_t launched[2] = {};
    std::vector<std::thread> ranks;
    for (int rank = 0; rank < 2; ++rank) {
      ranks.emplace_back([&, rank] {
        const auto page = control::RankPage::Create(Str(dir.path(), "/", apart, "-", rank));
        auto group = ConnectGloo(OptionsOf(&server, rank, 2));
        ASSERT_OK(group.status());
        const auto recorded = MakeRecorded(*std::move(group), 0, page.get());
        Exchanged mine(static_cast<size_t>(rank), {{1, 2}, {300, 40}}, 0);
        const int unit = apart ? 3 + rank : 3;
        auto pending = mine.Start(recorded.get(), unit);
        ASSERT_OK(pending.status());
        const control::CollectiveEntry entry = page->NewestCollective();
        EXPECT_EQ(entry.ended_ns, 0);
        ASSERT_OK((*pending)->Wait());
        EXPECT_TRUE(mine.received == mine.expected);
        EXPECT_GT(page->NewestCollective().ended_ns, 0);
        EXPECT_EQ(entry.count, rank == 0 ? 3u : 340u);
        EXPECT_EQ(entry.dtype, 1);
        EXPECT_EQ(CollectiveText(entry.seq, entry.op, entry.unit, 8),
                  Str("#1 all-to-all block.", unit - 1));
        launched[rank] = recorded->Launched();
      });
    }
    for (std::thread& rank : ranks) rank.join();
    EXPECT_NE(launched[0], 0u);
    EXPECT_EQ(launched[0] == launched[1], !apart);
  }
}

}  // namespace
}  // namespace heddle::comm
