// Who was given which part of this machine (a core, a GPU): one file for all daemons of the user,
// since two workers of one host (`heddle up`) know nothing of each other.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace heddle::worker {

// One line: PID START_TICKS PART TASK_DIR; the process is the daemon that booked it.
struct Booking {
  int pid = 0;
  uint64_t start_ticks = 0;
  std::string part;  // without blanks
  std::string task_dir;
};

// The file, locked while this lives. Holds the bookings whose task folder is there and whose daemon
// or shim still lives: those of a killed daemon stay as long as its tasks run.
class BookingFile {
 public:
  explicit BookingFile(const std::string& path);
  ~BookingFile();
  BookingFile(const BookingFile&) = delete;
  BookingFile& operator=(const BookingFile&) = delete;

  bool ok() const { return fd_ >= 0; }
  const std::vector<Booking>& bookings() const { return bookings_; }
  // For this process.
  void Add(const std::string& part, const std::string& task_dir);
  void Drop(const std::string& task_dir);
  bool Write();

  // /dev/shm/heddle-KIND-UID, or in /tmp.
  static std::string DefaultPath(const std::string& kind);

 private:
  int fd_;
  std::vector<Booking> bookings_;
};

}  // namespace heddle::worker
