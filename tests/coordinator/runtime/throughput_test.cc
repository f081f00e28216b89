// Durable submits per second with concurrent clients, and their latency. Prints the figures; the
// bound in the test is far below the target, so that a busy machine does not fail it.
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <functional>
#include <iostream>
#include <memory>
#include <mutex>
#include <vector>

#include "tests/coordinator/support/coordinator_process.h"
#include "tests/support/status_matchers.h"

namespace heddle::test {
namespace {

using SteadyClock = std::chrono::steady_clock;

struct Call {
  grpc::ClientContext context;
  v1::SubmitRequest request;
  v1::SubmitReply reply;
  SteadyClock::time_point begin;
};

struct Load {
  v1::Jobs::Stub* jobs = nullptr;
  v1::SubmitRequest request;
  int total = 0;
  std::mutex mutex;
  std::condition_variable ended;
  int started = 0;
  int clients = 0;  // that still submit
  int failed = 0;
  std::vector<double> latencies_ms;
  // Kept to the end: gRPC 1.51 frees its queue twice if the last call goes on its own thread.
  std::deque<Call> calls;
};

// One of the concurrent clients: its next submit starts when the former is acknowledged.
void Next(Load* load, int client) {
  Call* call = nullptr;
  {
    const std::lock_guard lock(load->mutex);
    if (load->started == load->total) {
      if (--load->clients == 0) {
        load->ended.notify_one();  // under the lock: `load` may go once it is free
      }
      return;
    }
    call = &load->calls.emplace_back();
    call->request = load->request;
    call->request.set_request_id("load-" + std::to_string(load->started++));
  }
  call->begin = SteadyClock::now();
  call->context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
  load->jobs->async()->Submit(
      &call->context, &call->request, &call->reply, [load, client, call](grpc::Status status) {
        const std::chrono::duration<double, std::milli> took = SteadyClock::now() - call->begin;
        {
          const std::lock_guard lock(load->mutex);
          load->failed += status.ok() ? 0 : 1;
          load->latencies_ms.push_back(took.count());
        }
        Next(load, client);
      });
}

TEST(CoordinatorThroughput, DurableSubmitsPerSecond) {
  CoordinatorProcess process;
  ASSERT_OK(process.Start());
  const std::unique_ptr<v1::Jobs::Stub> jobs = process.Jobs();
  Load load;
  load.jobs = jobs.get();
  load.request = CommandJob("load");
  load.total = 10'000;
  constexpr int kClients = 64;
  load.clients = kClients;
  const SteadyClock::time_point begin = SteadyClock::now();
  for (int client = 0; client < kClients; ++client) {
    Next(&load, client);
  }
  std::unique_lock lock(load.mutex);
  load.ended.wait(lock, [&] { return load.clients == 0; });
  const std::chrono::duration<double> took = SteadyClock::now() - begin;
  std::sort(load.latencies_ms.begin(), load.latencies_ms.end());
  const double per_second = load.total / took.count();
  std::cout << "{\"test\":\"durable_submits\",\"clients\":" << kClients
            << ",\"submits\":" << load.total << ",\"per_second\":" << per_second
            << ",\"p50_ms\":" << load.latencies_ms[load.latencies_ms.size() / 2]
            << ",\"p99_ms\":" << load.latencies_ms[load.latencies_ms.size() * 99 / 100]
            << ",\"coordinator_cpu_us\":" << process.CpuSeconds() * 1e6 / load.total
            << ",\"failed\":" << load.failed << ",\"rss_kib\":" << process.ResidentKib() << "}\n";
  EXPECT_EQ(load.failed, 0);
  EXPECT_GT(per_second, 300);
}

}  // namespace
}  // namespace heddle::test
