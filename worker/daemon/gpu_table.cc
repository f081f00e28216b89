#include "worker/daemon/gpu_table.h"

#include <algorithm>
#include <set>

#include "worker/daemon/booking_file.h"

namespace heddle::worker {
namespace {

// Our devices that nobody holds, those at `indices` first.
std::vector<GpuDevice> Free(const std::vector<GpuDevice>& devices, const BookingFile& file,
                            const std::vector<int32_t>& indices) {
  std::set<std::string> held;
  for (const Booking& booking : file.bookings()) held.insert(booking.part);
  std::vector<GpuDevice> free;
  const auto add = [&](const GpuDevice& device) {
    if (held.insert(device.id).second) free.push_back(device);
  };
  for (const int32_t index : indices) {
    const size_t place = static_cast<size_t>(index);
    if (index >= 0 && place < devices.size()) add(devices[place]);
  }
  for (const GpuDevice& device : devices) add(device);
  return free;
}

}  // namespace

GpuTable::GpuTable(std::string path, std::vector<GpuDevice> devices)
    : path_(std::move(path)), devices_(std::move(devices)) {}

std::string GpuTable::DefaultPath() { return BookingFile::DefaultPath("gpus"); }

StatusOr<std::vector<std::vector<std::string>>> GpuTable::Take(
    const std::string& task_dir, size_t ranks, const std::vector<int32_t>& indices) {
  std::vector<std::vector<std::string>> given(ranks);
  if (indices.empty()) return given;
  if (ranks == 0 || indices.size() % ranks != 0) {
    return InvalidArgument(Str(indices.size(), " GPUs cannot be shared out to ", ranks, " ranks"));
  }
  BookingFile file(path_);
  if (!file.ok()) return Unavailable(Str("the table of GPUs ", path_, " cannot be opened"));
  file.Drop(task_dir);
  const std::vector<GpuDevice> free = Free(devices_, file, indices);
  if (free.size() < indices.size()) {
    return ResourceExhausted(Str(indices.size(), " GPUs assigned, ", free.size(), " of the ",
                                 devices_.size(), " of this worker are free"));
  }
  for (size_t i = 0; i < indices.size(); ++i) {
    given[i / (indices.size() / ranks)].push_back(free[i].name);
    file.Add(free[i].id, task_dir);
  }
  if (!file.Write()) return Unavailable(Str("the table of GPUs ", path_, " cannot be written"));
  return given;
}

void GpuTable::Release(const std::string& task_dir) {
  if (devices_.empty()) return;
  BookingFile file(path_);
  if (!file.ok()) return;
  file.Drop(task_dir);
  (void)file.Write();  // a stale line falls out with its processes
}

}  // namespace heddle::worker
