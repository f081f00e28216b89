#include "bench/synthetic_cluster.h"

#include <array>
#include <string>

#include "base/rng/rng.h"
#include "base/status/status.h"

namespace heddle::bench {

namespace {

constexpr uint64_t kGiB = uint64_t{1} << 30;
constexpr uint64_t kZones = 10;
constexpr uint64_t kGenerations = 4;
constexpr uint64_t kDependentOneIn = 20;

struct NodeKind {
  uint64_t percent;  // of the nodes
  double cpus;
  uint64_t memory;
  uint32_t gpus;
  const char* gpu_model;
};
constexpr std::array<NodeKind, 4> kKinds = {{{40, 16, 64 * kGiB, 0, ""},
                                             {30, 64, 256 * kGiB, 0, ""},
                                             {20, 32, 256 * kGiB, 4, "a"},
                                             {10, 96, 1024 * kGiB, 8, "b"}}};

constexpr std::array<int32_t, 12> kRanks = {1, 1, 1, 1, 2, 2, 4, 4, 8, 8, 16, 64};
constexpr std::array<int32_t, 6> kCpus = {1, 1, 2, 4, 8, 16};

}  // namespace

v1::RegisterRequest NodeOf(uint64_t number, uint64_t session) {
  const Rng rng = Rng(1, "bench.node").Child(number);
  uint64_t at = rng.BelowAt(0, 100);
  size_t kind = 0;
  while (at >= kKinds[kind].percent) at -= kKinds[kind++].percent;
  v1::RegisterRequest request;
  request.set_worker_id(Str("node-", 100'000 + number));
  request.set_instance("boot");
  request.set_session(session);
  request.set_host(request.worker_id());
  request.set_version("bench");
  request.set_protocol(1);
  v1::Capacity& capacity = *request.mutable_capacity();
  capacity.set_cpus(kKinds[kind].cpus);
  capacity.set_memory_bytes(kKinds[kind].memory);
  capacity.set_gpus(kKinds[kind].gpus);
  capacity.set_gpu_model(kKinds[kind].gpu_model);
  capacity.set_cpu_isa("avx512");
  capacity.add_labels(Str("zone=z", rng.BelowAt(1, kZones)));
  capacity.add_labels(Str("gen=", 1 + rng.BelowAt(2, kGenerations)));
  return request;
}

v1::RunConfig GangOf(uint64_t number, uint64_t shapes) {
  const Rng gang = Rng(1, "bench.gang").Child(number);
  const Rng shape = Rng(1, "bench.shape").Child(gang.BelowAt(0, shapes));
  v1::RunConfig config;
  config.set_name("gang");
  config.set_kind(v1::RunConfig::KIND_COMMAND);
  config.mutable_command()->add_argv("/bin/true");
  config.mutable_schedule()->set_priority(static_cast<int32_t>(gang.BelowAt(2, 100)));
  v1::ParallelConfig& parallel = *config.mutable_parallel();
  const int32_t ranks = kRanks[shape.BelowAt(0, kRanks.size())];
  parallel.mutable_ranks()->set_min(ranks);
  parallel.mutable_ranks()->set_max(ranks);
  const int32_t cpus = kCpus[shape.BelowAt(1, kCpus.size())];
  parallel.set_cpus_per_rank(cpus);
  // Memory comes from a plan of the model: few jobs have the same.
  parallel.set_memory_per_rank(static_cast<int64_t>(kGiB / 2 + shape.BelowAt(2, 3 * kGiB)) * cpus);
  if (shape.BelowAt(3, 6) == 0) {
    parallel.set_gpus_per_rank(1);
    if (shape.BelowAt(4, 3) == 0) config.mutable_schedule()->add_constraints("gpu.model=b");
  }
  if (shape.BelowAt(5, 10) == 0) {
    config.mutable_schedule()->add_constraints(Str("zone=z", shape.BelowAt(6, kZones)));
  }
  if (shape.BelowAt(7, 10) == 0) config.mutable_schedule()->add_constraints("gen>=3");
  return config;
}

state::event::JobSubmitted SubmitOf(uint64_t number, uint64_t shapes, JobId id, JobId after) {
  state::event::JobSubmitted submit;
  submit.request.identity = "bench";
  submit.id = id;
  submit.config = GangOf(number, shapes);
  if (after.value != 0 && number % kDependentOneIn == 0) {
    v1::DependencyRecord& dependency = submit.after.emplace_back();
    dependency.set_job(after.value);
    dependency.set_kind(v1::DEPENDENCY_KIND_ANY);
  }
  return submit;
}

}  // namespace heddle::bench
