#include "worker/control/stack_dump.h"

#include <execinfo.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

#include "worker/control/rank_page.h"

namespace heddle::control {
namespace {

// A signal handler has no other way to find it.
std::atomic<RankPage*> g_page = nullptr;

void OnSignal(int) {
  const int saved = errno;
  RankPage* const page = g_page.load(std::memory_order_acquire);
  if (page != nullptr) {
    void* frames[kStackFrames];
    const int count = backtrace(frames, static_cast<int>(kStackFrames));
    page->AddStack(static_cast<uint32_t>(syscall(SYS_gettid)), frames,
                   count > 0 ? static_cast<size_t>(count) : 0);
  }
  errno = saved;
}

}  // namespace

void DumpStacksOnSignal(RankPage* page) {
  // The first call loads the unwinder, which allocates; in a handler it must be there already.
  void* frame = nullptr;
  backtrace(&frame, 1);
  g_page.store(page, std::memory_order_release);
  struct sigaction action = {};
  action.sa_handler = OnSignal;
  action.sa_flags = SA_RESTART;
  sigfillset(&action.sa_mask);
  if (sigaction(SIGUSR2, &action, nullptr) == 0) page->AllowStackSignal();
}

}  // namespace heddle::control
