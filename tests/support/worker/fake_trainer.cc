// A rank that speaks the control link like heddle-trainer but trains nothing. What it does stands
// in FAKE_TRAINER, words separated by blanks:
//   steps=N step_ms=N   progress reports, one a step (default 3 steps of 5 ms)
//   phase=N             of its progress word (default 1); each step launches an all-gather of unit
//   2 save=N              open, seal and await the commit of step N rendezvous=KEY      ask for KEY
//   before JOINED exit=N              exit status (default 0); words=TEXT: detail of EXIT
//   ignore_term deaf    SIGTERM is ignored; STOP is ignored
//   child               leaves a child behind that ignores SIGTERM
//   garbage             sends random bytes instead of JOINED
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <sstream>
#include <string>

#include "base/clock/clock.h"
#include "worker/control/rank_link.h"
#include "worker/control/rank_page.h"
#include "worker/control/stack_dump.h"

namespace {

using heddle::StatusOr;
using heddle::control::RankLink;
using std::chrono::milliseconds;
namespace v1 = heddle::v1;

std::map<std::string, std::string> ReadWishes() {
  std::map<std::string, std::string> wishes;
  const char* text = std::getenv("FAKE_TRAINER");
  std::istringstream words(text == nullptr ? "" : text);
  std::string word;
  while (words >> word) {
    const size_t equals = word.find('=');
    wishes[word.substr(0, equals)] = equals == std::string::npos ? "" : word.substr(equals + 1);
  }
  return wishes;
}

struct FakeTrainer {
  std::map<std::string, std::string> wishes = ReadWishes();
  std::atomic<bool> stop = false;
  std::unique_ptr<RankLink> link;

  bool Wants(const std::string& key) const { return wishes.contains(key); }
  long Number(const std::string& key, long otherwise) const {
    const auto found = wishes.find(key);
    return found == wishes.end() ? otherwise : std::atol(found->second.c_str());
  }

  int Leave(int code, const std::string& detail, uint64_t step) {
    v1::RankExit exit;
    exit.set_code(code);
    exit.set_detail(detail);
    exit.set_step(step);
    exit.set_succeeded(code == 0);
    if (!link->Exit(exit).ok()) return 70;
    return code;
  }

  int Save(uint64_t step) {
    v1::OpenCheckpoint open;
    open.set_step(step);
    StatusOr<v1::CheckpointReply> reply = link->OpenCheckpoint(open, milliseconds(60'000));
    if (!reply.ok()) return 71;
    if (reply->verdict() == v1::CHECKPOINT_VERDICT_FENCED) return 94;
    v1::SealShard seal;
    seal.set_step(step);
    seal.set_rank(link->rank());
    reply = link->SealShard(seal, milliseconds(60'000));
    if (!reply.ok()) return 72;
    if (reply->verdict() == v1::CHECKPOINT_VERDICT_FENCED) return 94;
    reply = link->WaitForCommit(step, milliseconds(60'000));
    return reply.ok() && reply->verdict() == v1::CHECKPOINT_VERDICT_COMMITTED ? 0 : 73;
  }

  int Launch(std::unique_ptr<heddle::control::RankPage>* page) {
    v1::RankHello hello;
    hello.set_pid(getpid());
    hello.set_at_ms(heddle::SystemClock().NowWallMs());
    if (!link->Hello(hello).ok()) return 60;
    const StatusOr<v1::RankSpec> spec = link->WaitForSpec(milliseconds(60'000));
    if (!spec.ok()) return 61;
    *page = heddle::control::RankPage::Open(spec->page());
    if (*page == nullptr) return 62;
    std::printf("rank %u of %u threads %u\n", spec->rank(), spec->world_size(), spec->threads());
    std::fflush(stdout);
    if (!link->Ready(v1::RankReady()).ok() || !link->WaitForStart(milliseconds(60'000)).ok()) {
      return 63;
    }
    if (Wants("rendezvous")) {
      v1::RendezvousRequest ask;
      ask.set_verb(v1::RENDEZVOUS_VERB_GET);
      ask.add_keys(wishes.at("rendezvous"));
      const StatusOr<v1::RendezvousReply> answer = link->Rendezvous(ask, milliseconds(60'000));
      if (!answer.ok() || answer->values_size() != 1) return 64;
      std::printf("rendezvous %s\n", answer->values(0).c_str());
    }
    return link->Joined(v1::RankJoined()).ok() ? 0 : 65;
  }

  void ShowStep(heddle::control::RankPage* page, uint64_t step) const {
    const int64_t now = heddle::control::BootTimeNs();
    page->PublishProgress(
        {.step = step, .phase = static_cast<uint32_t>(Number("phase", 1)), .at_ns = now});
    page->NoteUnit(2);
    page->ring()[step % heddle::control::kRingEntries] = {.seq = step,
                                                          .group = 0,
                                                          .op = 3,
                                                          .dtype = 1,
                                                          .count = 64,
                                                          .unit = 2,
                                                          .fingerprint = 7,
                                                          .launched_ns = now,
                                                          .started_ns = now,
                                                          .ended_ns = 0};
    page->ring_head().store(step);
  }

  int Run() {
    RankLink::Handlers handlers;
    handlers.on_stop = [this](const v1::StopRank&) { stop = true; };
    handlers.on_lost = [](const heddle::Status&) { _exit(86); };
    StatusOr<std::unique_ptr<RankLink>> made = RankLink::FromEnvironment(std::move(handlers));
    if (!made.ok()) return 69;
    link = *std::move(made);
    std::unique_ptr<heddle::control::RankPage> page;
    const int launched = Launch(&page);
    if (launched != 0) return launched;
    heddle::control::DumpStacksOnSignal(page.get());
    if (Wants("child") && fork() == 0) {
      signal(SIGTERM, SIG_IGN);
      while (true) pause();
    }
    uint64_t step = 0;
    const long steps = Number("steps", 3);
    while (static_cast<long>(step) < steps && (!stop || Wants("deaf"))) {
      poll(nullptr, 0, static_cast<int>(Number("step_ms", 5)));
      ++step;
      v1::RankProgress progress;
      progress.set_step(step);
      progress.add_points()->set_step(step);
      if (!link->Progress(progress).ok()) return 66;
      ShowStep(page.get(), step);
      if (Number("save", -1) == static_cast<long>(step)) {
        const int saved = Save(step);
        if (saved != 0) return Leave(saved, "save", step);
      }
    }
    if (stop) return Leave(85, "asked to stop", step);
    return Leave(static_cast<int>(Number("exit", 0)), Wants("words") ? wishes["words"] : "", step);
  }
};

}  // namespace

int main() {
  FakeTrainer trainer;
  if (trainer.Wants("ignore_term")) signal(SIGTERM, SIG_IGN);
  if (trainer.Wants("garbage")) {
    char bytes[4096];
    const int random = open("/dev/urandom", O_RDONLY);
    while (read(random, bytes, sizeof(bytes)) > 0 && write(3, bytes, sizeof(bytes)) > 0) {
    }
    // A peer that closes with bytes unread makes the write fail with ECONNRESET, without a signal.
    raise(SIGPIPE);
  }
  const int code = trainer.Run();
  trainer.link.reset();
  std::printf("leaving with %d\n", code);
  return code;
}
