#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "heddle/v1/control.pb.h"
#include "tests/checkpoint/temp_dir.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/comm/fake_rendezvous.h"
#include "tests/worker/comm/group_checks.h"
#include "tests/worker/comm/thread_ranks.h"
#include "worker/comm/communicator.h"
#include "worker/comm/control_store.h"
#include "worker/comm/ordered_sum.h"
#include "worker/comm/recorder.h"
#include "worker/control/rank_page.h"

namespace heddle::comm {
namespace {

using std::chrono::milliseconds;

TEST(OrderedSum, AddsInAscendingOrderOfRank) {
  // (1e8 + 1) + -1e8 in fp32 is 0; any other order gives 1.
  const std::vector<float> rows = {1e8f, 1.0f, -1e8f};
  float out = -1;
  OrderedSum(rows.data(), 3, 1, &out);
  EXPECT_EQ(out, 0.0f);
}

TEST(Communicator, SoloChangesNothing) {
  const std::unique_ptr<Communicator> solo = MakeSolo();
  std::vector<float> values = {1, 2, 3};
  ASSERT_OK(solo->AllReduceSum(std::span<float>(values), kNoUnit));
  EXPECT_EQ(values, (std::vector<float>{1, 2, 3}));
  solo->Abort();
  EXPECT_FALSE(solo->AllReduceSum(std::span<float>(values), kNoUnit).ok());
}

TEST(Communicator, SumsHaveTheBitsOfAnAscendingSumAtEveryWorldSize) {
  for (const int world : {2, 3, 4}) {
    // Sizes around the slices' borders: empty, fewer than ranks, a tail, several buckets.
    for (const size_t count : {size_t{0}, size_t{1}, size_t{1003}, (size_t{4} << 20) + 5}) {
      SCOPED_TRACE(testing::Message() << "world " << world << " count " << count);
      std::vector<float> rows;
      for (int rank = 0; rank < world; ++rank) {
        const std::vector<float> row = RandomValues(static_cast<uint64_t>(rank) + 1, count);
        rows.insert(rows.end(), row.begin(), row.end());
      }
      std::vector<float> expected(count);
      OrderedSum(rows.data(), static_cast<size_t>(world), count, expected.data());
      OnRanks(world, [&](int rank, Communicator* group) {
        std::vector<float> values = RandomValues(static_cast<uint64_t>(rank) + 1, count);
        ASSERT_OK(group->AllReduceSum(std::span<float>(values), kNoUnit));
        EXPECT_EQ(std::memcmp(values.data(), expected.data(), count * sizeof(float)), 0);
      });
    }
  }
}

TEST(Communicator, SumsDoublesInOneRound) {
  OnRanks(3, [](int rank, Communicator* group) {
    std::vector<double> values = {1.0, static_cast<double>(rank), 1e300 * (rank == 1 ? 1 : 0)};
    ASSERT_OK(group->AllReduceSum(std::span<double>(values)));
    EXPECT_EQ(values, (std::vector<double>{3.0, 3.0, 1e300}));
  });
}

TEST(Communicator, APeerThatLeavesIsAnErrorAtOnce) {
  OnRanks(2, [](int rank, Communicator* group) {
    if (rank == 1) {
      return;  // its group is destroyed, its sockets close
    }
    const auto begin = std::chrono::steady_clock::now();
    std::vector<float> values(1000, 1.0f);
    EXPECT_EQ(group->AllReduceSum(std::span<float>(values), kNoUnit).code(),
              StatusCode::kUnavailable);
    EXPECT_LT(std::chrono::steady_clock::now() - begin, milliseconds(2500));
    EXPECT_EQ(group->AllReduceSum(std::span<float>(values), kNoUnit).code(),
              StatusCode::kUnavailable);
  });
}

TEST(Communicator, APeerThatHangsIsAnErrorAtTheDeadline) {
  OnRanks(2, [](int rank, Communicator* group) {
    group->SetTimeout(milliseconds(300));
    if (rank == 1) {
      std::this_thread::sleep_for(milliseconds(1500));
      return;
    }
    std::vector<float> values(1000, 1.0f);
    EXPECT_EQ(group->AllReduceSum(std::span<float>(values), kNoUnit).code(),
              StatusCode::kUnavailable);
  });
}

TEST(Communicator, ARankThatNeverComesEndsTheStartAtTheDeadline) {
  FakeRendezvous server;
  GroupOptions options = OptionsOf(&server, 0, 2);
  options.init_timeout = milliseconds(500);
  EXPECT_EQ(ConnectGloo(options).status().code(), StatusCode::kUnavailable);
}

TEST(Communicator, RefusesHostNamesAndRanksOutsideTheWorld) {
  FakeRendezvous server;
  GroupOptions options = OptionsOf(&server, 0, 2);
  options.data_address = "localhost";
  EXPECT_EQ(ConnectGloo(options).status().code(), StatusCode::kInvalidArgument);
  options = OptionsOf(&server, 2, 2);
  EXPECT_EQ(ConnectGloo(options).status().code(), StatusCode::kInvalidArgument);
}

TEST(Communicator, NcclWithoutPlugInOrDeviceIsAnErrorThatSaysSo) {
  if (NcclUsable()) {
    GTEST_SKIP() << "this machine has a device";
  }
  FakeRendezvous server;
  const StatusCode code = ConnectNccl(OptionsOf(&server, 0, 1)).status().code();
  EXPECT_TRUE(code == StatusCode::kUnimplemented || code == StatusCode::kFailedPrecondition);
}

TEST(Recorder, NotesEveryCollectiveAndLeavesAFailedOneOpen) {
  const checkpoint::TempDir folder;
  const std::unique_ptr<control::RankPage> page =
      control::RankPage::Create(folder.path() + "/page");
  ASSERT_NE(page, nullptr);
  const std::unique_ptr<Communicator> group = MakeRecorded(MakeSolo(), 3, page.get());
  std::vector<float> values(10);
  std::vector<double> few(2);
  ASSERT_OK(group->AllReduceSum(std::span<float>(values), kNoUnit));
  ASSERT_OK(group->AllReduceSum(std::span<double>(few)));
  group->Abort();
  EXPECT_FALSE(group->AllReduceSum(std::span<float>(values), kNoUnit).ok());
  EXPECT_EQ(page->ring_head().load(), 3u);
  const control::CollectiveEntry* ring = page->ring();
  EXPECT_EQ(ring[1].count, 10u);
  EXPECT_EQ(ring[1].group, 3u);
  EXPECT_GE(ring[1].ended_ns, ring[1].launched_ns);
  EXPECT_NE(ring[1].fingerprint, ring[2].fingerprint);
  EXPECT_EQ(ring[1].fingerprint, ring[3].fingerprint);
  EXPECT_EQ(ring[3].ended_ns, 0);
}

TEST(Communicator, OtherPrefixesDoNotMeet) {
  FakeRendezvous server;
  GroupOptions options[2] = {OptionsOf(&server, 0, 2), OptionsOf(&server, 1, 2)};
  options[1].key_prefix = "f8/";  // a rank of another attempt
  std::thread other([&] {
    options[1].init_timeout = milliseconds(700);
    EXPECT_FALSE(ConnectGloo(options[1]).ok());
  });
  options[0].init_timeout = milliseconds(700);
  EXPECT_FALSE(ConnectGloo(options[0]).ok());
  other.join();
}

TEST(ControlStore, DoesWhatC10dAsksOfAStore) {
  FakeRendezvous server;
  ControlStore store(CallOf(&server, 0), "p/", milliseconds(2000));
  store.set("a", std::vector<uint8_t>{1, 0, 255});
  EXPECT_EQ(store.get("a"), (std::vector<uint8_t>{1, 0, 255}));
  EXPECT_EQ(store.add("n", 3), 3);
  EXPECT_EQ(store.add("n", -1), 2);
  EXPECT_TRUE(store.check({"a", "n"}));
  EXPECT_FALSE(store.check({"a", "b"}));
  EXPECT_EQ(store.compareSet("a", std::vector<uint8_t>{9}, std::vector<uint8_t>{2}),
            (std::vector<uint8_t>{1, 0, 255}));
  EXPECT_EQ(store.compareSet("a", std::vector<uint8_t>{1, 0, 255}, std::vector<uint8_t>{2}),
            std::vector<uint8_t>{2});
  store.append("a", {3});
  EXPECT_EQ(store.multiGet({"a", "n"}), (std::vector<std::vector<uint8_t>>{{2, 3}, {'2'}}));
  EXPECT_EQ(store.getNumKeys(), 2);
  EXPECT_TRUE(store.deleteKey("n"));
  EXPECT_FALSE(store.deleteKey("n"));
  EXPECT_TRUE(store.hasExtendedApi());
  EXPECT_ANY_THROW(store.wait({"never"}, milliseconds(50)));
  const auto clone = store.clone();
  EXPECT_EQ(clone->get("a"), (std::vector<uint8_t>{2, 3}));
}

TEST(Communicator, GlooAndSharedMemoryGiveTheSameBits) {
  for (const int world : {2, 3}) {
    std::vector<std::vector<float>> over_sockets(static_cast<size_t>(world));
    std::vector<std::vector<float>> in_memory(static_cast<size_t>(world));
    OnRanks(world, [&](int rank, Communicator* group) {
      group->SetTimeout(milliseconds(20000));
      over_sockets[static_cast<size_t>(rank)] = AllResults(rank, group);
    });
    OnRanksOfOneHost(world, [&](int rank, Communicator* group) {
      group->SetTimeout(milliseconds(20000));
      in_memory[static_cast<size_t>(rank)] = AllResults(rank, group);
    });
    for (size_t r = 0; r < over_sockets.size(); ++r) {
      ASSERT_EQ(over_sockets[r].size(), in_memory[r].size());
      EXPECT_EQ(std::memcmp(over_sockets[r].data(), in_memory[r].data(),
                            in_memory[r].size() * sizeof(float)),
                0)
          << world << " ranks, rank " << r;
    }
  }
}

TEST(Communicator, ScattersAndGathersWhatOneProcessWould) {
  OnRanksOfOneHost(3, [](int rank, Communicator* group) {
    std::vector<float> parts(6);
    for (size_t i = 0; i < parts.size(); ++i) {
      parts[i] = static_cast<float>(10 * rank) + static_cast<float>(i);
    }
    std::vector<float> sum(2);
    auto scatter = group->StartReduceScatterSum(parts, sum, Wire::kFp32, 0);
    ASSERT_OK(scatter.status());
    ASSERT_OK((*scatter)->Wait());
    EXPECT_EQ(sum, (std::vector<float>{30.0f + 6.0f * static_cast<float>(rank),
                                       33.0f + 6.0f * static_cast<float>(rank)}));
    // In place: this rank's part lies where it belongs.
    std::vector<float> all(6, -1.0f);
    all[static_cast<size_t>(2 * rank)] = static_cast<float>(rank);
    all[static_cast<size_t>(2 * rank + 1)] = static_cast<float>(rank) + 0.5f;
    const std::span<const float> mine(all.data() + 2 * rank, 2);
    auto gather = group->StartAllGather(std::as_bytes(mine),
                                        std::as_writable_bytes(std::span<float>(all)), 0);
    ASSERT_OK(gather.status());
    ASSERT_OK((*gather)->Wait());
    EXPECT_EQ(all, (std::vector<float>{0, 0.5f, 1, 1.5f, 2, 2.5f}));
  });
}

TEST(Communicator, ARankThatStaysAwayEndsTheWaitOverSharedMemory) {
  OnRanksOfOneHost(2, [](int rank, Communicator* group) {
    if (rank == 1) return;  // its end of the memory goes away
    group->SetTimeout(milliseconds(200));
    std::vector<float> values(5, 1.0f);
    EXPECT_EQ(group->AllReduceSum(std::span<float>(values), kNoUnit).code(),
              StatusCode::kUnavailable);
    EXPECT_EQ(group->AllReduceSum(std::span<float>(values), kNoUnit).code(),
              StatusCode::kUnavailable)
        << "the group is dead";
  });
}

TEST(Communicator, AbortEndsAWaitOverSharedMemory) {
  OnRanksOfOneHost(2, [](int rank, Communicator* group) {
    if (rank == 1) {
      std::this_thread::sleep_for(milliseconds(100));
      return;
    }
    group->SetTimeout(milliseconds(30000));
    std::thread aborter([group] {
      std::this_thread::sleep_for(milliseconds(50));
      group->Abort();
    });
    std::vector<float> values(5, 1.0f);
    const auto begin = std::chrono::steady_clock::now();
    EXPECT_FALSE(group->AllReduceSum(std::span<float>(values), kNoUnit).ok());
    EXPECT_LT(std::chrono::steady_clock::now() - begin, std::chrono::seconds(5));
    aborter.join();
  });
}

}  // namespace
}  // namespace heddle::comm
