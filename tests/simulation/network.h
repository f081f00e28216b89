// The simulated network: delay, loss, duplicates and partitions by directed pair. Messages of one
// stream stay in order, as gRPC keeps them, and a stream that lost one for a partition is broken;
// RPCs, streams and sessions overtake each other.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include "tests/simulation/plan.h"
#include "tests/simulation/world.h"

namespace heddle::simulation {

inline constexpr char kCoordinator[] = "coordinator";

// One session's conversation. Both ends hold it; `broken` closes it for both.
struct Stream {
  std::string worker;
  uint64_t session = 0;
  uint64_t from_seq = 0;  // event of its registration: what was decided before goes to none
  int64_t up_ms = 0;      // last delivery, worker to coordinator
  int64_t down_ms = 0;
  bool broken = false;
  std::function<void()> on_break_up;    // at the coordinator
  std::function<void()> on_break_down;  // at the worker
};
using StreamPtr = std::shared_ptr<Stream>;

class Network {
 public:
  Network(World& world, const Plan& plan) : world_(world), plan_(plan) {}

  // Faults are off from now on.
  void Calm() {
    calm_ = true;
    blocked_.clear();
  }
  void Block(const std::string& from, const std::string& to) { blocked_[{from, to}]++; }
  void Unblock(const std::string& from, const std::string& to) {
    const auto it = blocked_.find({from, to});
    if (it != blocked_.end() && --it->second <= 0) {
      blocked_.erase(it);
    }
  }
  bool Blocked(const std::string& from, const std::string& to) const {
    return blocked_.contains({from, to});
  }

  // One message outside any stream: may be lost, late or doubled.
  void Send(const std::string& from, const std::string& to, const std::function<void()>& deliver) {
    if (Blocked(from, to) || Lost()) {
      return;
    }
    world_.After(Delay(), deliver);
    if (!calm_ && world_.Chance(plan_.duplicate)) {
      world_.After(Delay() + world_.Between(0, 5'000), deliver);
    }
  }

  // One message on a stream, in order.
  void SendOn(const StreamPtr& stream, bool up, const std::function<void()>& deliver) {
    if (stream->broken) {
      return;
    }
    const std::string& from = up ? stream->worker : kCoordinatorName;
    const std::string& to = up ? kCoordinatorName : stream->worker;
    if (Blocked(from, to)) {
      // The kernel repeats it for a while; the transport gives up in the end.
      world_.After(world_.Between(2'000, 15'000), [this, stream] { Break(stream, false); });
      return;
    }
    if (Lost()) {
      return;  // lost inside an end: a full queue, a bug
    }
    int64_t& last = up ? stream->up_ms : stream->down_ms;
    last = std::max(last, world_.now_ms() + Delay());
    const auto deliver_if_open = [stream, deliver] {
      if (!stream->broken) {
        deliver();
      }
    };
    world_.At(last, deliver_if_open);
    if (!calm_ && world_.Chance(plan_.duplicate)) {
      world_.At(last, deliver_if_open);
    }
  }

  // Both ends learn of it, each in its time.
  // With `told` false no word of it passes the network: the coordinator sees only silence.
  void Break(const StreamPtr& stream, bool told = true) {
    if (stream->broken) {
      return;
    }
    stream->broken = true;
    const bool heard = told && !Blocked(stream->worker, kCoordinatorName);
    world_.After(world_.Between(0, 50), [stream, heard] {
      if (stream->on_break_up && heard) stream->on_break_up();
    });
    world_.After(world_.Between(0, 50), [stream] {
      if (stream->on_break_down) stream->on_break_down();
    });
  }

 private:
  bool Lost() { return !calm_ && plan_.drop > 0 && world_.Chance(plan_.drop); }
  int64_t Delay() {
    if (!calm_ && plan_.slow_reply > 0 && world_.Chance(plan_.slow_reply)) {
      return world_.Between(0, plan_.slow_ms);
    }
    return world_.Between(0, calm_ ? 5 : plan_.delay_max_ms);
  }

  const std::string kCoordinatorName = kCoordinator;
  World& world_;
  const Plan& plan_;
  bool calm_ = false;
  std::map<std::pair<std::string, std::string>, int> blocked_;
};

}  // namespace heddle::simulation
