// The last resort of killing (X6): everything that descends from this process. As a subreaper the
// shim inherits whatever a rank's children leave behind, so nothing escapes by daemonizing.
#pragma once

#include <sys/types.h>

#include <vector>

namespace heddle::shim {

// Every process whose chain of parents leads to `root`, `root` excluded. Racy by nature: call again
// until nothing is left.
std::vector<pid_t> Descendants(pid_t root);

}  // namespace heddle::shim
