#include "worker/daemon/task_folder.h"

#include <dirent.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "base/log/log.h"

namespace heddle::worker {
namespace {

namespace fs = std::filesystem;

constexpr int kEndLooksMax = 200;
constexpr int kEndLookMs = 10;

// Of a file that could not be made or mapped; errno says why.
Status MapFailed(const std::string& path) {
  if (errno == ENOSPC || errno == EDQUOT) {
    return ResourceExhausted(Str("cannot make ", path,
                                 ": the disk of the worker's state folder is ", "full (",
                                 strerrorname_np(errno), "); free some space there"));
  }
  return FromErrno("map", path);
}

Status WritePlain(const std::string& path, const std::string& bytes) {
  const int fd = open(path.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd < 0) return FromErrno("create", path);
  const ssize_t count = write(fd, bytes.data(), bytes.size());
  const int error = count < 0 ? errno : ENOSPC;
  close(fd);
  if (count != static_cast<ssize_t>(bytes.size())) return FromErrno("write", path, error);
  return OkStatus();
}

Status MakeFolder(const std::string& path) {
  if (mkdir(path.c_str(), 0700) != 0) return FromErrno("make folder", path);
  return OkStatus();
}

Status SyncPath(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return FromErrno("open", path);
  const bool ok = fsync(fd) == 0;
  Status status = ok ? OkStatus() : FromErrno("sync", path);
  close(fd);
  return status;
}

std::optional<control::ShimIdentity> ReadShim(const std::string& path) {
  std::string text;
  control::ShimIdentity identity;
  if (!control::ReadWholeFile(path + "/shim", &text) ||
      !control::DecodeShimIdentity(text, &identity)) {
    return std::nullopt;
  }
  return identity;
}

bool IsAlive(const control::ShimIdentity& shim) {
  return shim.start_ticks != 0 && control::ProcessStartTicks(shim.pid) == shim.start_ticks;
}

bool HasVariable(const std::string& environment, const std::string& variable) {
  size_t at = 0;
  while (at < environment.size()) {
    const size_t end = std::min(environment.find('\0', at), environment.size());
    if (environment.compare(at, end - at, variable) == 0) return true;
    at = end + 1;
  }
  return false;
}

}  // namespace

std::string ToText(const TaskKey& key) { return Str(key.fence, "-", key.task); }

StatusOr<TaskFolder> TaskFolder::Create(const std::string& tasks_dir,
                                        const v1::TaskAssignment& assignment, const Origin& origin,
                                        int64_t max_orphan_ns) {
  TaskFolder folder;
  folder.assignment_ = assignment;
  folder.origin_ = origin;
  folder.path_ = Str(tasks_dir, "/", ToText(folder.key()));
  RETURN_IF_ERROR(MakeFolder(folder.path_));
  RETURN_IF_ERROR(MakeFolder(folder.path_ + "/logs"));
  RETURN_IF_ERROR(MakeFolder(folder.path_ + "/scratch"));
  RETURN_IF_ERROR(folder.MapShared(/*create=*/true, max_orphan_ns));
  RETURN_IF_ERROR(WritePlain(folder.path_ + "/checkpoint_root", origin.checkpoint_root));
  RETURN_IF_ERROR(WritePlain(folder.path_ + "/instance", origin.instance));
  // The spec is last: a folder without one was never whole.
  RETURN_IF_ERROR(WritePlain(folder.path_ + "/spec", assignment.SerializeAsString()));
  return folder;
}

StatusOr<TaskFolder> TaskFolder::Open(const std::string& path) {
  TaskFolder folder;
  folder.path_ = path;
  std::string bytes;
  if (!control::ReadWholeFile(path + "/spec", &bytes)) return FromErrno("read", path + "/spec");
  if (!folder.assignment_.ParseFromString(bytes) || folder.assignment_.ranks().empty()) {
    return DataLoss(Str(path, "/spec: not a task"));
  }
  const std::pair<const char*, std::string*> texts[] = {
      {"/checkpoint_root", &folder.origin_.checkpoint_root},
      {"/instance", &folder.origin_.instance}};
  for (const auto& [name, text] : texts) {
    if (!control::ReadWholeFile(path + name, text)) return FromErrno("read", path + name);
  }
  RETURN_IF_ERROR(folder.MapShared(/*create=*/false, 0));
  return folder;
}

Status TaskFolder::MapShared(bool create, int64_t max_orphan_ns) {
  for (const uint32_t rank : assignment_.ranks()) {
    const std::string page = PagePath(rank);
    pages_.push_back(create ? control::RankPage::Create(page) : control::RankPage::Open(page));
    if (pages_.back() == nullptr) return MapFailed(page);
  }
  const std::string contact = path_ + "/contact";
  contact_ = create ? control::ContactFile::Create(contact, max_orphan_ns)
                    : control::ContactFile::Open(contact);
  if (contact_ == nullptr) return MapFailed(contact);
  return OkStatus();
}

std::vector<std::string> TaskFolder::List(const std::string& tasks_dir) {
  std::vector<std::string> paths;
  std::error_code error;
  for (const fs::directory_entry& entry : fs::directory_iterator(tasks_dir, error)) {
    if (entry.is_directory(error)) paths.push_back(entry.path().string());
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

std::string TaskFolder::PagePath(uint32_t rank) const { return Str(path_, "/page-", rank); }
std::string TaskFolder::LogPath(uint32_t rank) const {
  return Str(path_, "/logs/rank-", rank, ".log");
}
std::string TaskFolder::LogLossPath(uint32_t rank) const {
  return Str(path_, "/logs/rank-", rank, ".lost");
}

Status TaskFolder::WriteLaunch(const control::LaunchFile& launch) const {
  // Left by a daemon that died before the shim read it.
  unlink((path_ + "/launch").c_str());
  return WritePlain(path_ + "/launch", control::EncodeLaunch(launch));
}

Status TaskFolder::Sync(const std::string& path) {
  for (const char* file : {"/spec", "/launch", "/checkpoint_root", "/instance", "/contact", ""}) {
    RETURN_IF_ERROR(SyncPath(path + file));
  }
  return SyncPath(path.substr(0, path.rfind('/')));
}

std::optional<control::ShimIdentity> TaskFolder::Shim() const { return ReadShim(path_); }

bool TaskFolder::ShimIsAlive() const {
  const std::optional<control::ShimIdentity> shim = Shim();
  return shim.has_value() && IsAlive(*shim);
}

bool TaskFolder::ForbidShim() const {
  // A shim begins by linking this name, which fails where it exists.
  const int fd = open((path_ + "/shim").c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
  if (fd >= 0) close(fd);
  return fd >= 0 || errno != EEXIST;
}

void TaskFolder::EndProcesses(const std::string& path) {
  const std::optional<control::ShimIdentity> shim = ReadShim(path);
  if (!shim.has_value()) return;
  if (IsAlive(*shim)) kill(shim->pid, SIGKILL);
  for (int i = 0; i < kEndLooksMax && KillLeftovers(path, shim->cgroup) > 0; ++i) {
    poll(nullptr, 0, kEndLookMs);
  }
}

std::vector<control::Frame> TaskFolder::ExitFrames() const {
  std::vector<control::Frame> frames;
  std::string bytes;
  if (!control::ReadWholeFile(path_ + "/exit", &bytes)) return frames;
  control::FrameReader reader;
  reader.Append(bytes);
  control::Frame frame;
  while (reader.Next(&frame) == control::FrameReader::Result::kFrame) frames.push_back(frame);
  return frames;
}

uint64_t TaskFolder::LoadSeq() const {
  std::string text;
  uint64_t seq = 0;
  if (control::ReadWholeFile(path_ + "/seq", &text)) {
    std::from_chars(text.data(), text.data() + text.size(), seq);
  }
  return seq;
}

void TaskFolder::StoreSeq(uint64_t seq) const {
  const int fd = open((path_ + "/seq").c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  if (fd < 0) return;
  // Fixed width: a number never gets shorter, so an overwrite is whole.
  char text[32];
  const int size = snprintf(text, sizeof(text), "%020llu\n", static_cast<unsigned long long>(seq));
  if (pwrite(fd, text, static_cast<size_t>(size), 0) != size) {
    HEDDLE_WARN("report number not stored", {"task", path_});
  }
  close(fd);
}

void TaskFolder::MarkForgotten() const {
  const int fd = open((path_ + "/forgotten").c_str(), O_WRONLY | O_CREAT | O_CLOEXEC, 0600);
  if (fd >= 0) close(fd);
}

bool TaskFolder::IsForgotten() const { return access((path_ + "/forgotten").c_str(), F_OK) == 0; }

void TaskFolder::Remove(const std::string& path) {
  std::error_code error;
  fs::remove_all(path, error);
  if (error) HEDDLE_WARN("task folder not removed", {"task", path}, {"error", error.message()});
}

int KillLeftovers(const std::string& task_dir, const std::string& cgroup) {
  int killed = 0;
  const std::string mark = Str("HEDDLE_TASK_DIR=", task_dir);
  DIR* proc = opendir("/proc");
  if (proc == nullptr) return 0;
  while (const dirent* entry = readdir(proc)) {
    pid_t pid = 0;
    std::from_chars(entry->d_name, entry->d_name + strlen(entry->d_name), pid);
    std::string environment;
    if (pid <= 1 || pid == getpid() ||
        !control::ReadWholeFile(Str("/proc/", pid, "/environ"), &environment)) {
      continue;
    }
    if (HasVariable(environment, mark) && kill(pid, SIGKILL) == 0) ++killed;
  }
  closedir(proc);
  std::string procs;
  if (!cgroup.empty() && control::ReadWholeFile(cgroup + "/cgroup.procs", &procs)) {
    const char* at = procs.data();
    const char* const end = at + procs.size();
    while (at < end) {
      int pid = 0;
      const std::from_chars_result parsed = std::from_chars(at, end, pid);
      if (parsed.ec == std::errc() && pid > 1 && kill(pid, SIGKILL) == 0) ++killed;
      at = parsed.ptr + 1;
    }
    rmdir(cgroup.c_str());
  }
  return killed;
}

}  // namespace heddle::worker
