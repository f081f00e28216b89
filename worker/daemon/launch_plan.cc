#include "worker/daemon/launch_plan.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include "base/ids/ids.h"
#include "base/status/status.h"

namespace heddle::worker {
namespace {

// Variables of the daemon that ranks may see; everything else (SLURM_*, PMI*, secrets) stays
// behind.
constexpr const char* kPassedOn[] = {"PATH",       "HOME",
                                     "USER",       "LANG",
                                     "LC_ALL",     "TZ",
                                     "TMPDIR",     "LD_LIBRARY_PATH",
                                     "HEDDLE_ISA", "HEDDLE_LOG_LEVEL"};

void SetVariable(const std::string& name, const std::string& value, std::vector<std::string>* env) {
  std::erase_if(*env, [&name](const std::string& one) { return one.starts_with(name + "="); });
  env->push_back(Str(name, "=", value));
}

// Set for every rank: a rank without GPUs must see none, or it would use one of another's.
void SetGpus(const std::vector<std::string>& gpus, std::vector<std::string>* env) {
  std::string list;
  for (const std::string& gpu : gpus) list += (list.empty() ? "" : ",") + gpu;
  SetVariable("CUDA_VISIBLE_DEVICES", list, env);
  // CUDA's own order puts the fastest first; ours is the order of /proc.
  SetVariable("CUDA_DEVICE_ORDER", "PCI_BUS_ID", env);
}

std::vector<std::string> RankEnvironment(const TaskFolder& folder, size_t local_rank) {
  const v1::TaskAssignment& assignment = folder.assignment();
  std::vector<std::string> env;
  for (const char* name : kPassedOn) {
    const char* value = std::getenv(name);
    if (value != nullptr) env.push_back(Str(name, "=", value));
  }
  const uint32_t threads = ThreadsPerRank(assignment);
  env.push_back(Str("HEDDLE_JOB=", JobId{assignment.job()}));
  env.push_back(Str("HEDDLE_ATTEMPT=", assignment.attempt()));
  env.push_back(Str("HEDDLE_FENCE=", assignment.fence()));
  env.push_back(Str("HEDDLE_RANK=", assignment.ranks(static_cast<int>(local_rank))));
  env.push_back(Str("HEDDLE_LOCAL_RANK=", local_rank));
  env.push_back(Str("HEDDLE_WORLD_SIZE=", assignment.world_size()));
  env.push_back(Str("HEDDLE_RESTARTS=", assignment.restarts()));
  // Marks every process of the task, so that a daemon finds what a killed shim left behind.
  env.push_back(Str("HEDDLE_TASK_DIR=", folder.path()));
  env.push_back(Str("OMP_NUM_THREADS=", threads));
  // Threads that wait sleep soon: on shared cores OpenMP's default of spinning makes two threads
  // several times slower than one, and short waits cost the same either way.
  env.push_back("GOMP_SPINCOUNT=1000");
  if (!assignment.restore().empty()) {
    const v1::CheckpointRecord& newest = assignment.restore(0);
    env.push_back(Str("HEDDLE_RESUME_FROM=", CheckpointId{JobId{newest.job()}, newest.step()}));
  }
  if (!IsCommand(assignment)) {
    env.push_back(Str("HEDDLE_CONTROL=fd:", control::kControlFd));
  }
  for (const auto& [name, value] : assignment.config().command().env()) {
    SetVariable(name, value, &env);
  }
  return env;
}

}  // namespace

bool IsCommand(const v1::TaskAssignment& assignment) {
  return assignment.config().kind() == v1::RunConfig::KIND_COMMAND;
}

uint32_t ThreadsPerRank(const v1::TaskAssignment& assignment) {
  return static_cast<uint32_t>(std::max(1.0, std::floor(assignment.cpus_per_rank())));
}

control::LaunchFile MakeLaunch(const TaskFolder& folder, const LaunchInput& input) {
  const v1::TaskAssignment& assignment = folder.assignment();
  control::LaunchFile launch;
  launch.fence = assignment.fence();
  launch.task = assignment.task();
  launch.control = !IsCommand(assignment);
  launch.memory_bytes =
      assignment.memory_per_rank() * static_cast<uint64_t>(assignment.ranks_size());
  launch.log_bytes_max = kLogBytesMax;
  launch.cgroup_v2 = input.cgroups.v2;
  launch.cgroup_v1_memory = input.cgroups.v1_memory;
  launch.cgroup_v1_freezer = input.cgroups.v1_freezer;
  for (int i = 0; i < assignment.ranks_size(); ++i) {
    control::RankLaunch rank;
    rank.rank = assignment.ranks(i);
    if (launch.control) {
      rank.argv = {input.trainer};
    } else {
      const auto& argv = assignment.config().command().argv();
      rank.argv.assign(argv.begin(), argv.end());
    }
    const size_t local = static_cast<size_t>(i);
    rank.env = RankEnvironment(folder, local);
    SetGpus(local < input.gpus.size() ? input.gpus[local] : std::vector<std::string>(), &rank.env);
    if (local < input.cpus.size()) rank.cpus = input.cpus[local];
    launch.ranks.push_back(std::move(rank));
  }
  return launch;
}

v1::RankSpec MakeSpec(const TaskFolder& folder, size_t local_rank, const std::string& data_address,
                      const std::vector<uint32_t>& cpus) {
  const v1::TaskAssignment& assignment = folder.assignment();
  const uint32_t rank = assignment.ranks(static_cast<int>(local_rank));
  v1::RankSpec spec;
  *spec.mutable_config() = assignment.config();
  spec.set_job(ToText(JobId{assignment.job()}));
  spec.set_attempt(assignment.attempt());
  spec.set_fence(assignment.fence());
  spec.set_rank(rank);
  spec.set_local_rank(static_cast<uint32_t>(local_rank));
  spec.set_world_size(assignment.world_size());
  spec.set_checkpoint_root(folder.checkpoint_root());
  spec.set_attempt_dir(assignment.attempt_dir());
  *spec.mutable_restore() = assignment.restore();
  *spec.mutable_skipped() = assignment.skipped();
  spec.set_page(folder.PagePath(rank));
  spec.set_data_address(data_address);
  spec.set_threads(ThreadsPerRank(assignment));
  for (const uint32_t cpu : cpus) spec.add_cpus(static_cast<int32_t>(cpu));
  return spec;
}

}  // namespace heddle::worker
