// Where the pages of an address are to come from, as the kernel says: mode and mask of nodes.
#pragma once

#include <linux/mempolicy.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <cerrno>

namespace heddle::test {

struct MemoryPolicy {
  int error = 0;  // ENOSYS or EPERM: it may not be asked here
  int mode = 0;
  unsigned long nodes = 0;  // the first 64
  // With one node, both do the same.
  bool Prefers(unsigned long wanted) const {
    return (mode == MPOL_PREFERRED_MANY || mode == MPOL_PREFERRED) && nodes == wanted;
  }
};

inline MemoryPolicy PolicyOf(void* address) {
  MemoryPolicy policy;
  std::array<unsigned long, 16> nodes = {};
  if (syscall(SYS_get_mempolicy, &policy.mode, nodes.data(), 8 * sizeof(nodes), address,
              MPOL_F_ADDR) != 0) {
    policy.error = errno;
  }
  policy.nodes = nodes[0];
  return policy;
}

// Whether policies may be set and asked for here.
inline bool PoliciesForbidden() {
  int here = 0;
  const int error = PolicyOf(&here).error;
  return error == ENOSYS || error == EPERM;
}

}  // namespace heddle::test
