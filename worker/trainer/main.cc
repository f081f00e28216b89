// heddle-trainer: one rank of an attempt. Started by heddle-shim, which gives it the control
// socket; everything else comes over it. Exit codes: exit_code.h.
#include <malloc.h>
#include <unistd.h>

#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <string_view>

#include "base/clock/clock.h"
#include "base/log/log.h"
#include "worker/trainer/exit_code.h"
#include "worker/trainer/link_control.h"
#include "worker/trainer/run_rank.h"
#include "worker/trainer/threads.h"

namespace {

using heddle::Status;
using heddle::StatusOr;
using heddle::trainer::ExitCode;
using heddle::trainer::RankControl;

// By default glibc moves its threshold for memory of its own up to 32 MiB as large blocks come and
// go. Large temporaries then lie between buffers that stay, and what they leave are holes: 10 % of
// the peak, which no plan knows. Fixed, freed blocks of 4 MiB and more are the kernel's again.
void BoundFragmentation() {
  mallopt(M_MMAP_THRESHOLD, 4 << 20);
  mallopt(M_TRIM_THRESHOLD, 8 << 20);
}

// What the matrix library compiles for a product of certain sizes is kept, 0.6 MiB each, in a cache
// of the library and, by thread, in one of LibTorch before it, 1024 entries each. Experts meet new
// numbers of rows for hundreds of steps, and both grew as long. One cache of 128, for all threads,
// costs no time that can be measured; model/model_memory.cc counts it. Read at the first product;
// whoever sets them in the environment is obeyed.
void BoundCompiledProducts() {
  setenv("LRU_CACHE_CAPACITY", "1", 0);
  setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128", 0);
}

// Ends at once, without the destructors of LibTorch and of process groups whose peers may be gone.
[[noreturn]] void Leave(int code) {
  std::fflush(nullptr);
  _exit(code);
}

[[noreturn]] void Run() {
  const heddle::SystemClock clock;
  const int64_t started_at_ms = clock.NowWallMs();
  HEDDLE_INFO("rank started", {"pid", getpid()});
  StatusOr<std::unique_ptr<RankControl>> control =
      heddle::trainer::ConnectToShim([](const Status& why) {
        // Without a shim nobody stops this rank any more: it must not go on.
        HEDDLE_ERROR("the shim is gone", {"why", why});
        Leave(static_cast<int>(ExitCode::kPeerFailed));
      });
  if (!control.ok()) {
    std::fprintf(stderr, "heddle-trainer: %s\n", heddle::Message(control.status()).c_str());
    Leave(static_cast<int>(ExitCode::kDoNotRetry));
  }
  const heddle::v1::RankExit exit = heddle::trainer::RunRank(control->get(), clock, started_at_ms);
  if (exit.succeeded()) {
    HEDDLE_INFO("rank done", {"step", exit.step()});
  } else {
    HEDDLE_WARN("rank leaves", {"code", exit.code()}, {"category", exit.category()},
                {"step", exit.step()}, {"why", exit.detail()});
  }
  (*control)->Exit(exit);
  // Here and not in main(): threads of an unfinished save still use the link.
  Leave(exit.code());
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && std::string_view(argv[1]) == "--version") {
    std::printf("heddle-trainer %s, LibTorch %s\n", HEDDLE_VERSION,
                heddle::trainer::TorchVersion().c_str());
    return 0;
  }
  if (argc != 1) {
    std::fprintf(stderr, "usage: heddle-trainer [--version]; started by heddle-shim\n");
    return 2;
  }
  std::signal(SIGPIPE, SIG_IGN);
  BoundFragmentation();
  BoundCompiledProducts();
  try {
    Run();
  } catch (const std::exception& error) {
    std::fprintf(stderr, "heddle-trainer: %s\n", error.what());
    Leave(static_cast<int>(ExitCode::kFailed));
  }
}
