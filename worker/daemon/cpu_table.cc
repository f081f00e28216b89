#include "worker/daemon/cpu_table.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <sstream>

#include "base/status/status.h"
#include "worker/control/task_files.h"

namespace heddle::worker {
namespace {

// One line: PID START_TICKS CPU TASK_DIR; the process is the daemon that booked it.
struct Booking {
  int pid = 0;
  uint64_t start_ticks = 0;
  uint32_t cpu = 0;
  std::string task_dir;
};

bool IsAlive(int pid, uint64_t start_ticks) {
  return start_ticks != 0 && control::ProcessStartTicks(pid) == start_ticks;
}

bool IsValid(const Booking& booking) {
  if (access(booking.task_dir.c_str(), F_OK) != 0) return false;
  if (IsAlive(booking.pid, booking.start_ticks)) return true;
  std::string text;
  control::ShimIdentity shim;
  return control::ReadWholeFile(booking.task_dir + "/shim", &text) &&
         control::DecodeShimIdentity(text, &shim) && IsAlive(shim.pid, shim.start_ticks);
}

// The file, locked while this lives.
class LockedTable {
 public:
  explicit LockedTable(const std::string& path)
      : path_(path), fd_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600)) {
    if (fd_ >= 0 && flock(fd_, LOCK_EX) != 0) {
      close(fd_);
      fd_ = -1;
    }
    std::string text;
    if (fd_ < 0 || !control::ReadWholeFile(path, &text)) return;
    std::istringstream lines(text);
    Booking booking;
    while (lines >> booking.pid >> booking.start_ticks >> booking.cpu >> std::ws &&
           std::getline(lines, booking.task_dir)) {
      if (IsValid(booking)) bookings.push_back(booking);
    }
  }
  ~LockedTable() {
    if (fd_ >= 0) close(fd_);
  }
  LockedTable(const LockedTable&) = delete;
  LockedTable& operator=(const LockedTable&) = delete;

  bool ok() const { return fd_ >= 0; }
  bool Write() {
    std::string text;
    for (const Booking& one : bookings) {
      text += Str(one.pid, " ", one.start_ticks, " ", one.cpu, " ", one.task_dir, "\n");
    }
    return ftruncate(fd_, 0) == 0 &&
           pwrite(fd_, text.data(), text.size(), 0) == static_cast<ssize_t>(text.size());
  }

  std::vector<Booking> bookings;

 private:
  std::string path_;
  int fd_;
};

}  // namespace

CpuTable::CpuTable(std::string path, std::vector<uint32_t> granted)
    : path_(std::move(path)), granted_(std::move(granted)) {}

std::string CpuTable::DefaultPath() {
  const char* base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
  return Str(base, "/heddle-cpus-", geteuid());
}

std::vector<std::vector<uint32_t>> CpuTable::Take(const std::string& task_dir, uint32_t ranks,
                                                  uint32_t count) {
  std::vector<std::vector<uint32_t>> given(ranks);
  if (count == 0 || granted_.empty() || count > granted_.size()) return given;
  LockedTable table(path_);
  if (!table.ok()) return given;
  std::map<uint32_t, int> use;
  for (const uint32_t cpu : granted_) use[cpu] = 0;
  for (const Booking& booking : table.bookings) {
    if (use.contains(booking.cpu)) ++use[booking.cpu];
  }
  const int pid = getpid();
  const uint64_t start_ticks = control::ProcessStartTicks(pid);
  for (std::vector<uint32_t>& cpus : given) {
    std::vector<uint32_t> order = granted_;
    std::stable_sort(order.begin(), order.end(),
                     [&use](uint32_t a, uint32_t b) { return use[a] < use[b]; });
    cpus.assign(order.begin(), order.begin() + count);
    std::sort(cpus.begin(), cpus.end());
    for (const uint32_t cpu : cpus) {
      ++use[cpu];
      table.bookings.push_back({pid, start_ticks, cpu, task_dir});
    }
  }
  if (!table.Write()) return std::vector<std::vector<uint32_t>>(ranks);
  return given;
}

void CpuTable::Release(const std::string& task_dir) {
  LockedTable table(path_);
  if (!table.ok()) return;
  std::erase_if(table.bookings,
                [&task_dir](const Booking& booking) { return booking.task_dir == task_dir; });
  (void)table.Write();  // a stale line falls out with its processes
}

}  // namespace heddle::worker
