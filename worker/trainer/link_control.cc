#include "worker/trainer/link_control.h"

#include <chrono>
#include <cstring>
#include <mutex>
#include <string>
#include <utility>

#include "base/log/log.h"
#include "worker/control/rank_link.h"
#include "worker/control/rank_page.h"
#include "worker/control/stack_dump.h"

namespace heddle::trainer {

namespace {

using std::chrono::milliseconds;

// The numbers in the page are those of the table that its readers have.
#define HEDDLE_PHASE(number, name, text, part) \
  static_assert(static_cast<int>(Phase::name) == (number), text);
#include "base/rank_words/words.def"

// Waits of the start are bounded by the coordinator (A4, A6), which then stops this rank.
constexpr milliseconds kStartWait{3'600'000};
constexpr milliseconds kVerdictWait{2'000};
constexpr milliseconds kCommitWait{200};
constexpr milliseconds kRendezvousGrace{10'000};

class LinkControl : public RankControl {
 public:
  Status Connect(std::function<void(const Status&)> on_lost) {
    control::RankLink::Handlers handlers;
    handlers.on_stop = [this](const heddle::v1::StopRank& stop) {
      const std::lock_guard<std::mutex> lock(mutex_);
      stop_ = stop;
    };
    handlers.on_lost = std::move(on_lost);
    ASSIGN_OR_RETURN(link_, control::RankLink::FromEnvironment(std::move(handlers)));
    return OkStatus();
  }

  StatusOr<heddle::v1::RankSpec> Hello(const heddle::v1::RankHello& hello) override {
    RETURN_IF_ERROR(link_->Hello(hello));
    ASSIGN_OR_RETURN(heddle::v1::RankSpec spec, link_->WaitForSpec(kStartWait));
    if (spec.fence() != link_->fence() || spec.rank() != link_->rank()) {
      return Internal(Str("the spec is of rank ", spec.rank(), " under fence ", spec.fence(),
                          ", this is rank ", link_->rank(), " under ", link_->fence()));
    }
    page_ = control::RankPage::Open(spec.page());
    if (page_ == nullptr) {
      return FromErrno("map shared page", spec.page());
    }
    control::DumpStacksOnSignal(page_.get());
    return spec;
  }

  StatusOr<heddle::v1::StartRank> Ready(const heddle::v1::RankReady& ready) override {
    RETURN_IF_ERROR(link_->Ready(ready));
    return link_->WaitForStart(kStartWait);
  }

  Status Joined(const heddle::v1::RankJoined& joined) override { return link_->Joined(joined); }

  StatusOr<heddle::v1::RendezvousReply> Rendezvous(
      const heddle::v1::RendezvousRequest& request) override {
    return link_->Rendezvous(request, milliseconds(request.timeout_ms()) + kRendezvousGrace);
  }

  void Report(const heddle::v1::RankProgress& progress) override {
    Ignore(link_->Progress(progress));
  }
  void ReportDamage(const heddle::v1::DamageReport& damage) override {
    Ignore(link_->Damage(damage));
  }

  StatusOr<heddle::v1::CheckpointReply> Open(heddle::v1::OpenCheckpoint open) override {
    return link_->OpenCheckpoint(std::move(open), kVerdictWait);
  }
  StatusOr<heddle::v1::CheckpointReply> Seal(heddle::v1::SealShard seal) override {
    return link_->SealShard(std::move(seal), kVerdictWait);
  }
  StatusOr<heddle::v1::CheckpointReply> AwaitCommit(uint64_t step) override {
    return link_->WaitForCommit(step, kCommitWait);
  }

  std::optional<heddle::v1::StopRank> StopRequest() override {
    const std::lock_guard<std::mutex> lock(mutex_);
    return stop_;
  }

  Status WritePermit() override {
    return page_->HoldsPermit(link_->fence()) ? OkStatus() : Unavailable("no write permit");
  }

  void NoteProgress(uint64_t step, Phase phase) override {
    page_->PublishProgress(
        {.step = step, .phase = static_cast<uint32_t>(phase), .at_ns = control::BootTimeNs()});
  }

  void NoteUnit(int unit) override { page_->NoteUnit(unit); }

  control::RankPage* page() override { return page_.get(); }

  void Exit(const heddle::v1::RankExit& exit) override { Ignore(link_->Exit(exit)); }

 private:
  // A lost link ends the process by its own way.
  static void Ignore(const Status& status) {
    if (!status.ok()) {
      HEDDLE_DEBUG("control link", {"status", status});
    }
  }

  std::unique_ptr<control::RankLink> link_;
  std::unique_ptr<control::RankPage> page_;
  std::mutex mutex_;
  std::optional<heddle::v1::StopRank> stop_;
};

}  // namespace

StatusOr<std::unique_ptr<RankControl>> ConnectToShim(std::function<void(const Status&)> on_lost) {
  auto control = std::make_unique<LinkControl>();
  RETURN_IF_ERROR(control->Connect(std::move(on_lost)));
  return control;
}

}  // namespace heddle::trainer
