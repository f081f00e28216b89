#include "worker/daemon/booking_file.h"

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

#include <sstream>

#include "base/status/status.h"
#include "worker/control/task_files.h"

namespace heddle::worker {
namespace {

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

}  // namespace

BookingFile::BookingFile(const std::string& path)
    : fd_(open(path.c_str(), O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW, 0600)) {
  if (fd_ >= 0 && flock(fd_, LOCK_EX) != 0) {
    close(fd_);
    fd_ = -1;
  }
  std::string text;
  if (fd_ < 0 || !control::ReadWholeFile(path, &text)) return;
  std::istringstream lines(text);
  Booking booking;
  while (lines >> booking.pid >> booking.start_ticks >> booking.part >> std::ws &&
         std::getline(lines, booking.task_dir)) {
    if (IsValid(booking)) bookings_.push_back(booking);
  }
}

BookingFile::~BookingFile() {
  if (fd_ >= 0) close(fd_);
}

void BookingFile::Add(const std::string& part, const std::string& task_dir) {
  const int pid = getpid();
  bookings_.push_back({pid, control::ProcessStartTicks(pid), part, task_dir});
}

void BookingFile::Drop(const std::string& task_dir) {
  std::erase_if(bookings_,
                [&task_dir](const Booking& booking) { return booking.task_dir == task_dir; });
}

bool BookingFile::Write() {
  std::string text;
  for (const Booking& one : bookings_) {
    text += Str(one.pid, " ", one.start_ticks, " ", one.part, " ", one.task_dir, "\n");
  }
  // Cut last: whoever ends in between, or has no room, leaves what was booked before.
  return pwrite(fd_, text.data(), text.size(), 0) == static_cast<ssize_t>(text.size()) &&
         ftruncate(fd_, static_cast<off_t>(text.size())) == 0;
}

std::string BookingFile::DefaultPath(const std::string& kind) {
  const char* base = access("/dev/shm", W_OK) == 0 ? "/dev/shm" : "/tmp";
  return Str(base, "/heddle-", kind, "-", geteuid());
}

}  // namespace heddle::worker
