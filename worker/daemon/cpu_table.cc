#include "worker/daemon/cpu_table.h"

#include <algorithm>
#include <map>

#include "base/status/status.h"
#include "worker/daemon/booking_file.h"

namespace heddle::worker {

CpuTable::CpuTable(std::string path, std::vector<uint32_t> granted)
    : path_(std::move(path)), granted_(std::move(granted)) {}

std::string CpuTable::DefaultPath() { return BookingFile::DefaultPath("cpus"); }

std::vector<std::vector<uint32_t>> CpuTable::Take(const std::string& task_dir, uint32_t ranks,
                                                  uint32_t count) {
  std::vector<std::vector<uint32_t>> given(ranks);
  if (count == 0 || granted_.empty() || count > granted_.size()) return given;
  BookingFile file(path_);
  if (!file.ok()) return given;
  std::map<std::string, int> held;
  for (const Booking& booking : file.bookings()) ++held[booking.part];
  std::map<uint32_t, int> use;
  for (const uint32_t cpu : granted_) use[cpu] = held[Str(cpu)];
  for (std::vector<uint32_t>& cpus : given) {
    std::vector<uint32_t> order = granted_;
    std::stable_sort(order.begin(), order.end(),
                     [&use](uint32_t a, uint32_t b) { return use[a] < use[b]; });
    cpus.assign(order.begin(), order.begin() + count);
    std::sort(cpus.begin(), cpus.end());
    for (const uint32_t cpu : cpus) {
      ++use[cpu];
      file.Add(Str(cpu), task_dir);
    }
  }
  if (!file.Write()) return std::vector<std::vector<uint32_t>>(ranks);
  return given;
}

void CpuTable::Release(const std::string& task_dir) {
  BookingFile file(path_);
  if (!file.ok()) return;
  file.Drop(task_dir);
  (void)file.Write();  // a stale line falls out with its processes
}

}  // namespace heddle::worker
