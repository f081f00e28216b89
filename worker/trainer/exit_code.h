// Exit codes of a rank (control-plane 4.6). Part of the contract with coordinator and shim.
#pragma once

namespace heddle::trainer {

enum class ExitCode {
  kDone = 0,
  kFailed = 1,       // anything without a code of its own
  kStopped = 85,     // checkpointed and left on request
  kPeerFailed = 86,  // a collective failed: another rank is gone; never the root cause
  kStorage = 87,     // no checkpoint can be read or written
  kNumeric = 88,     // nan_policy halts
  kDeviceMemory = 89,
  kRollBack = 90,    // to an older checkpoint, without the data that broke the run
  kDoNotRetry = 93,  // configuration or data cannot work
  kFenced = 94,      // a newer attempt exists
};

}  // namespace heddle::trainer
