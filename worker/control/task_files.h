// Files of a task folder that daemon and shim exchange besides frames (control-plane X1): `launch`,
// what the shim must start, and `shim`, who it is. The third, `exit`, is the byte stream of an
// attach: TASK_STATE and then every kept frame. Only the standard library.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace heddle::control {

// Where a rank finds its control socket: HEDDLE_CONTROL=fd:3.
inline constexpr int kControlFd = 3;

struct RankLaunch {
  uint32_t rank = 0;
  std::vector<std::string> argv;  // argv[0] with a slash is a path, else searched in PATH of `env`
  std::vector<std::string> env;   // NAME=value, the whole environment
  std::vector<uint32_t> cpus;     // affinity; empty: inherited
};

struct LaunchFile {
  uint64_t fence = 0;
  uint32_t task = 0;
  bool control = true;         // ranks speak frames; false for kind `command`
  uint64_t memory_bytes = 0;   // of the whole task; 0: no limit
  uint64_t log_bytes_max = 0;  // per rank's log file; 0: no limit
  int64_t uid = -1;            // -1: keep the shim's
  int64_t gid = -1;
  std::string working_dir;  // empty: the task folder's scratch/
  // Folders in which the shim may make a cgroup of the task; empty: none of that kind.
  std::string cgroup_v2;
  std::string cgroup_v1_memory;
  std::string cgroup_v1_freezer;
  std::vector<RankLaunch> ranks;
};

// Tag, length, bytes per field, CRC-32C at the end; unknown tags are skipped by a reader.
std::string EncodeLaunch(const LaunchFile& launch);
// False with `error` for a damaged or foreign file; never reads beyond `bytes`.
bool DecodeLaunch(std::string_view bytes, LaunchFile* launch, std::string* error);

struct ShimIdentity {
  int32_t pid = 0;
  uint64_t start_ticks = 0;  // field 22 of /proc/PID/stat
  std::string cgroup;        // folder of the task's own cgroup, empty if none
};
std::string EncodeShimIdentity(const ShimIdentity& identity);
bool DecodeShimIdentity(std::string_view text, ShimIdentity* identity);

// Field 22 of /proc/`pid`/stat, 0 when there is no such process.
uint64_t ProcessStartTicks(int pid);

// The whole file, or false with errno set.
bool ReadWholeFile(const std::string& path, std::string* bytes);
// Writes PATH.tmp, syncs it, renames it over PATH and syncs the folder. False with errno set.
bool WriteFileDurably(const std::string& path, std::string_view bytes);
// Syncs a folder's entries.
bool SyncFolder(const std::string& path);

}  // namespace heddle::control
