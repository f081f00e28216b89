#include "base/numa/numa.h"

#include <linux/mempolicy.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <fstream>
#include <optional>

#include "base/log/log.h"

namespace heddle::numa {
namespace {

constexpr size_t kNodesMost = 1024;  // of Linux on x86-64
constexpr size_t kWordBits = 8 * sizeof(unsigned long);
constexpr uint32_t kNumbersMost = 1 << 16;

// "0-3,8": a list of the kernel. None: it is no such list.
std::optional<std::vector<uint32_t>> ParseList(std::string_view text) {
  std::vector<uint32_t> numbers;
  const char* at = text.data();
  const char* const end = at + text.size();
  const auto read = [&](uint32_t* number) {
    const auto [next, error] = std::from_chars(at, end, *number);
    at = next;
    return error == std::errc() && *number < kNumbersMost;
  };
  while (at != end) {
    uint32_t first = 0;
    if (!read(&first)) return std::nullopt;
    uint32_t last = first;
    if (at != end && *at == '-') {
      ++at;
      if (!read(&last)) return std::nullopt;
    }
    for (uint32_t number = first; number <= last; ++number) numbers.push_back(number);
    if (at == end) break;
    if (*at++ != ',') return std::nullopt;
  }
  return numbers;
}

std::optional<std::vector<uint32_t>> ReadList(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  if (!file) return std::nullopt;
  std::getline(file, line);  // an empty list is an empty line
  return ParseList(line);
}

bool Contains(std::span<const uint32_t> numbers, uint32_t number) {
  return std::ranges::find(numbers, number) != numbers.end();
}

bool HasOneOf(std::span<const uint32_t> cpus, std::span<const uint32_t> wanted) {
  return std::ranges::any_of(cpus, [&](uint32_t cpu) { return Contains(wanted, cpu); });
}

}  // namespace

std::vector<Node> ReadNodes(const std::string& folder) {
  std::vector<Node> nodes;
  const auto numbers = ReadList(folder + "/online");
  if (!numbers) return nodes;
  const auto with_memory = ReadList(folder + "/has_memory");
  for (const uint32_t number : *numbers) {
    auto cpus = ReadList(Str(folder, "/node", number, "/cpulist"));
    if (!cpus) return {};
    nodes.push_back({.number = static_cast<int>(number),
                     .cpus = *std::move(cpus),
                     .has_memory = !with_memory || Contains(*with_memory, number)});
  }
  return nodes;
}

std::vector<int> NodesNear(std::span<const Node> nodes, std::span<const uint32_t> cpus) {
  std::vector<int> near;
  bool all = true;
  for (const Node& node : nodes) {
    if (node.cpus.empty()) continue;
    if (!HasOneOf(node.cpus, cpus)) {
      all = false;
    } else if (node.has_memory) {
      near.push_back(node.number);
    }
  }
  return all ? std::vector<int>() : near;
}

std::vector<int> OwnNodes() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof(set), &set) != 0) return {};
  std::vector<uint32_t> cpus;
  for (uint32_t cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (CPU_ISSET(cpu, &set)) cpus.push_back(cpu);
  }
  return NodesNear(ReadNodes(), cpus);
}

Status BindMemory(std::span<std::byte> range, std::span<const int> nodes) {
  std::vector<unsigned long> mask(kNodesMost / kWordBits);
  for (const int node : nodes) {
    if (node < 0 || static_cast<size_t>(node) >= kNodesMost) {
      return InvalidArgument(Str("memory node ", node));
    }
    const auto bit = static_cast<size_t>(node);
    mask[bit / kWordBits] |= 1UL << (bit % kWordBits);
  }
  const auto bind = [&](int mode) {
    return syscall(SYS_mbind, range.data(), range.size(), mode, mask.data(), kNodesMost, 0);
  };
  if (bind(MPOL_PREFERRED_MANY) == 0) return OkStatus();
  // A kernel that does not know the mode.
  if (errno == EINVAL && bind(nodes.size() == 1 ? MPOL_PREFERRED : MPOL_INTERLEAVE) == 0) {
    return OkStatus();
  }
  return FromErrno("mbind");
}

void Binding::Bind(std::span<std::byte> range) {
  if (nodes_.empty()) return;
  const Status bound = BindMemory(range, nodes_);
  if (bound.ok()) return;
  HEDDLE_DEBUG("memory is not bound to its node", {"node", nodes_.front()},
               {"why", Message(bound)});
  nodes_.clear();
}

}  // namespace heddle::numa
