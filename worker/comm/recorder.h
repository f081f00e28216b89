// Writes every collective into the ring of the rank's shared page (training-runtime.md 17.1), where
// the daemon reads it without this rank's help, also when it hangs or is dead: the rank that is
// behind, or at another operation than its peers, is named.
#pragma once

#include <memory>

#include "worker/comm/communicator.h"

namespace heddle::control {
class RankPage;
}

namespace heddle::comm {

enum class CollectiveOp : uint16_t {
  kAllReduceFloat = 1,
  kAllReduceDouble = 2,
  kAllGather = 3,  // count is bytes
  kReduceScatterFloat = 4,
  kReduceScatterBf16 = 5,
  kAllToAll = 6  // count is the bytes that this rank sends
};

// `group` with every call noted under the number `group_id`. seq counts calls from 1; ranks whose
// entries of one seq have another fingerprint do different things. `page` is borrowed.
std::unique_ptr<Communicator> MakeRecorded(std::unique_ptr<Communicator> group, uint32_t group_id,
                                           control::RankPage* page);

}  // namespace heddle::comm
