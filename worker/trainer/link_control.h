// RankControl over the control socket and the shared page that the shim gave this process.
#pragma once

#include <functional>
#include <memory>

#include "worker/trainer/rank_control.h"

namespace heddle::trainer {

// From HEDDLE_CONTROL, HEDDLE_FENCE, HEDDLE_RANK; the page is mapped when the RankSpec names it.
// `on_lost` runs on the link's thread when the shim is gone: the process is to end at once.
// FAILED_PRECONDITION outside a shim.
StatusOr<std::unique_ptr<RankControl>> ConnectToShim(std::function<void(const Status&)> on_lost);

}  // namespace heddle::trainer
