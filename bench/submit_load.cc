// Loads a coordinator with submits and times each one from call to durable acknowledgement:
//   bench_submit_load ENDPOINT CLIENTS SUBMITS_PER_CLIENT PREFIX
// Each client is a thread with a channel of its own and one call in flight, as a CLI would have.
// Jobs are held commands, so nothing is scheduled. Prints one JSON line with times in milliseconds.
#include <grpcpp/grpcpp.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "base/net/endpoint.h"
#include "base/net/grpc_channel.h"
#include "base/status/status.h"
#include "heddle/v1/jobs.grpc.pb.h"

namespace heddle {
namespace {

using Clock = std::chrono::steady_clock;

double MillisecondsSince(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

struct Results {
  std::mutex mutex;
  std::vector<double> milliseconds;
  std::set<std::string> ids;
  std::string error;
};

v1::SubmitRequest MakeRequest(const std::string& request_id) {
  v1::SubmitRequest request;
  request.set_request_id(request_id);
  request.set_hold(true);
  v1::RunConfig* config = request.mutable_config();
  config->set_name("bench");
  config->set_kind(v1::RunConfig::KIND_COMMAND);
  config->mutable_command()->add_argv("/bin/true");
  return request;
}

void RunClient(const net::Endpoint& endpoint, const std::string& prefix, int client, int submits,
               Results* results) {
  net::Security security;
  security.insecure_loopback = true;
  const StatusOr<std::shared_ptr<grpc::Channel>> channel = net::OpenChannel(endpoint, security);
  HEDDLE_CHECK(channel.ok(), channel.status());
  const std::unique_ptr<v1::Jobs::Stub> stub = v1::Jobs::NewStub(*channel);
  std::vector<double> milliseconds;
  std::vector<std::string> ids;
  std::string error;
  for (int i = -1; i < submits; ++i) {
    const bool warm_up = i < 0;  // connects
    v1::SubmitRequest request = MakeRequest(Str(prefix, "-", client, "-", i));
    if (warm_up) request.set_dry_run(true);
    v1::SubmitReply reply;
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(30));
    const Clock::time_point start = Clock::now();
    const grpc::Status status = stub->Submit(&context, request, &reply);
    if (warm_up) continue;
    if (!status.ok()) {
      error = status.error_message();
      break;
    }
    milliseconds.push_back(MillisecondsSince(start));
    ids.push_back(reply.id());
  }
  const std::lock_guard lock(results->mutex);
  results->milliseconds.insert(results->milliseconds.end(), milliseconds.begin(),
                               milliseconds.end());
  results->ids.insert(ids.begin(), ids.end());
  if (!error.empty()) results->error = error;
}

double Quantile(const std::vector<double>& sorted, double q) {
  if (sorted.empty()) return 0;
  return sorted[std::min(sorted.size() - 1,
                         static_cast<size_t>(q * static_cast<double>(sorted.size())))];
}

int Run(const std::string& target, int clients, int submits, const std::string& prefix) {
  const StatusOr<net::Endpoint> endpoint = net::ParseEndpoint(target);
  if (!endpoint.ok()) {
    std::fprintf(stderr, "%s\n", Message(endpoint.status()).c_str());
    return 2;
  }
  Results results;
  std::vector<std::thread> threads;
  const Clock::time_point start = Clock::now();
  for (int client = 0; client < clients; ++client) {
    threads.emplace_back(RunClient, *endpoint, prefix, client, submits, &results);
  }
  for (std::thread& thread : threads) thread.join();
  const double seconds = MillisecondsSince(start) / 1000;
  std::sort(results.milliseconds.begin(), results.milliseconds.end());
  const std::vector<double>& sorted = results.milliseconds;
  std::printf(
      "{\"clients\":%d,\"submits\":%zu,\"distinct_ids\":%zu,\"seconds\":%.4f,"
      "\"submits_per_second\":%.1f,\"p50_ms\":%.3f,\"p99_ms\":%.3f,\"max_ms\":%.3f}\n",
      clients, sorted.size(), results.ids.size(), seconds,
      static_cast<double>(sorted.size()) / seconds, Quantile(sorted, 0.5), Quantile(sorted, 0.99),
      sorted.empty() ? 0 : sorted.back());
  if (!results.error.empty()) std::fprintf(stderr, "a client stopped: %s\n", results.error.c_str());
  return results.error.empty() ? 0 : 1;
}

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  const auto number = [](const char* text) {
    const std::string_view digits = text;
    int value = 0;
    std::from_chars(digits.data(), digits.data() + digits.size(), value);
    return value;
  };
  if (argc != 5 || number(argv[2]) < 1 || number(argv[3]) < 1) {
    std::fprintf(stderr, "usage: bench_submit_load ENDPOINT CLIENTS SUBMITS_PER_CLIENT PREFIX\n");
    return 2;
  }
  return heddle::Run(argv[1], number(argv[2]), number(argv[3]), argv[4]);
}
