// A whole coordinator with its journal on disk, and workers that are only messages: from queued to
// assigned. What is left out of the real way is gRPC.
#pragma once

#include <cstdint>
#include <string>

#include "base/status/status.h"

namespace heddle::bench {

struct PlacementLoad {
  std::string dir;  // empty: where the coordinator keeps its state
  uint64_t nodes = 0;
  uint64_t gangs = 0;  // all queued before the first node joins
  uint64_t shapes = 0;
  uint64_t seconds = 0;  // at most, from then on
  int64_t life_ms = 0;   // from start to end of a gang; 0: it does not end
};

// A gang counts as assigned when the last of its tasks reached its worker. Workers register, beat
// every two seconds and report every state of their tasks. Prints one JSON line: seconds from the
// first node on at which every hundredth gang was assigned, and the coordinator's own figures.
Status PlaceAll(const PlacementLoad& load);

}  // namespace heddle::bench
