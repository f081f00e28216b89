// The life of a rank, from HELLO to its last words (control-plane 4.3, 10, 11).
#pragma once

#include <cstdint>

#include "base/clock/clock.h"
#include "heddle/v1/control.pb.h"
#include "worker/trainer/rank_control.h"

namespace heddle::trainer {

// Runs the whole life and returns its last words; `code` is the exit status, with which the process
// is to end at once. Never throws. A code other than 0: every process group is aborted first, and
// the rank's parts stay as they are, for they may wait for peers that are gone.
heddle::v1::RankExit RunRank(RankControl* control, const Clock& clock, int64_t started_at_ms);

}  // namespace heddle::trainer
