// Cleaning up when the user presses Ctrl-C: for verbs that started something which must not outlive
// them.
#pragma once

#include <signal.h>

#include <atomic>
#include <functional>
#include <thread>

namespace heddle::cli {

// While it lives, the first SIGINT, SIGTERM or SIGHUP runs `cleanup` on a thread of its own and
// ends the program with status 130; a second one during the cleanup ends it at once. Threads and
// children made meanwhile inherit a mask with these signals blocked. REQUIRES: one at a time, made
// on the main thread.
class OnInterrupt {
 public:
  explicit OnInterrupt(std::function<void()> cleanup);
  ~OnInterrupt();
  OnInterrupt(const OnInterrupt&) = delete;
  OnInterrupt& operator=(const OnInterrupt&) = delete;

 private:
  void Await();

  const std::function<void()> cleanup_;
  sigset_t signals_;
  sigset_t before_;
  std::atomic<bool> done_ = false;
  std::thread thread_;
};

}  // namespace heddle::cli
