#include "worker/daemon/cpu_table.h"

#include <algorithm>
#include <map>
#include <utility>

#include "base/status/status.h"
#include "worker/daemon/booking_file.h"

namespace heddle::worker {

CpuTable::CpuTable(std::string path, std::vector<uint32_t> granted,
                   const std::vector<numa::Node>& nodes)
    : path_(std::move(path)), granted_(std::move(granted)) {
  for (const numa::Node& node : nodes) {
    for (const uint32_t cpu : node.cpus) node_of_[cpu] = node.number;
  }
}

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
    cpus = Choose(use, count);
    for (const uint32_t cpu : cpus) {
      ++use[cpu];
      file.Add(Str(cpu), task_dir);
    }
  }
  if (!file.Write()) return std::vector<std::vector<uint32_t>>(ranks);
  return given;
}

int CpuTable::NodeOf(uint32_t cpu) const {
  const auto found = node_of_.find(cpu);
  return found == node_of_.end() ? -1 : found->second;
}

// Those that are used less than the last one that it takes are all chosen. The rest comes from the
// nodes that are in already, then from one that has enough, or the most.
std::vector<uint32_t> CpuTable::Choose(const std::map<uint32_t, int>& use, size_t count) const {
  std::vector<int> uses;
  for (const auto& [cpu, times] : use) uses.push_back(times);
  std::sort(uses.begin(), uses.end());
  const int last = uses[count - 1];
  std::vector<uint32_t> chosen;
  std::map<int, std::vector<uint32_t>> left;  // by node
  std::vector<int> order;                     // of nodes
  for (const auto& [cpu, times] : use) {
    const int node = NodeOf(cpu);
    if (times == last) left[node].push_back(cpu);
    if (times >= last) continue;
    chosen.push_back(cpu);
    order.push_back(node);
  }
  std::vector<int> fullest;
  for (const auto& [node, cpus] : left) fullest.push_back(node);
  std::stable_sort(fullest.begin(), fullest.end(),
                   [&](int a, int b) { return left[a].size() > left[b].size(); });
  order.insert(order.end(), fullest.begin(), fullest.end());
  for (const int node : order) {
    for (const uint32_t cpu : std::exchange(left[node], {})) {
      if (chosen.size() < count) chosen.push_back(cpu);
    }
  }
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

void CpuTable::Release(const std::string& task_dir) {
  BookingFile file(path_);
  if (!file.ok()) return;
  file.Drop(task_dir);
  (void)file.Write();  // a stale line falls out with its processes
}

}  // namespace heddle::worker
