#include "worker/trainer/run_rank.h"

#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <exception>
#include <fstream>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "base/ids/ids.h"
#include "base/log/log.h"
#include "base/status/errno_of.h"
#include "kernels/common/isa.h"
#include "model/language_model.h"
#include "worker/comm/communicator.h"
#include "worker/comm/recorder.h"
#include "worker/comm/shared_memory.h"
#include "worker/trainer/checkpointer.h"
#include "worker/trainer/data_source.h"
#include "worker/trainer/exit_code.h"
#include "worker/trainer/restore.h"
#include "worker/trainer/run_plan.h"
#include "worker/trainer/run_state.h"
#include "worker/trainer/threads.h"
#include "worker/trainer/train_loop.h"

namespace heddle::trainer {

namespace {

using heddle::v1::RankExit;
using heddle::v1::RankSpec;

// Words of the last words that belong to a rollback.
void AddRollback(const LoopEnd& end, RankExit* exit) {
  if (end.code != ExitCode::kRollBack) return;
  exit->set_rollback_to_step(static_cast<uint64_t>(end.rollback_to_step));
  exit->mutable_skip()->set_first(static_cast<uint64_t>(end.skip.first));
  exit->mutable_skip()->set_count(static_cast<uint64_t>(end.skip.count));
}

RankExit Ending(ExitCode code, const std::string& category, const std::string& detail) {
  RankExit exit;
  exit.set_code(static_cast<int32_t>(code));
  exit.set_category(category);
  exit.set_detail(detail);
  exit.set_succeeded(code == ExitCode::kDone);
  return exit;
}

// What an error of the machinery means to the coordinator (control-plane 4.6).
RankExit EndingOf(const Status& status) {
  const int error = ErrnoOf(status);
  if (error == EIO || error == ENOSPC || error == EDQUOT) {  // whatever was to be read or written
    return Ending(ExitCode::kStorage, "STORAGE", Message(status));
  }
  if (IsBadData(status)) {  // no other node would read it otherwise
    return Ending(ExitCode::kDoNotRetry, "USER_DATA", Message(status));
  }
  switch (status.code()) {
    case StatusCode::kUnavailable:  // a collective: some other rank is the cause
    case StatusCode::kDeadlineExceeded:
      return Ending(ExitCode::kPeerFailed, "NETWORK", Message(status));
    case StatusCode::kDataLoss:  // of checkpoints: none that is left can be loaded
      return Ending(ExitCode::kStorage, "STORAGE", Message(status));
    case StatusCode::kInvalidArgument:
    case StatusCode::kFailedPrecondition:
    case StatusCode::kNotFound:
    case StatusCode::kUnimplemented:
      return Ending(ExitCode::kDoNotRetry, "USER_CONFIG", Message(status));
    case StatusCode::kResourceExhausted:
      return Ending(ExitCode::kFailed, "OOM_HOST", Message(status));
    case StatusCode::kAborted:
      return Ending(ExitCode::kFenced, "", Message(status));
    default:
      return Ending(ExitCode::kFailed, "UNKNOWN", Message(status));
  }
}

// LibTorch's allocator throws its own error, whose message has the size that failed.
RankExit EndingOfException(const std::exception& error) {
  std::string text = error.what();
  text = text.substr(0, text.find('\n'));
  const bool memory = dynamic_cast<const std::bad_alloc*>(&error) != nullptr ||
                      text.find("allocate memory") != std::string::npos ||
                      text.find("not enough memory") != std::string::npos;
  return memory ? Ending(ExitCode::kFailed, "OOM_HOST", Str("out of memory: ", text))
                : Ending(ExitCode::kFailed, "UNKNOWN", text);
}

// Pages of mapped files, of libraries above all: the memory plan leaves them out.
uint64_t ResidentFileBytes() {
  std::ifstream status("/proc/self/status");
  for (std::string word; status >> word;) {
    uint64_t kib = 0;
    if (word == "RssFile:" && status >> kib) return kib * 1024;
  }
  return 0;
}

void AddPeakMemory(RankExit* exit) {
  struct rusage usage = {};
  if (getrusage(RUSAGE_SELF, &usage) != 0) return;
  const uint64_t peak = static_cast<uint64_t>(usage.ru_maxrss) * 1024;
  heddle::v1::MemoryUse* use = exit->add_memory();
  use->set_name("resident");
  use->set_actual(peak - std::min(peak, ResidentFileBytes()));
}

std::string Hex(const std::string& bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string text;
  for (const char byte : bytes) {
    text.push_back(kDigits[static_cast<uint8_t>(byte) >> 4]);
    text.push_back(kDigits[static_cast<uint8_t>(byte) & 15]);
  }
  return text;
}

// The parts of a rank, in the order in which they come to be.
class Rank {
 public:
  Rank(RankControl* control, const Clock& clock) : control_(control), clock_(clock) {}

  StatusOr<LoopEnd> Live(int64_t started_at_ms) {
    heddle::v1::RankHello hello;
    hello.set_pid(getpid());
    hello.set_version(HEDDLE_VERSION);
    hello.set_at_ms(started_at_ms);
    ASSIGN_OR_RETURN(spec_, control_->Hello(hello));
    RETURN_IF_ERROR(Prepare());

    heddle::v1::RankReady ready;
    ready.set_isa(kernels::IsaName(kernels::SelectedIsa()));
    ASSIGN_OR_RETURN(const heddle::v1::StartRank start, control_->Ready(ready));
    RETURN_IF_ERROR(Connect(start));
    state_->parameters()->Connect(group_.get());
    ASSIGN_OR_RETURN(const Restored restored,
                     Restore(spec_, plan_, data_, group_.get(), control_, state_.get()));
    RETURN_IF_ERROR(SkipData(state_->skipped(), &data_));
    heddle::v1::RankJoined joined;
    joined.set_start_step(restored.step);
    RETURN_IF_ERROR(control_->Joined(joined));
    HEDDLE_INFO("rank joined", {"job", spec_.job()}, {"attempt", spec_.attempt()},
                {"rank", spec_.rank()}, {"world", spec_.world_size()},
                {"backend", group_->backend()}, {"start_step", restored.step});
    return Train();
  }

  void Abort() {
    if (group_ != nullptr) {
      group_->Abort();
    }
  }
  uint64_t step() const {
    return state_ == nullptr ? 0 : static_cast<uint64_t>(state_->counters().step);
  }

 private:
  // Everything that needs no other rank.
  Status Prepare() {
    const std::vector<int> cpus(spec_.cpus().begin(), spec_.cpus().end());
    RETURN_IF_ERROR(UseThreads(static_cast<int>(std::max(1u, spec_.threads())), cpus));
    ASSIGN_OR_RETURN(plan_, PlanRun(spec_.config()));
    ASSIGN_OR_RETURN(data_, OpenData(spec_.config()));
    if (!plan_.init_from.empty()) {
      RETURN_IF_ERROR(CheckSameTokenizer(plan_.init_from, data_));
    }
    ASSIGN_OR_RETURN(state_,
                     RunState::Create(spec_.config().model(), plan_, static_cast<int>(spec_.rank()),
                                      static_cast<int>(std::max(1u, spec_.world_size()))));
    model::LanguageModelOptions options;
    options.recompute = plan_.recompute;
    ASSIGN_OR_RETURN(model_, model::LanguageModel::Create(spec_.config().model(),
                                                          state_->parameters()->memory(), options));
    return OkStatus();
  }

  Status Connect(const heddle::v1::StartRank& start) {
    RETURN_IF_ERROR(MakeGroup(start));
    if (control_->page() != nullptr) {
      group_ = comm::MakeRecorded(std::move(group_), /*group_id=*/0, control_->page());
    }
    return OkStatus();
  }

  Status MakeGroup(const heddle::v1::StartRank& start) {
    if (start.world_size() != spec_.world_size() || spec_.rank() >= spec_.world_size()) {
      return Internal(Str("rank ", spec_.rank(), " of ", spec_.world_size(), " was started in a ",
                          "world of ", start.world_size()));
    }
    // Who asks for NCCL or MPI gets it or an error, alone too.
    const heddle::v1::ParallelConfig::Backend backend = spec_.config().parallel().backend();
    const bool nccl = backend == heddle::v1::ParallelConfig::BACKEND_NCCL;
    const bool mpi = backend == heddle::v1::ParallelConfig::BACKEND_MPI;
    if (spec_.world_size() == 1 && !nccl && !mpi) {
      group_ = comm::MakeSolo();
      return OkStatus();
    }
    comm::GroupOptions options;
    options.rank = static_cast<int>(spec_.rank());
    options.world_size = static_cast<int>(spec_.world_size());
    options.local_rank = static_cast<int>(spec_.local_rank());
    if (!spec_.page().empty()) options.scratch = ".";  // a rank stands in its task's scratch folder
    options.data_address = spec_.data_address();
    options.key_prefix = Str("train/", spec_.fence(), "/", Hex(start.secret()), "/");
    options.rendezvous = [this](const heddle::v1::RendezvousRequest& request) {
      return control_->Rendezvous(request);
    };
    options.step_timeout = options.init_timeout;  // until the loop has timed its steps
    if (start.deadline_ms() > 0) {
      options.init_timeout = std::chrono::milliseconds(start.deadline_ms());
    }
    if (nccl) {
      HEDDLE_WARN("the model is computed on the CPU; the GPU carries the sums of gradients only");
    }
    StatusOr<std::unique_ptr<comm::Communicator>> group = nccl  ? comm::ConnectNccl(options)
                                                          : mpi ? comm::ConnectMpi(options)
                                                                : comm::ConnectGloo(options);
    RETURN_IF_ERROR(group);
    group_ = *std::move(group);
    if (nccl || mpi) return OkStatus();
    std::string why_not;
    ASSIGN_OR_RETURN(group_, comm::OverSharedMemory(std::move(group_), &why_not));
    if (!why_not.empty()) HEDDLE_INFO("no shared memory between ranks", {"why", why_not});
    return OkStatus();
  }

  StatusOr<LoopEnd> Train() {
    CheckpointerOptions options;
    options.root = spec_.checkpoint_root();
    options.attempt_dir = spec_.attempt_dir();
    ASSIGN_OR_RETURN(const JobId job, ParseJobId(spec_.job()));
    options.job = job.value;
    options.fence = spec_.fence();
    options.rank = spec_.rank();
    options.world_size = spec_.world_size();
    options.config_hash = plan_.config_hash;
    options.tensors = state_->tensors();
    checkpointer_ = std::make_unique<Checkpointer>(control_, &clock_, std::move(options));
    TrainLoop loop({.spec = &spec_,
                    .plan = &plan_,
                    .data = &data_,
                    .group = group_.get(),
                    .control = control_,
                    .model = model_.get(),
                    .state = state_.get(),
                    .checkpointer = checkpointer_.get(),
                    .clock = &clock_});
    return loop.Run();
  }

  RankControl* const control_;
  const Clock& clock_;
  RankSpec spec_;
  RunPlan plan_;
  RunData data_;
  std::unique_ptr<RunState> state_;
  std::unique_ptr<model::LanguageModel> model_;
  std::unique_ptr<comm::Communicator> group_;
  std::unique_ptr<Checkpointer> checkpointer_;
};

}  // namespace

RankExit RunRank(RankControl* control, const Clock& clock, int64_t started_at_ms) {
  auto rank = std::make_unique<Rank>(control, clock);
  RankExit exit;
  try {
    const StatusOr<LoopEnd> end = rank->Live(started_at_ms);
    exit = end.ok() ? Ending(end->code, end->category, end->detail) : EndingOf(end.status());
    if (end.ok()) AddRollback(*end, &exit);
  } catch (const std::exception& error) {  // LibTorch's; the first line says what
    exit = EndingOfException(error);
  }
  exit.set_step(rank->step());
  if (exit.category() == "OOM_HOST") AddPeakMemory(&exit);
  if (exit.code() != 0) {
    rank->Abort();
    // Left as it is: a save in flight or a group whose peers are gone may take long to end, and the
    // process ends now, which closes its sockets and wakes every peer.
    static_cast<void>(rank.release());
  }
  return exit;  // NOLINT(clang-analyzer-cplusplus.NewDeleteLeaks): the leak above is meant
}

}  // namespace heddle::trainer
