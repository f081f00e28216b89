// The simulated world (control-plane M1): one thread, a virtual clock that jumps to the next timer,
// randomness from one seed, a trace hash, and the list of violations. Nothing here reads a clock.
#pragma once

#include <cstdint>
#include <functional>
#include <queue>
#include <string>
#include <vector>

#include "base/rng/rng.h"
#include "base/status/status.h"

namespace heddle::simulation {

class World {
 public:
  explicit World(uint64_t seed) : rng_(Rng(seed, "simulation")) {}
  World(const World&) = delete;
  World& operator=(const World&) = delete;

  int64_t now_ms() const { return now_ms_; }
  void At(int64_t at_ms, std::function<void()> run) {
    queue_.push({at_ms < now_ms_ ? now_ms_ : at_ms, next_++, std::move(run)});
  }
  void After(int64_t delay_ms, std::function<void()> run) {
    At(now_ms_ + delay_ms, std::move(run));
  }
  // Runs the next event; false if there is none or a violation was found.
  bool Step() {
    if (queue_.empty() || !violations_.empty()) {
      return false;
    }
    std::function<void()> run = std::move(const_cast<Item&>(queue_.top()).run);
    now_ms_ = queue_.top().at_ms;
    queue_.pop();
    ++steps_;
    run();
    return true;
  }

  bool Chance(double probability) { return rng_.Uniform() < probability; }
  int64_t Between(int64_t low, int64_t high) {
    return low + static_cast<int64_t>(rng_.Below(static_cast<uint64_t>(high - low + 1)));
  }

  void Trace(const std::string& text) {
    for (const char c : text) {
      hash_ = (hash_ ^ static_cast<unsigned char>(c)) * 0x100000001b3;
    }
    hash_ = (hash_ ^ static_cast<uint64_t>(now_ms_)) * 0x100000001b3;
    if (verbose_) {
      log_(Str(now_ms_, " ", text));
    }
  }
  void Violate(const std::string& rule, const std::string& text) {
    violations_.push_back(Str("at ", now_ms_, " ms: ", rule, ": ", text));
    if (verbose_) {
      log_(violations_.back());
    }
  }
  void SetLog(std::function<void(const std::string&)> log) {
    verbose_ = true;
    log_ = std::move(log);
  }

  uint64_t hash() const { return hash_; }
  uint64_t steps() const { return steps_; }
  const std::vector<std::string>& violations() const { return violations_; }

 private:
  struct Item {
    int64_t at_ms;
    uint64_t order;
    std::function<void()> run;
    bool operator<(const Item& other) const {
      return at_ms != other.at_ms ? at_ms > other.at_ms : order > other.order;
    }
  };
  RngCursor rng_;
  int64_t now_ms_ = 1'000'000;
  uint64_t next_ = 0;
  uint64_t steps_ = 0;
  uint64_t hash_ = 0xcbf29ce484222325;
  bool verbose_ = false;
  std::function<void(const std::string&)> log_;
  std::priority_queue<Item> queue_;
  std::vector<std::string> violations_;
};

}  // namespace heddle::simulation
