// The c10d store of running attempts (control-plane section 11): keys scoped by fence, waits with
// deadlines, repeats answered from what was answered before. Values live in memory and, unsynced,
// in family `rdzv`, so a killed coordinator finds them again. State thread only.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "base/ids/ids.h"
#include "coordinator/store/state_log.h"
#include "heddle/v1/control.pb.h"

namespace heddle::runtime {

class Rendezvous {
 public:
  using Reply = std::function<void(const v1::RendezvousReply&)>;
  static constexpr size_t kValueBytesMax = size_t{1} << 20;
  static constexpr size_t kAttemptBytesMax = size_t{64} << 20;
  static constexpr int64_t kAnswersPerRankMax = 1024;

  // Reads what a former process kept of `alive` fences and drops the rest.
  void Load(store::StateLog* log, const std::function<bool(Fence)>& alive);

  // Answers once the change is written, or when the keys are there, or with DEADLINE_EXCEEDED at
  // the request's time-out.
  void Handle(Fence fence, uint32_t rank, const v1::RendezvousRequest& request, int64_t now_ms,
              Reply reply);
  // The attempt ended: keys go, waiters get ABORTED.
  void Drop(Fence fence);
  // Ends waits whose time is over.
  void Expire(int64_t now_ms);
  // Earliest deadline of a wait; INT64_MAX without one.
  int64_t NextMs() const;

 private:
  struct Waiter {
    uint32_t rank = 0;
    v1::RendezvousRequest request;
    int64_t deadline_ms = 0;
    Reply reply;
  };
  struct Space {
    std::map<std::string, std::string> values;
    size_t bytes = 0;
    // Answers to changes by (rank, n), for repeats after a broken stream.
    std::map<std::pair<uint32_t, uint64_t>, v1::RendezvousReply> answered;
    std::vector<Waiter> waiters;
  };

  bool Ready(const Space& space, const v1::RendezvousRequest& request) const;
  // What it changes goes into `batch` too.
  v1::RendezvousReply Answer(Fence fence, Space& space, const v1::RendezvousRequest& request,
                             store::Batch* batch);
  void Set(Fence fence, Space& space, const std::string& key, const std::string& value,
           store::Batch* batch);
  void Wake(Fence fence, Space& space);
  static void Remember(Space& space, uint32_t rank, const v1::RendezvousReply& answer);

  store::StateLog* log_ = nullptr;
  std::map<uint64_t, Space> spaces_;  // by fence
};

}  // namespace heddle::runtime
