// Secret of an attempt's rendezvous (control-plane V3): a keyed hash of its fence, so that a rank
// of another attempt, or a stranger, cannot enter its ring. Internal to coordinator/state.
#pragma once

#include <cstdint>
#include <string>

#include "base/ids/ids.h"

namespace heddle::state {

// SipHash-2-4 of Aumasson and Bernstein ("SipHash: a fast short-input PRF", 2012). REQUIRES: key of
// 16 bytes.
uint64_t SipHash24(const std::string& key, const std::string& data);

// 16 bytes from the cluster's secret (any length) and the fence.
std::string AttemptSecret(const std::string& cluster_secret, Fence fence);

}  // namespace heddle::state
