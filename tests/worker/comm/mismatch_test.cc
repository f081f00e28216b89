// Collectives that ranks launch differently (training-runtime.md 20.5), planted on real groups:
// named at once, by the pages while the ranks wait, and by the shared memory before a rank takes
// foreign bytes for its own.
#include <gtest/gtest.h>

#include <chrono>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "coordinator/state/diagnosis.h"
#include "tests/support/status_matchers.h"
#include "tests/support/worker/temp_dir.h"
#include "tests/worker/comm/fake_rendezvous.h"
#include "worker/comm/communicator.h"
#include "worker/comm/recorder.h"
#include "worker/comm/shared_memory.h"
#include "worker/control/rank_page.h"
#include "worker/trainer/agreement.h"
#include "worker/trainer/rank_control.h"

namespace heddle::comm {
namespace {

using std::chrono::milliseconds;

StatusOr<std::unique_ptr<Communicator>> GroupOf(FakeRendezvous* server, int rank, int world) {
  GroupOptions options;
  options.rank = rank;
  options.world_size = world;
  options.data_address = "127.0.0.1";
  options.key_prefix = "f7/";
  options.rendezvous =
      [server, rank](const v1::RendezvousRequest& request) -> StatusOr<v1::RendezvousReply> {
    return server->Answer(static_cast<uint32_t>(rank), request);
  };
  options.init_timeout = milliseconds(20'000);
  options.step_timeout = milliseconds(4'000);
  return ConnectGloo(options);
}

// Rank 0 gathers what rank 1 wants to sum up.
Status LaunchApart(int rank, Communicator* group) {
  std::vector<float> all(8192, 1.0F);
  std::vector<float> part(4096);
  StatusOr<std::unique_ptr<Pending>> pending =
      rank == 0 ? group->StartAllGather(std::as_bytes(std::span<const float>(part)),
                                        std::as_writable_bytes(std::span<float>(all)), 3)
                : group->StartReduceScatterSum(all, part, Wire::kFp32, 3);
  RETURN_IF_ERROR(pending);
  return (*pending)->Wait();
}

state::Situation Look(const std::vector<std::unique_ptr<control::RankPage>>& pages,
                      state::Observation* seen) {
  for (uint32_t rank = 0; rank < pages.size(); ++rank) {
    const control::CollectiveEntry newest = pages[rank]->NewestCollective();
    v1::RankHead head;
    head.set_rank(rank);
    head.set_seq(newest.seq);
    head.set_op(newest.op);
    head.set_unit(newest.unit);
    head.set_count(newest.count);
    head.set_group(newest.group);
    head.set_fingerprint(newest.fingerprint);
    head.set_waiting(pages[rank]->ReadActivity().waiting);
    head.set_process_state("S");
    seen->Add(head, static_cast<uint32_t>(pages.size()), 0);
  }
  state::Situation situation;
  situation.ranks = seen;
  situation.world = static_cast<uint32_t>(pages.size());
  situation.layers = 4;
  return situation;
}

TEST(Mismatch, IsNamedFromThePagesWhileTheRanksStillWait) {
  const test::TempDir dir;
  std::vector<std::unique_ptr<control::RankPage>> pages;
  for (const char* name : {"/page-0", "/page-1"}) {
    pages.push_back(control::RankPage::Create(dir.path() + name));
  }
  FakeRendezvous server;
  std::atomic<int> ended = 0;
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < 2; ++rank) {
    ranks.emplace_back([&, rank] {
      StatusOr<std::unique_ptr<Communicator>> group = GroupOf(&server, rank, 2);
      ASSERT_OK(group.status());
      const std::unique_ptr<Communicator> recorded =
          MakeRecorded(*std::move(group), 0, pages[static_cast<size_t>(rank)].get());
      std::vector<double> numbers(4);
      ASSERT_OK(recorded->AllReduceSum(std::span<double>(numbers)));
      EXPECT_FALSE(LaunchApart(rank, recorded.get()).ok());
      ++ended;
      // Whoever gives up first must not end the other one's wait for it.
      while (ended < 2) std::this_thread::yield();
    });
  }
  std::optional<v1::FindingRecord> finding;
  while (!finding.has_value() && ended < 2) {
    state::Observation seen;
    finding = state::FindMismatch(Look(pages, &seen));
    std::this_thread::sleep_for(milliseconds(10));
  }
  EXPECT_LT(ended, 2) << "named before the ranks gave up";
  for (std::thread& rank : ranks) rank.join();
  ASSERT_TRUE(finding.has_value());
  EXPECT_NE(finding->text().find("rank 0 launched #2 all-gather block.2 of 32768 elements"),
            std::string::npos)
      << finding->text();
  EXPECT_NE(finding->text().find("rank 1 launched #2 reduce-scatter block.2 of 8192 elements"),
            std::string::npos)
      << finding->text();
}

// Blocks are of one size: messages alone do not tell which one they are of.
TEST(Mismatch, OfUnitsOfOneSizeIsFoundByTheNextAgreement) {
  const test::TempDir dir;
  for (const bool apart : {false, true}) {
    FakeRendezvous server;
    std::vector<std::thread> ranks;
    for (int rank = 0; rank < 2; ++rank) {
      ranks.emplace_back([&, rank] {
        const auto page = control::RankPage::Create(Str(dir.path(), "/", apart, "-", rank));
        StatusOr<std::unique_ptr<Communicator>> group = GroupOf(&server, rank, 2);
        ASSERT_OK(group.status());
        const auto recorded = MakeRecorded(*std::move(group), 0, page.get());
        std::vector<float> part(512);
        std::vector<float> all(1024);
        auto gather = recorded->StartAllGather(std::as_bytes(std::span<const float>(part)),
                                               std::as_writable_bytes(std::span<float>(all)),
                                               apart && rank == 1 ? 7 : 3);
        ASSERT_OK(gather.status());
        ASSERT_OK((*gather)->Wait()) << "the back end cannot know";
        trainer::Agreement agreement;
        const Status reached = agreement.Reach(recorded.get());
        EXPECT_EQ(reached.code(), apart ? StatusCode::kInternal : StatusCode::kOk) << reached;
      });
    }
    for (std::thread& rank : ranks) rank.join();
  }
}

// Runs `body` on two ranks that share memory; one at least is told why with `words`.
void ExpectRefusedInMemory(const std::function<Status(int, Communicator*)>& body,
                           const std::string& words) {
  FakeRendezvous server;
  std::vector<Status> ends(2);
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < 2; ++rank) {
    ranks.emplace_back([&, rank] {
      StatusOr<std::unique_ptr<Communicator>> group = GroupOf(&server, rank, 2);
      ASSERT_OK(group.status());
      std::string why_not;
      group = OverSharedMemory(*std::move(group), &why_not);
      ASSERT_OK(group.status());
      ASSERT_EQ(why_not, "");
      ends[static_cast<size_t>(rank)] = body(rank, group->get());
    });
  }
  for (std::thread& rank : ranks) rank.join();
  int named = 0;
  for (const Status& end : ends) {
    EXPECT_FALSE(end.ok()) << "a rank summed up what was none of its kind";
    named += Message(end).find(words) != std::string::npos ? 1 : 0;
  }
  EXPECT_GE(named, 1) << ends[0] << " / " << ends[1];
}

TEST(Mismatch, SharedMemoryTellsUnitsApart) {
  ExpectRefusedInMemory(
      [](int rank, Communicator* group) -> Status {
        std::vector<float> part(512);
        std::vector<float> all(1024);
        ASSIGN_OR_RETURN(
            const auto gather,
            group->StartAllGather(std::as_bytes(std::span<const float>(part)),
                                  std::as_writable_bytes(std::span<float>(all)), 3 + rank));
        return gather->Wait();
      },
      "of unit 3");
}

TEST(Mismatch, SharedMemoryTellsAnAllToAllFromAGather) {
  ExpectRefusedInMemory(
      [](int rank, Communicator* group) -> Status {
        const std::vector<std::byte> sent(16);
        std::vector<std::byte> received(16);
        const std::vector<size_t> sizes = {8, 8};
        ASSIGN_OR_RETURN(const auto pending,
                         rank == 0 ? group->StartAllToAll(sent, sizes, received, sizes, 3)
                                   : group->StartAllGather(
                                         std::span<const std::byte>(sent).first(8), received, 3));
        return pending->Wait();
      },
      "all-to-all of unit 3");
}

// What a rank waits for others is told apart from its own time (17.4).
TEST(Recorder, CountsTheWaitOfWhoCameFirst) {
  const test::TempDir dir;
  std::vector<std::unique_ptr<control::RankPage>> pages;
  for (const char* name : {"/page-0", "/page-1"}) {
    pages.push_back(control::RankPage::Create(dir.path() + name));
  }
  for (const auto& page : pages) {  // waits count in phases that compute
    page->PublishProgress({.step = 1,
                           .phase = static_cast<uint32_t>(trainer::Phase::kReduce),
                           .at_ns = control::BootTimeNs()});
  }
  FakeRendezvous server;
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < 2; ++rank) {
    ranks.emplace_back([&, rank] {
      StatusOr<std::unique_ptr<Communicator>> group = GroupOf(&server, rank, 2);
      ASSERT_OK(group.status());
      const std::unique_ptr<Communicator> recorded =
          MakeRecorded(*std::move(group), 0, pages[static_cast<size_t>(rank)].get());
      std::vector<double> numbers(4);
      ASSERT_OK(recorded->AllReduceSum(std::span<double>(numbers)));
      for (int i = 0; i < 5; ++i) {
        if (rank == 1) std::this_thread::sleep_for(milliseconds(100));
        ASSERT_OK(recorded->AllReduceSum(std::span<double>(numbers)));
      }
    });
  }
  for (std::thread& rank : ranks) rank.join();
  EXPECT_GE(pages[0]->ReadActivity().waited_ns, 350'000'000u);
  EXPECT_LT(pages[1]->ReadActivity().waited_ns, pages[0]->ReadActivity().waited_ns / 2);
  EXPECT_FALSE(pages[0]->ReadActivity().waiting);
}

TEST(Mismatch, SharedMemoryNamesBothAndTakesNoForeignBytes) {
  ExpectRefusedInMemory(LaunchApart, "collective mismatch: rank");
}

}  // namespace
}  // namespace heddle::comm
