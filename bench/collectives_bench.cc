// Times collectives of one back end between processes of this host, one core each.
//
// usage: bench_collectives BACKEND RANKS ROUNDS ELEMENTS...
//   BACKEND: gloo, shared (gloo over shared memory), mpi, or c10d (LibTorch's own ProcessGroupGloo)
// Prints one JSON line: seconds of every round by operation and number of fp32 elements of the
// whole tensor, as the slowest rank saw it. Rounds of all operations take turns.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include <torch/csrc/distributed/c10d/FileStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <string>
#include <vector>

#include "tests/worker/comm/file_rendezvous.h"
#include "worker/comm/communicator.h"
#include "worker/comm/shared_memory.h"

namespace heddle::comm {
namespace {

constexpr int kWarmUp = 2;

struct Arrays {
  explicit Arrays(size_t elements, size_t world)
      : whole(elements / world * world, 1.0f),
        part(elements / world, 1.0f),
        other(whole.size()),
        slices(world, part.size() * sizeof(float)) {}
  std::vector<float> whole;
  std::vector<float> part;
  std::vector<float> other;
  std::vector<size_t> slices;
};

// An operation on the arrays of one size; throws or exits where it fails.
using Operation = std::function<void(Arrays*)>;

[[noreturn]] void Die(const std::string& why) {
  std::fprintf(stderr, "bench_collectives: %s\n", why.c_str());
  _exit(1);
}

void Must(const Status& status) {
  if (!status.ok()) Die(Message(status));
}

void Finish(StatusOr<std::unique_ptr<Pending>> started) {
  Must(started.status());
  Must((*started)->Wait());
}

std::map<std::string, Operation> OperationsOf(Communicator* group) {
  const auto scatter = [group](Wire wire) {
    return [group, wire](Arrays* a) {
      Finish(group->StartReduceScatterSum(a->whole, a->part, wire, 0));
    };
  };
  return {{"all_reduce",
           [group](Arrays* a) {
             Must(group->AllReduceSum(std::span<float>(a->whole), comm::kNoUnit));
           }},
          {"reduce_scatter", scatter(Wire::kFp32)},
          {"reduce_scatter_bf16", scatter(Wire::kBf16)},
          {"all_to_all",
           [group](Arrays* a) {
             Finish(group->StartAllToAll(std::as_bytes(std::span<const float>(a->whole)), a->slices,
                                         std::as_writable_bytes(std::span<float>(a->other)),
                                         a->slices, 0));
           }},
          {"all_gather", [group](Arrays* a) {
             Finish(group->StartAllGather(std::as_bytes(std::span<const float>(a->part)),
                                          std::as_writable_bytes(std::span<float>(a->whole)), 0));
           }}};
}

at::Tensor View(std::vector<float>* values) {
  return at::from_blob(values->data(), {static_cast<int64_t>(values->size())}, at::kFloat);
}

// As DDP and FSDP2 use it.
std::map<std::string, Operation> OperationsOf(c10d::ProcessGroupGloo* group) {
  return {{"all_reduce",
           [group](Arrays* a) {
             std::vector<at::Tensor> one = {View(&a->whole)};
             group->allreduce(one)->wait();
           }},
          {"reduce_scatter",
           [group](Arrays* a) {
             at::Tensor whole = View(&a->whole);
             at::Tensor part = View(&a->part);
             group->_reduce_scatter_base(part, whole)->wait();
           }},
          {"all_to_all",
           [group](Arrays* a) {
             at::Tensor whole = View(&a->whole);
             at::Tensor other = View(&a->other);
             std::vector<int64_t> equal;
             group->alltoall_base(other, whole, equal, equal)->wait();
           }},
          {"all_gather", [group](Arrays* a) {
             at::Tensor whole = View(&a->whole);
             at::Tensor part = View(&a->part);
             group->_allgather_base(whole, part)->wait();
           }}};
}

struct Plan {
  std::string backend;
  int world = 2;
  int rounds = 5;
  std::vector<size_t> sizes;
  std::string folder;
};

// A rank's group and what is timed on it.
struct Member {
  std::unique_ptr<Communicator> ours;
  c10::intrusive_ptr<c10d::ProcessGroupGloo> theirs;
  std::map<std::string, Operation> operations;
  std::function<double(double)> sum;  // over ranks; also a barrier
};

Member Join(const Plan& plan, int rank) {
  Member member;
  if (plan.backend == "c10d") {
    auto store = c10::make_intrusive<c10d::FileStore>(plan.folder + "/store", plan.world);
    auto options = c10d::ProcessGroupGloo::Options::create();
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1"));
    member.theirs = c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, plan.world, options);
    member.operations = OperationsOf(member.theirs.get());
    member.sum = [group = member.theirs.get()](double value) {
      std::vector<at::Tensor> one = {at::full({1}, value, at::kDouble)};
      group->allreduce(one)->wait();
      return one[0].item<double>();
    };
    return member;
  }
  GroupOptions options;
  options.rank = options.local_rank = rank;
  options.world_size = plan.world;
  options.data_address = "127.0.0.1";
  options.key_prefix = "bench/";
  options.scratch = plan.folder;
  options.rendezvous = ThroughFiles(plan.folder);
  StatusOr<std::unique_ptr<Communicator>> group =
      plan.backend == "mpi" ? ConnectMpi(options) : ConnectGloo(options);
  Must(group.status());
  member.ours = *std::move(group);
  if (plan.backend == "shared") {
    std::string why_not;
    group = OverSharedMemory(std::move(member.ours), &why_not);
    Must(group.status());
    if (!why_not.empty()) Die(why_not);
    member.ours = *std::move(group);
  }
  member.operations = OperationsOf(member.ours.get());
  member.sum = [group = member.ours.get()](double value) {
    Must(group->AllReduceSum(std::span<double>(&value, 1)));
    return value;
  };
  return member;
}

void RunRank(const Plan& plan, int rank) {
  cpu_set_t core;
  CPU_ZERO(&core);
  CPU_SET(static_cast<size_t>(rank) % static_cast<size_t>(sysconf(_SC_NPROCESSORS_ONLN)), &core);
  sched_setaffinity(0, sizeof(core), &core);
  at::set_num_threads(1);
  const Member member = Join(plan, rank);
  std::string json;
  for (const size_t size : plan.sizes) {
    Arrays arrays(size, static_cast<size_t>(plan.world));
    std::map<std::string, std::string> seconds;
    for (int round = 0; round < plan.rounds + kWarmUp; ++round) {
      for (const auto& [name, operation] : member.operations) {
        member.sum(0);  // all start together
        const auto begin = std::chrono::steady_clock::now();
        operation(&arrays);
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - begin;
        const double mean = member.sum(took.count()) / plan.world;
        if (round >= kWarmUp) seconds[name] += (seconds[name].empty() ? "" : ",") + Str(mean);
      }
    }
    for (const auto& [name, values] : seconds) {
      json += Str(json.empty() ? "" : ",", "\"", name, "_", size, "\":[", values, "]");
    }
  }
  if (rank == 0) std::printf("{%s}\n", json.c_str());
  std::fflush(stdout);
  member.sum(0);
}

bool ReadNumber(const char* text, int64_t* number) {
  const std::string all = text;
  const auto parsed = std::from_chars(all.data(), all.data() + all.size(), *number);
  return parsed.ec == std::errc() && parsed.ptr == all.data() + all.size() && *number > 0;
}

int Main(int argc, char** argv) {
  Plan plan;
  int64_t world = 0;
  int64_t rounds = 0;
  bool good = argc >= 5 && ReadNumber(argv[2], &world) && ReadNumber(argv[3], &rounds);
  for (int i = 4; good && i < argc; ++i) {
    int64_t size = 0;
    good = ReadNumber(argv[i], &size);
    plan.sizes.push_back(static_cast<size_t>(size));
  }
  if (!good) {
    std::fprintf(stderr,
                 "usage: bench_collectives gloo|shared|mpi|c10d RANKS ROUNDS ELEMENTS...\n");
    return 2;
  }
  plan.backend = argv[1];
  plan.world = static_cast<int>(world);
  plan.rounds = static_cast<int>(rounds);
  std::string folder = std::filesystem::temp_directory_path() / "heddle-collectives-XXXXXX";
  if (mkdtemp(folder.data()) == nullptr) Die("no temporary folder");
  plan.folder = folder;
  std::vector<pid_t> ranks;
  for (int rank = 0; rank < plan.world; ++rank) {
    ranks.push_back(fork());
    if (ranks.back() != 0) continue;
    try {
      RunRank(plan, rank);
    } catch (const std::exception& error) {
      Die(error.what());
    }
    _exit(0);
  }
  int failed = 0;
  for (const pid_t rank : ranks) {
    int status = -1;
    waitpid(rank, &status, 0);
    failed |= status;
  }
  std::filesystem::remove_all(folder);
  return failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace heddle::comm

int main(int argc, char** argv) { return heddle::comm::Main(argc, argv); }
