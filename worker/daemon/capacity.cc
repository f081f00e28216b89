#include "worker/daemon/capacity.h"

#include <fcntl.h>
#include <sched.h>
#include <spawn.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
#include <sstream>

#include "base/status/status.h"
#include "base/units/units.h"
#include "worker/control/task_files.h"

namespace heddle::worker {
namespace {

constexpr uint64_t kNoLimit = std::numeric_limits<uint64_t>::max();

std::string ReadText(const std::string& path) {
  std::string text;
  if (!control::ReadWholeFile(path, &text)) text.clear();
  return text;
}

// The first number of a text; `otherwise` if it does not start with one ("max", empty).
uint64_t LeadingNumber(const std::string& text, uint64_t otherwise) {
  uint64_t value = 0;
  const std::from_chars_result end = std::from_chars(text.data(), text.data() + text.size(), value);
  return end.ec == std::errc() ? value : otherwise;
}

bool HasWord(const std::string& list, const std::string& word, char separator) {
  std::istringstream words(list);
  std::string one;
  while (std::getline(words, one, separator)) {
    if (one == word) return true;
  }
  return false;
}

std::string OwnCgroup(const std::string& controller) {
  return CgroupFolder(ReadText("/proc/self/cgroup"), ReadText("/proc/self/mountinfo"), controller);
}

// The least of `file` in the own cgroup and every folder above it.
uint64_t LeastUpwards(std::string folder, const std::string& file) {
  uint64_t least = kNoLimit;
  while (folder.size() > 1) {
    least = std::min(least, LeadingNumber(ReadText(Str(folder, "/", file)), kNoLimit));
    const size_t slash = folder.rfind('/');
    if (slash == std::string::npos) break;
    folder.resize(slash);
  }
  return least;
}

// CPUs per wall second that v2's cpu.max of one folder grants.
double QuotaOfFile(const std::string& text) {
  const uint64_t quota = LeadingNumber(text, kNoLimit);
  const size_t space = text.find(' ');
  if (quota == kNoLimit || space == std::string::npos) return std::numeric_limits<double>::max();
  const uint64_t period = LeadingNumber(text.substr(space + 1), 100'000);
  return static_cast<double>(quota) / static_cast<double>(std::max<uint64_t>(period, 1));
}

double CpuQuota() {
  double least = std::numeric_limits<double>::max();
  std::string folder = OwnCgroup("");
  while (folder.size() > 1) {
    least = std::min(least, QuotaOfFile(ReadText(folder + "/cpu.max")));
    folder.resize(std::min(folder.rfind('/'), folder.size() - 1));
  }
  const std::string v1 = OwnCgroup("cpu");
  const uint64_t quota = LeadingNumber(ReadText(v1 + "/cpu.cfs_quota_us"), kNoLimit);
  const uint64_t period = LeadingNumber(ReadText(v1 + "/cpu.cfs_period_us"), 0);
  if (quota != kNoLimit && period > 0) {
    least = std::min(least, static_cast<double>(quota) / static_cast<double>(period));
  }
  return least;
}

// Whole CPUs, and never less than one: a worker that offers none is of no use to any rank.
double ShareOfCpus(double granted, uint32_t share) {
  return share == 1 ? granted : std::max(1.0, std::floor(granted / share));
}

// `folder` if a cgroup can be made in it.
std::string IfWritable(const std::string& folder) {
  if (folder.empty()) return "";
  const std::string probe = Str(folder, "/heddle-probe-", getpid());
  if (mkdir(probe.c_str(), 0755) != 0) return "";
  rmdir(probe.c_str());
  return folder;
}

}  // namespace

std::string CgroupFolder(const std::string& cgroup_text, const std::string& mountinfo_text,
                         const std::string& controller) {
  // "7:cpu,cpuacct:/path"; v2 is "0::/path".
  std::string own = "/";
  bool listed = false;
  std::istringstream cgroups(cgroup_text);
  std::string line;
  while (std::getline(cgroups, line)) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string names = line.substr(first + 1, second - first - 1);
    if (controller.empty() ? !names.empty() : !HasWord(names, controller, ',')) continue;
    own = line.substr(second + 1);
    listed = true;
  }
  if (!listed) return "";
  // "id parent major:minor ROOT MOUNTPOINT options [tags] - TYPE source SUPEROPTIONS".
  std::istringstream mounts(mountinfo_text);
  while (std::getline(mounts, line)) {
    const size_t dash = line.find(" - ");
    if (dash == std::string::npos) continue;
    std::istringstream left(line.substr(0, dash));
    std::istringstream right(line.substr(dash + 3));
    std::string skip, root, point, type, source, super;
    left >> skip >> skip >> skip >> root >> point;
    right >> type >> source >> super;
    const bool match = controller.empty() ? type == "cgroup2"
                                          : type == "cgroup" && HasWord(super, controller, ',');
    if (!match) continue;
    // The mount shows the hierarchy from ROOT on; in a container the own path may lie outside.
    std::string below = own;
    if (root != "/" && own.rfind(root, 0) == 0) below = own.substr(root.size());
    const std::string folder = below == "/" || below.empty() ? point : point + below;
    return access(folder.c_str(), F_OK) == 0 ? folder : point;
  }
  return "";
}

std::vector<uint32_t> GrantedCpus() {
  cpu_set_t set;
  CPU_ZERO(&set);
  std::vector<uint32_t> cpus;
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return cpus;
  for (uint32_t cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return cpus;
}

double GrantedCpuTime() {
  const double affinity = static_cast<double>(std::max<size_t>(GrantedCpus().size(), 1));
  return std::min(affinity, CpuQuota());
}

uint64_t GrantedMemory() {
  uint64_t memory = kNoLimit;
  const std::string info = ReadText("/proc/meminfo");
  const size_t at = info.find("MemTotal:");
  if (at != std::string::npos) {
    const size_t digit = info.find_first_of("0123456789", at);
    memory = LeadingNumber(info.substr(std::min(digit, info.size())), 0) * 1024;
  }
  memory = std::min(memory, LeastUpwards(OwnCgroup(""), "memory.max"));
  return std::min(memory, LeastUpwards(OwnCgroup("memory"), "memory.limit_in_bytes"));
}

v1::Capacity MakeCapacity(const Options& options, const std::vector<GpuDevice>& gpus) {
  v1::Capacity capacity;
  capacity.set_cpus(options.cpus > 0 ? options.cpus : ShareOfCpus(GrantedCpuTime(), options.share));
  capacity.set_memory_bytes(options.memory_bytes > 0 ? static_cast<uint64_t>(options.memory_bytes)
                                                     : GrantedMemory() / options.share);
  capacity.set_gpus(static_cast<uint32_t>(gpus.size()));
  const bool one_model = std::all_of(gpus.begin(), gpus.end(), [&gpus](const GpuDevice& gpu) {
    return gpu.model == gpus.front().model;
  });
  if (!gpus.empty() && one_model) capacity.set_gpu_model(gpus.front().model);
  for (const std::string& label : options.labels) capacity.add_labels(label);
#if defined(__x86_64__)
  const char* isa = "x86-64";
  if (__builtin_cpu_supports("avx2")) isa = "avx2";
  if (__builtin_cpu_supports("avx512f")) isa = "avx512";
  capacity.set_cpu_isa(isa);
#endif
  return capacity;
}

std::string OvercommitOf(const Options& options, const v1::Capacity& granted) {
  std::string text;
  if (options.cpus > granted.cpus()) {
    text = Str(options.cpus, " CPUs are offered and ", granted.cpus(),
               " were granted: ranks will share cores");
  }
  if (options.memory_bytes > 0 &&
      static_cast<uint64_t>(options.memory_bytes) > granted.memory_bytes()) {
    text += Str(text.empty() ? "" : "; ", FormatBytes(options.memory_bytes),
                " of memory are offered and ",
                FormatBytes(static_cast<int64_t>(granted.memory_bytes())),
                " were granted: ranks may be killed for want of it");
  }
  return text;
}

bool FindsMpi(const std::string& folder) {
  const std::string server = folder + "heddle-mpi-server";
  if (access(server.c_str(), X_OK) != 0) return false;
  std::string check = "--check";
  const std::array<char*, 3> argv = {const_cast<char*>(server.c_str()), check.data(), nullptr};
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
  pid_t pid = -1;
  const int failed = posix_spawn(&pid, server.c_str(), &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  int status = -1;
  if (failed != 0 || waitpid(pid, &status, 0) != pid) return false;
  return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

uint64_t FreeDiskBytes(const std::string& path) {
  struct statvfs info = {};
  if (statvfs(path.c_str(), &info) != 0) return 0;
  return static_cast<uint64_t>(info.f_bavail) * info.f_frsize;
}

CgroupParents FindCgroupParents() {
  CgroupParents parents;
  parents.v2 = IfWritable(OwnCgroup(""));
  parents.v1_memory = IfWritable(OwnCgroup("memory"));
  parents.v1_freezer = IfWritable(OwnCgroup("freezer"));
  return parents;
}

}  // namespace heddle::worker
