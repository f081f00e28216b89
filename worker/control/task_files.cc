#include "worker/control/task_files.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <charconv>
#include <cstring>

#include "worker/control/control_frame.h"

namespace heddle::control {
namespace {

constexpr std::string_view kLaunchMagic = "HDLLNCH1";
constexpr size_t kMaxStrings = 65536;

enum Tag : uint16_t {
  kTagFence = 1,
  kTagTask = 2,
  kTagControl = 3,
  kTagMemory = 4,
  kTagLogBytes = 5,
  kTagUid = 6,
  kTagGid = 7,
  kTagWorkingDir = 8,
  kTagCgroupV2 = 9,
  kTagCgroupV1Memory = 10,
  kTagCgroupV1Freezer = 11,
  kTagRank = 12,  // starts a rank; the next three belong to it
  kTagArgument = 13,
  kTagEnvironment = 14,
  kTagCpu = 15,
};

void PutField(std::string* out, uint16_t tag, std::string_view bytes) {
  const uint32_t length = static_cast<uint32_t>(bytes.size());
  out->append(AsBytes(tag)).append(AsBytes(length)).append(bytes);
}
void PutNumber(std::string* out, uint16_t tag, uint64_t value) {
  PutField(out, tag, AsBytes(value));
}

// Applies one field; false if it is malformed or out of place.
bool Apply(uint16_t tag, std::string_view bytes, LaunchFile* launch) {
  uint64_t number = 0;
  const bool is_number = bytes.size() == sizeof(number) && Unpack(bytes, &number);
  const bool is_text = bytes.find('\0') == std::string_view::npos;
  RankLaunch* rank = launch->ranks.empty() ? nullptr : &launch->ranks.back();
  switch (tag) {
    case kTagFence:
      launch->fence = number;
      return is_number;
    case kTagTask:
      launch->task = static_cast<uint32_t>(number);
      return is_number;
    case kTagControl:
      launch->control = number != 0;
      return is_number;
    case kTagMemory:
      launch->memory_bytes = number;
      return is_number;
    case kTagLogBytes:
      launch->log_bytes_max = number;
      return is_number;
    case kTagUid:
      launch->uid = static_cast<int64_t>(number);
      return is_number;
    case kTagGid:
      launch->gid = static_cast<int64_t>(number);
      return is_number;
    case kTagWorkingDir:
      launch->working_dir = bytes;
      return is_text;
    case kTagCgroupV2:
      launch->cgroup_v2 = bytes;
      return is_text;
    case kTagCgroupV1Memory:
      launch->cgroup_v1_memory = bytes;
      return is_text;
    case kTagCgroupV1Freezer:
      launch->cgroup_v1_freezer = bytes;
      return is_text;
    case kTagRank:
      launch->ranks.emplace_back().rank = static_cast<uint32_t>(number);
      return is_number && launch->ranks.size() <= kMaxStrings;
    case kTagArgument:
      if (rank == nullptr || rank->argv.size() >= kMaxStrings) return false;
      rank->argv.emplace_back(bytes);
      return is_text;
    case kTagEnvironment:
      if (rank == nullptr || rank->env.size() >= kMaxStrings) return false;
      rank->env.emplace_back(bytes);
      return is_text;
    case kTagCpu:
      if (rank == nullptr || rank->cpus.size() >= kMaxStrings) return false;
      rank->cpus.push_back(static_cast<uint32_t>(number));
      return is_number;
    default:
      return true;
  }
}

bool WriteAll(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t count = write(fd, bytes.data(), bytes.size());
    if (count < 0) {
      if (errno == EINTR) continue;
      return false;
    }
    bytes.remove_prefix(static_cast<size_t>(count));
  }
  return true;
}

}  // namespace

std::string EncodeLaunch(const LaunchFile& launch) {
  std::string out(kLaunchMagic);
  PutNumber(&out, kTagFence, launch.fence);
  PutNumber(&out, kTagTask, launch.task);
  PutNumber(&out, kTagControl, launch.control);
  PutNumber(&out, kTagMemory, launch.memory_bytes);
  PutNumber(&out, kTagLogBytes, launch.log_bytes_max);
  PutNumber(&out, kTagUid, static_cast<uint64_t>(launch.uid));
  PutNumber(&out, kTagGid, static_cast<uint64_t>(launch.gid));
  PutField(&out, kTagWorkingDir, launch.working_dir);
  PutField(&out, kTagCgroupV2, launch.cgroup_v2);
  PutField(&out, kTagCgroupV1Memory, launch.cgroup_v1_memory);
  PutField(&out, kTagCgroupV1Freezer, launch.cgroup_v1_freezer);
  for (const RankLaunch& rank : launch.ranks) {
    PutNumber(&out, kTagRank, rank.rank);
    for (const std::string& argument : rank.argv) PutField(&out, kTagArgument, argument);
    for (const std::string& variable : rank.env) PutField(&out, kTagEnvironment, variable);
    for (const uint32_t cpu : rank.cpus) PutNumber(&out, kTagCpu, cpu);
  }
  const uint32_t crc = Crc32c(out);
  out.append(AsBytes(crc));
  return out;
}

bool DecodeLaunch(std::string_view bytes, LaunchFile* launch, std::string* error) {
  uint32_t crc = 0;
  if (bytes.size() < kLaunchMagic.size() + sizeof(crc) ||
      bytes.substr(0, kLaunchMagic.size()) != kLaunchMagic) {
    *error = "not a launch file";
    return false;
  }
  Unpack(bytes.substr(bytes.size() - sizeof(crc)), &crc);
  bytes.remove_suffix(sizeof(crc));
  if (Crc32c(bytes) != crc) {
    *error = "launch file: wrong checksum";
    return false;
  }
  bytes.remove_prefix(kLaunchMagic.size());
  *launch = LaunchFile();
  while (!bytes.empty()) {
    uint16_t tag = 0;
    uint32_t length = 0;
    if (bytes.size() < sizeof(tag) + sizeof(length)) {
      *error = "launch file: cut off";
      return false;
    }
    Unpack(bytes, &tag);
    Unpack(bytes.substr(sizeof(tag)), &length);
    bytes.remove_prefix(sizeof(tag) + sizeof(length));
    if (length > bytes.size() || !Apply(tag, bytes.substr(0, length), launch)) {
      *error = "launch file: bad field " + std::to_string(tag);
      return false;
    }
    bytes.remove_prefix(length);
  }
  for (const RankLaunch& rank : launch->ranks) {
    if (rank.argv.empty()) {
      *error = "launch file: rank " + std::to_string(rank.rank) + " has no program";
      return false;
    }
  }
  if (launch->ranks.empty()) *error = "launch file: no ranks";
  return !launch->ranks.empty();
}

std::string EncodeShimIdentity(const ShimIdentity& identity) {
  return "pid " + std::to_string(identity.pid) + "\nstart " + std::to_string(identity.start_ticks) +
         "\ncgroup " + identity.cgroup + "\n";
}

bool DecodeShimIdentity(std::string_view text, ShimIdentity* identity) {
  *identity = ShimIdentity();
  while (!text.empty()) {
    const size_t end = text.find('\n');
    if (end == std::string_view::npos) return false;
    const std::string_view line = text.substr(0, end);
    text.remove_prefix(end + 1);
    const size_t space = line.find(' ');
    if (space == std::string_view::npos) return false;
    const std::string_view key = line.substr(0, space);
    const std::string_view value = line.substr(space + 1);
    const char* last = value.data() + value.size();
    if (key == "pid" && std::from_chars(value.data(), last, identity->pid).ptr != last)
      return false;
    if (key == "start" && std::from_chars(value.data(), last, identity->start_ticks).ptr != last) {
      return false;
    }
    if (key == "cgroup") identity->cgroup = value;
  }
  return identity->pid > 0;
}

uint64_t ProcessStartTicks(int pid) {
  std::string stat;
  if (!ReadWholeFile("/proc/" + std::to_string(pid) + "/stat", &stat)) return 0;
  // The name in parentheses may hold anything; fields are counted after the last ')'.
  size_t position = stat.rfind(')');
  if (position == std::string::npos) return 0;
  for (int field = 2; field < 22; ++field) {
    position = stat.find(' ', position + 1);
    if (position == std::string::npos) return 0;
  }
  uint64_t ticks = 0;
  std::from_chars(stat.data() + position + 1, stat.data() + stat.size(), ticks);
  return ticks;
}

bool ReadWholeFile(const std::string& path, std::string* bytes) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  bytes->clear();
  char buffer[16384];
  ssize_t count = 0;
  while ((count = read(fd, buffer, sizeof(buffer))) != 0) {
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) break;
    bytes->append(buffer, static_cast<size_t>(count));
  }
  const int error = errno;
  close(fd);
  errno = error;
  return count == 0;
}

bool SyncFolder(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (fd < 0) return false;
  const bool ok = fsync(fd) == 0;
  const int error = errno;
  close(fd);
  errno = error;
  return ok;
}

bool WriteFileDurably(const std::string& path, std::string_view bytes) {
  const std::string temporary = path + ".tmp";
  const int fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  if (fd < 0) return false;
  const bool written = WriteAll(fd, bytes) && fsync(fd) == 0;
  const int error = errno;
  close(fd);
  if (!written) {
    unlink(temporary.c_str());
    errno = error;
    return false;
  }
  if (rename(temporary.c_str(), path.c_str()) != 0) return false;
  const size_t slash = path.rfind('/');
  return SyncFolder(slash == std::string::npos ? "." : path.substr(0, slash));
}

}  // namespace heddle::control
