// T8 and T5 small: kill -9 of the coordinator under clients that submit and cancel with request
// ids, and a full disk; then every acknowledged operation is there, once.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/mount.h>

#include <atomic>
#include <chrono>
#include <fstream>
#include <iostream>
#include <map>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <vector>

#include "base/net/grpc_channel.h"
#include "tests/coordinator/runtime/coordinator_ops.h"
#include "tests/coordinator/support/coordinator_process.h"
#include "tests/support/status_matchers.h"

namespace heddle::test {
namespace {

TEST(CoordinatorCrash, KillNineLosesAndDoublesNothingAcknowledged) {
  const uint64_t seed = std::random_device()();
  std::mt19937_64 random(seed);
  CoordinatorProcess process;
  ASSERT_OK(process.Start());
  std::atomic<bool> stop = false;
  constexpr int kClients = 4;
  std::vector<ClientHistory> histories(kClients);
  std::vector<std::thread> clients;
  for (int c = 0; c < kClients; ++c) {
    clients.emplace_back([&, c] { RunClient(process, c, &stop, &histories[c]); });
  }
  constexpr int kKills = 12;
  Status restart;
  for (int i = 0; i < kKills && restart.ok(); ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(100 + random() % 300));
    process.End(SIGKILL);
    restart = process.Start();
  }
  stop = true;
  for (std::thread& client : clients) {
    client.join();
  }
  ASSERT_OK(restart) << "seed " << seed;
  const Verdict verdict = Judge(process, histories);
  std::cout << "{\"test\":\"coordinator_kill9\",\"seed\":" << seed << ",\"kills\":" << kKills
            << ",\"acknowledged\":" << verdict.acknowledged << ",\"retried\":" << verdict.retried
            << ",\"lost\":" << verdict.lost << ",\"duplicated\":" << verdict.duplicated << "}\n";
  EXPECT_EQ(verdict.lost, 0u) << "seed " << seed;
  EXPECT_EQ(verdict.duplicated, 0u) << "seed " << seed;
  EXPECT_GT(verdict.acknowledged, 100u);
  // And the journal still replays to the records.
  process.End(SIGKILL);
  process.Spawn({"--verify"});
  EXPECT_EQ(process.Wait(), 0) << process.Output();
}

TEST(CoordinatorCrash, FullDiskPausesAndKeepsEverythingAcknowledged) {
  char dir[] = "/tmp/heddle-tmpfs-XXXXXX";
  ASSERT_NE(mkdtemp(dir), nullptr);
  if (mount("heddle-test", dir, "tmpfs", 0, "size=420m") != 0) {
    rmdir(dir);
    GTEST_SKIP() << "SKIPPED LOUDLY: mounting a tmpfs needs root (CAP_SYS_ADMIN)";
  }
  {
    CoordinatorProcess process(dir);
    ASSERT_OK(process.Start({"--read-only-below", "1"}));
    auto jobs = process.Jobs();
    const std::string filler = std::string(dir) + "/filler";
    {
      std::ofstream file(filler, std::ios::binary);
      const std::string block(1 << 20, 'f');
      while (file.write(block.data(), static_cast<std::streamsize>(block.size())).flush()) {
      }
    }
    ClientHistory history;
    Status error;
    for (int i = 0; i < 20'000 && error.ok(); ++i) {
      v1::SubmitRequest request = CommandJob("full");
      request.set_request_id("full-" + std::to_string(i));
      const StatusOr<std::string> id = Submit(*jobs, request);
      error = id.status();
      if (id.ok()) {
        history.acknowledged[request.request_id()] = *id;
      } else {
        history.unknown.insert(request.request_id());
      }
    }
    EXPECT_FALSE(error.ok()) << "the disk never filled";
    EXPECT_TRUE(ListIds(*jobs).ok()) << "reads must go on";
    ASSERT_EQ(unlink(filler.c_str()), 0);
    const auto freed = std::chrono::steady_clock::now();
    StatusOr<std::string> again = Unavailable("");
    for (int i = 0; i < 300 && !again.ok(); ++i) {
      again = Submit(*jobs, CommandJob("after"));
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
    }
    ASSERT_OK(again) << process.Output().substr(
        process.Output().size() > 3000 ? process.Output().size() - 3000 : 0);
    const std::chrono::duration<double> resumed = std::chrono::steady_clock::now() - freed;
    const Verdict verdict = Judge(process, {history});
    std::cout << "{\"test\":\"coordinator_disk_full\",\"acknowledged\":" << verdict.acknowledged
              << ",\"lost\":" << verdict.lost
              << ",\"aborts\":0,\"seconds_to_resume\":" << resumed.count() << "}\n";
    EXPECT_EQ(verdict.lost, 0u);
    EXPECT_EQ(verdict.duplicated, 0u);
  }
  umount2(dir, MNT_DETACH);
  rmdir(dir);
}

}  // namespace
}  // namespace heddle::test
