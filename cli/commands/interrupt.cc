#include "cli/commands/interrupt.h"

#include <unistd.h>

#include <utility>

namespace heddle::cli {
namespace {

constexpr int kInterrupted = 130;
constexpr timespec kPoll = {.tv_sec = 0, .tv_nsec = 50'000'000};

}  // namespace

OnInterrupt::OnInterrupt(std::function<void()> cleanup) : cleanup_(std::move(cleanup)) {
  sigemptyset(&signals_);
  for (const int signal : {SIGINT, SIGTERM, SIGHUP}) {
    sigaddset(&signals_, signal);
  }
  pthread_sigmask(SIG_BLOCK, &signals_, &before_);
  thread_ = std::thread([this] { Await(); });
}

OnInterrupt::~OnInterrupt() {
  done_ = true;
  thread_.join();
  pthread_sigmask(SIG_SETMASK, &before_, nullptr);
}

void OnInterrupt::Await() {
  while (!done_) {
    if (sigtimedwait(&signals_, nullptr, &kPoll) > 0) {
      pthread_sigmask(SIG_UNBLOCK, &signals_, nullptr);
      cleanup_();
      _exit(kInterrupted);
    }
  }
}

}  // namespace heddle::cli
