// Memory nodes of a machine (NUMA): which CPUs are near which memory, and where a range of memory
// is to lie. Everything here is for speed only: what is not known or not allowed is left as it is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "base/status/status.h"

namespace heddle::numa {

struct Node {
  int number = 0;
  std::vector<uint32_t> cpus;  // ascending; some nodes have only memory
  bool has_memory = true;
};

// The nodes that a folder as /sys/devices/system/node tells of, by number; empty where there is
// none.
std::vector<Node> ReadNodes(const std::string& folder = "/sys/devices/system/node");

// Numbers of the nodes whose memory is nearest to these CPUs; empty where it makes no difference:
// one node, or CPUs of every node that has some.
std::vector<int> NodesNear(std::span<const Node> nodes, std::span<const uint32_t> cpus);

// The same for the CPUs that this thread may run on.
std::vector<int> OwnNodes();

// The pages of a range that are not there yet come from these nodes as long as those have some,
// then from others (MPOL_PREFERRED_MANY; before Linux 5.15 MPOL_PREFERRED, of several nodes
// MPOL_INTERLEAVE). Nodes that this process may not use do not count. REQUIRES: whole pages, at
// least one node. Errors by errno: UNIMPLEMENTED or PERMISSION_DENIED where containers forbid it,
// INVALID_ARGUMENT for several nodes of which none may be used.
Status BindMemory(std::span<std::byte> range, std::span<const int> nodes);

// Binds one range after the other to the same nodes. The first refusal is said at debug level and
// is the last try.
class Binding {
 public:
  // Without nodes nothing is bound.
  explicit Binding(std::vector<int> nodes = {}) : nodes_(std::move(nodes)) {}
  void Bind(std::span<std::byte> range);

 private:
  std::vector<int> nodes_;
};

}  // namespace heddle::numa
