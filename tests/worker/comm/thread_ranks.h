// Ranks as threads of one process, each with a Gloo group of its own, over sockets or in memory.
#pragma once

#include <gtest/gtest.h>
#include <signal.h>

#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "heddle/v1/control.pb.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/comm/fake_rendezvous.h"
#include "worker/comm/communicator.h"
#include "worker/comm/shared_memory.h"

namespace heddle::comm {

inline RendezvousCall CallOf(FakeRendezvous* server, uint32_t rank) {
  return [server, rank](const heddle::v1::RendezvousRequest& request)
             -> StatusOr<heddle::v1::RendezvousReply> { return server->Answer(rank, request); };
}

inline GroupOptions OptionsOf(FakeRendezvous* server, int rank, int world) {
  GroupOptions options;
  options.rank = rank;
  options.world_size = world;
  options.data_address = "127.0.0.1";
  options.key_prefix = "f7/";
  options.rendezvous = CallOf(server, static_cast<uint32_t>(rank));
  options.init_timeout = std::chrono::milliseconds(20000);
  options.step_timeout = std::chrono::milliseconds(3000);
  return options;
}

// Runs `body` on one thread per rank, each with its own group.
inline void OnRanks(int world, const std::function<void(int, Communicator*)>& body,
                    bool shared_memory = false) {
  signal(SIGPIPE, SIG_IGN);  // as in the trainer: Gloo writes to peers that are gone
  FakeRendezvous server;
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world; ++rank) {
    threads.emplace_back([&, rank] {
      auto group = ConnectGloo(OptionsOf(&server, rank, world));
      ASSERT_OK(group.status());
      if (shared_memory) {
        std::string why_not;
        group = OverSharedMemory(*std::move(group), &why_not);
        ASSERT_OK(group.status());
        ASSERT_EQ(why_not, "");
        EXPECT_EQ((*group)->backend(), "gloo over shared memory");
        (*group)->SetTimeout(std::chrono::milliseconds(3000));
      }
      body(rank, group->get());
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

// The same with the traffic in shared memory, which threads of one process can have too.
inline void OnRanksOfOneHost(int world, const std::function<void(int, Communicator*)>& body) {
  OnRanks(world, body, /*shared_memory=*/true);
}

}  // namespace heddle::comm
