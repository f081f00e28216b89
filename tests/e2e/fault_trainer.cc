// heddle-trainer with a fault: the same library, started by a worker in the trainer's place, that
// does one thing wrong at one place of one step. The product has no switch for it. What to do
// stands in the file `fault` beside the program, written by the test:
//
//   RANK KIND PHASE STEP        e.g. "1 exception backward 12"
//
// KIND: exception, bad_alloc, torch_alloc, oom_kill, stop, kill; slow: takes 30 ms more in the
// phase, in every step from STEP on. PHASE: a word of base/rank_words,
// or `collective`: while the rank waits inside one. Only the first attempt of a job is disturbed.
// When it strikes, the time is left in `fired` beside it.
#include <ATen/ops/empty.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/clock/clock.h"
#include "base/rank_words/rank_words.h"
#include "base/status/status.h"
#include "worker/control/rank_page.h"
#include "worker/trainer/link_control.h"
#include "worker/trainer/run_rank.h"

namespace heddle::trainer {
namespace {

std::string Folder() {
  char path[4096] = {};
  const ssize_t size = readlink("/proc/self/exe", path, sizeof(path) - 1);
  const std::string program(path, size > 0 ? static_cast<size_t>(size) : 0);
  return program.substr(0, program.rfind('/') + 1);
}

struct Fault {
  uint32_t rank = 0;
  std::string kind;
  std::string phase;
  uint64_t step = 0;
};

Fault ReadFault() {
  Fault fault;
  std::ifstream file(Folder() + "fault");
  file >> fault.rank >> fault.kind >> fault.phase >> fault.step;
  return fault;
}

// The control of a rank, in whose progress the fault strikes.
class FaultyControl : public RankControl {
 public:
  FaultyControl(std::unique_ptr<RankControl> control, Fault fault)
      : control_(std::move(control)), fault_(std::move(fault)) {}

  StatusOr<v1::RankSpec> Hello(const v1::RankHello& hello) override {
    StatusOr<v1::RankSpec> spec = control_->Hello(hello);
    armed_ = spec.ok() && spec->attempt() == 1 && spec->rank() == fault_.rank;
    if (armed_ && fault_.phase == "collective" && Kills()) {
      std::thread([this] { WatchForWait(); }).detach();
    }
    return spec;
  }
  void NoteProgress(uint64_t step, Phase phase) override {
    control_->NoteProgress(step, phase);
    // An exception cannot be thrown into a wait: it is thrown where the next thing is one.
    const std::string wanted = fault_.phase == "collective"
                                   ? PhaseText(static_cast<uint32_t>(Phase::kReduce))
                                   : fault_.phase;
    const bool here = PhaseText(static_cast<uint32_t>(phase)) == wanted;
    if (armed_ && step >= fault_.step && here && !(fault_.phase == "collective" && Kills())) {
      Strike();
    }
  }

  StatusOr<v1::StartRank> Ready(const v1::RankReady& ready) override {
    return control_->Ready(ready);
  }
  Status Joined(const v1::RankJoined& joined) override { return control_->Joined(joined); }
  StatusOr<v1::RendezvousReply> Rendezvous(const v1::RendezvousRequest& request) override {
    return control_->Rendezvous(request);
  }
  void Report(const v1::RankProgress& progress) override { control_->Report(progress); }
  void ReportDamage(const v1::DamageReport& damage) override { control_->ReportDamage(damage); }
  StatusOr<v1::CheckpointReply> Open(v1::OpenCheckpoint open) override {
    return control_->Open(std::move(open));
  }
  StatusOr<v1::CheckpointReply> Seal(v1::SealShard seal) override {
    return control_->Seal(std::move(seal));
  }
  StatusOr<v1::CheckpointReply> AwaitCommit(uint64_t step) override {
    return control_->AwaitCommit(step);
  }
  std::optional<v1::StopRank> StopRequest() override { return control_->StopRequest(); }
  Status WritePermit() override { return control_->WritePermit(); }
  void NoteUnit(int unit) override { control_->NoteUnit(unit); }
  control::RankPage* page() override { return control_->page(); }
  void Exit(const v1::RankExit& exit) override { control_->Exit(exit); }

 private:
  bool Kills() const { return fault_.kind == "stop" || fault_.kind == "kill"; }

  // Waits are short: only the waiting thread itself knows that it still waits when it is struck.
  void WatchForWait() {
    g_struck_in_wait = this;
    signal(SIGUSR1, [](int) {
      FaultyControl* const self = g_struck_in_wait;
      if (self->control_->page()->ReadActivity().waiting) self->Strike();
    });
    while (!struck_) {
      const control::RankPage* page = control_->page();
      if (page != nullptr && page->ReadProgress().step >= fault_.step &&
          page->ReadActivity().waiting) {
        pthread_kill(trainer_, SIGUSR1);
      }
    }
  }

  void Strike() {
    if (fault_.kind == "slow") {
      poll(nullptr, 0, 30);
      return;
    }
    if (struck_.exchange(true)) return;
    {
      std::ofstream fired(Folder() + "fired.tmp");
      fired << SystemClock().NowWallMs() << '\n';
    }
    std::rename((Folder() + "fired.tmp").c_str(), (Folder() + "fired").c_str());
    if (fault_.kind == "stop") {
      kill(getpid(), SIGSTOP);
    } else if (fault_.kind == "kill") {
      kill(getpid(), SIGKILL);
    } else if (fault_.kind == "bad_alloc") {
      std::vector<char> much(size_t{1} << 60);
      much.back() = 1;
    } else if (fault_.kind == "oom_kill") {
      UseMemory();
    } else if (fault_.kind == "torch_alloc") {
      at::empty({int64_t{1} << 46}).fill_(1);
    } else {
      throw std::runtime_error("planted by the test");
    }
  }

  // Until the kernel ends this process, for the limit of its cgroup. A machine without such a limit
  // is spared.
  static void UseMemory() {
    constexpr size_t kPiece = size_t{16} << 20;
    for (size_t used = 0; used < size_t{3} << 30; used += kPiece) {
      std::memset(new char[kPiece], 1, kPiece);
    }
    throw std::runtime_error("3 GiB were given without a limit");
  }

  static inline FaultyControl* g_struck_in_wait = nullptr;

  const std::unique_ptr<RankControl> control_;
  const Fault fault_;
  const pthread_t trainer_ = pthread_self();
  bool armed_ = false;
  std::atomic<bool> struck_ = false;
};

int Run() {
  const SystemClock clock;
  StatusOr<std::unique_ptr<RankControl>> link = ConnectToShim([](const Status&) { _exit(86); });
  if (!link.ok()) return 93;
  FaultyControl control(*std::move(link), ReadFault());
  const v1::RankExit exit = RunRank(&control, clock, clock.NowWallMs());
  std::fprintf(stderr, "fault trainer leaves: %d %s\n", exit.code(), exit.detail().c_str());
  control.Exit(exit);
  std::fflush(nullptr);
  _exit(exit.code());
}

}  // namespace
}  // namespace heddle::trainer

int main() {
  signal(SIGPIPE, SIG_IGN);
  return heddle::trainer::Run();
}
