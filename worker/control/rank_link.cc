#include "worker/control/rank_link.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <unistd.h>

#include <charconv>
#include <condition_variable>
#include <cstdlib>
#include <deque>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>

#include "heddle/v1/worker_link.pb.h"
#include "worker/control/control_frame.h"

namespace heddle::control {
namespace {

using std::chrono::milliseconds;
using SteadyTime = std::chrono::steady_clock::time_point;

constexpr size_t kProgressQueueMax = 1024;
constexpr size_t kDecidedStepsMax = 64;
constexpr milliseconds kRetryAfter{200};
constexpr milliseconds kExitFlush{1000};

// A number of the environment, nothing if it is absent or malformed.
std::optional<uint64_t> EnvironmentNumber(const char* name, const char* prefix) {
  const char* text = std::getenv(name);
  if (text == nullptr) return std::nullopt;
  std::string_view view(text);
  if (view.substr(0, std::string_view(prefix).size()) != prefix) return std::nullopt;
  view.remove_prefix(std::string_view(prefix).size());
  uint64_t value = 0;
  const std::from_chars_result end = std::from_chars(view.data(), view.data() + view.size(), value);
  if (view.empty() || end.ec != std::errc() || end.ptr != view.data() + view.size()) {
    return std::nullopt;
  }
  return value;
}

}  // namespace

class RankLink::Impl {
 public:
  Impl(int fd, int wake, Identity identity, Handlers handlers)
      : fd_(fd), wake_(wake), identity_(identity), handlers_(std::move(handlers)) {
    thread_ = std::thread([this] { Run(); });
  }

  ~Impl() {
    Flush(kExitFlush);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      closing_ = true;
    }
    Wake();
    thread_.join();
    close(fd_);
    close(wake_);
  }

  const Identity& identity() const { return identity_; }

  Status Send(FrameType type, const google::protobuf::MessageLite& message) {
    const std::string payload = message.SerializeAsString();
    if (payload.size() > kMaxPayloadBytes) {
      return InvalidArgument(Str(ToText(type), " frame of ", payload.size(),
                                 " bytes is above the limit of ", kMaxPayloadBytes));
    }
    std::string bytes = EncodeFrame(type, identity_.fence, identity_.rank, payload);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!lost_.ok()) return lost_;
      const bool progress = type == FrameType::kProgress;
      if (progress && progress_queued_ >= kProgressQueueMax) DropOldestProgress();
      progress_queued_ += progress;
      queue_.push_back({std::move(bytes), progress});
    }
    Wake();
    return OkStatus();
  }

  // Waits until `slot` is filled.
  template <typename T>
  StatusOr<T> WaitForMessage(const std::optional<T>& slot, const char* what, milliseconds timeout) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, timeout, [&] { return slot.has_value() || !lost_.ok(); });
    if (slot.has_value()) return *slot;
    if (!lost_.ok()) return lost_;
    return DeadlineExceeded(Str("no ", what, " within ", timeout.count(), " ms"));
  }

  template <typename Request>
  StatusOr<v1::CheckpointReply> AskCheckpoint(FrameType type, Request request,
                                              milliseconds timeout) {
    const SteadyTime deadline = std::chrono::steady_clock::now() + timeout;
    if (request.request() == 0) request.set_request(NumberFor(type, request.step()));
    const uint64_t number = request.request();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      checkpoint_waits_[number] = std::nullopt;
    }
    StatusOr<v1::CheckpointReply> result = Unavailable("not asked");
    while (true) {
      const Status sent = Send(type, request);
      if (!sent.ok()) {
        result = sent;
        break;
      }
      result = Await(&checkpoint_waits_, number, ToText(type), deadline);
      if (!result.ok() || result->verdict() != v1::CHECKPOINT_VERDICT_UNAVAILABLE) break;
      PauseBeforeRetry(number, deadline);
    }
    std::lock_guard<std::mutex> lock(mutex_);
    checkpoint_waits_.erase(number);
    if (result.ok()) unanswered_.erase(type);
    return result;
  }

  StatusOr<v1::RendezvousReply> AskRendezvous(v1::RendezvousRequest request, milliseconds timeout) {
    const SteadyTime deadline = std::chrono::steady_clock::now() + timeout;
    if (request.n() == 0) request.set_n(NextNumber());
    {
      std::lock_guard<std::mutex> lock(mutex_);
      rendezvous_waits_[request.n()] = std::nullopt;
    }
    StatusOr<v1::RendezvousReply> result = Unavailable("not asked");
    const Status sent = Send(FrameType::kRendezvous, request);
    if (sent.ok()) {
      result = Await(&rendezvous_waits_, request.n(), "RENDEZVOUS", deadline);
    } else {
      result = sent;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    rendezvous_waits_.erase(request.n());
    return result;
  }

  StatusOr<v1::CheckpointReply> WaitForCommit(uint64_t step, milliseconds timeout) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, timeout, [&] {
      return decided_.contains(step) || fenced_.has_value() || !lost_.ok();
    });
    const auto found = decided_.find(step);
    if (found != decided_.end()) return found->second;
    if (fenced_.has_value()) return *fenced_;
    if (!lost_.ok()) return lost_;
    return DeadlineExceeded(
        Str("checkpoint of step ", step, " undecided after ", timeout.count(), " ms"));
  }

  // True once everything queued has left this process.
  bool Flush(milliseconds timeout) {
    std::unique_lock<std::mutex> lock(mutex_);
    changed_.wait_for(lock, timeout, [&] { return (queue_.empty() && !writing_) || !lost_.ok(); });
    return queue_.empty() && !writing_;
  }

  uint64_t progress_dropped() {
    std::lock_guard<std::mutex> lock(mutex_);
    return progress_dropped_;
  }
  bool stop_requested() {
    std::lock_guard<std::mutex> lock(mutex_);
    return stop_requested_;
  }
  const std::optional<v1::RankSpec>& spec() const { return spec_; }
  const std::optional<v1::StartRank>& start() const { return start_; }

 private:
  struct Outgoing {
    std::string bytes;
    bool progress;
  };

  void Wake() {
    const uint64_t one = 1;
    // Full only when a wake-up is pending already.
    if (write(wake_, &one, sizeof(one)) < 0) return;
  }

  uint64_t NextNumber() {
    std::lock_guard<std::mutex> lock(mutex_);
    return next_number_++;
  }

  // The same as before for a question that no answer came to: whoever keeps it keeps it once,
  // however long the coordinator is away.
  uint64_t NumberFor(FrameType type, uint64_t step) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto [known, fresh] = unanswered_.try_emplace(type);
    if (fresh || known->second.first != step) known->second = {step, next_number_++};
    return known->second.second;
  }

  // REQUIRES: mutex_ held, a progress frame is queued.
  void DropOldestProgress() {
    for (auto it = queue_.begin(); it != queue_.end(); ++it) {
      if (!it->progress) continue;
      queue_.erase(it);
      --progress_queued_;
      ++progress_dropped_;
      return;
    }
  }

  template <typename Reply>
  StatusOr<Reply> Await(std::map<uint64_t, std::optional<Reply>>* waits, uint64_t number,
                        const char* what, SteadyTime deadline) {
    std::unique_lock<std::mutex> lock(mutex_);
    std::optional<Reply>& slot = (*waits)[number];
    changed_.wait_until(lock, deadline, [&] { return slot.has_value() || !lost_.ok(); });
    if (slot.has_value()) return *slot;
    if (!lost_.ok()) return lost_;
    return DeadlineExceeded(Str("no answer to ", what, " ", number));
  }

  void PauseBeforeRetry(uint64_t number, SteadyTime deadline) {
    std::unique_lock<std::mutex> lock(mutex_);
    const SteadyTime until = std::min(deadline, std::chrono::steady_clock::now() + kRetryAfter);
    changed_.wait_until(lock, until, [&] { return !lost_.ok(); });
    checkpoint_waits_[number] = std::nullopt;
  }

  void Lose(const Status& status) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      lost_ = status;
      queue_.clear();
      writing_ = false;
    }
    changed_.notify_all();
    if (handlers_.on_lost) handlers_.on_lost(status);
  }

  void Run() {
    std::string out;
    size_t written = 0;
    while (true) {
      if (written == out.size()) {
        written = 0;
        out = NextOutgoing();
      }
      pollfd fds[2] = {{fd_, POLLIN, 0}, {wake_, POLLIN, 0}};
      if (written < out.size()) fds[0].events |= POLLOUT;
      {
        std::lock_guard<std::mutex> lock(mutex_);
        if (closing_ && queue_.empty() && !writing_) return;
      }
      if (poll(fds, 2, -1) < 0 && errno != EINTR) return Lose(FromErrno("poll"));
      if (fds[1].revents & POLLIN) {
        uint64_t count = 0;
        if (read(wake_, &count, sizeof(count)) < 0) count = 0;
        std::lock_guard<std::mutex> lock(mutex_);
        if (closing_) return;
      }
      if (fds[0].revents & POLLOUT) {
        const ssize_t count =
            send(fd_, out.data() + written, out.size() - written, MSG_NOSIGNAL | MSG_DONTWAIT);
        if (count < 0 && errno != EAGAIN && errno != EINTR) return Lose(FromErrno("control link"));
        if (count > 0) written += static_cast<size_t>(count);
      }
      if (fds[0].revents & (POLLIN | POLLHUP | POLLERR)) {
        const Status status = ReadSome();
        if (!status.ok()) return Lose(status);
      }
    }
  }

  // The next frame to write, empty if there is none.
  std::string NextOutgoing() {
    std::string bytes;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      writing_ = !queue_.empty();
      if (writing_) {
        bytes = std::move(queue_.front().bytes);
        progress_queued_ -= queue_.front().progress;
        queue_.pop_front();
      }
    }
    if (bytes.empty()) changed_.notify_all();
    return bytes;
  }

  Status ReadSome() {
    char buffer[65536];
    const ssize_t count = recv(fd_, buffer, sizeof(buffer), MSG_DONTWAIT);
    if (count == 0) return Unavailable("the shim closed the control link");
    if (count < 0) {
      return errno == EAGAIN || errno == EINTR ? OkStatus() : FromErrno("control link");
    }
    reader_.Append(std::string_view(buffer, static_cast<size_t>(count)));
    Frame frame;
    FrameReader::Result result;
    while ((result = reader_.Next(&frame)) == FrameReader::Result::kFrame) {
      RETURN_IF_ERROR(Handle(frame));
    }
    if (result == FrameReader::Result::kBad) return Unavailable("control link: " + reader_.error());
    return OkStatus();
  }

  Status Handle(const Frame& frame) {
    if (frame.header.fence != identity_.fence) return OkStatus();  // not of this attempt
    switch (frame.header.type) {
      case FrameType::kSpec:
        return Keep(frame, &spec_);
      case FrameType::kStart:
        return Keep(frame, &start_);
      case FrameType::kStop:
        return HandleStop(frame);
      case FrameType::kCheckpointReply:
        return HandleCheckpoint(frame);
      case FrameType::kRendezvousReply:
        return HandleRendezvous(frame);
      default:
        return OkStatus();
    }
  }

  static Status Parse(const Frame& frame, google::protobuf::MessageLite* message) {
    if (message->ParseFromString(frame.payload)) return OkStatus();
    return Unavailable(Str("control link: malformed ", ToText(frame.header.type)));
  }

  // SPEC and START count once; a daemon that restarted may repeat them.
  template <typename T>
  Status Keep(const Frame& frame, std::optional<T>* slot) {
    T message;
    RETURN_IF_ERROR(Parse(frame, &message));
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!slot->has_value()) *slot = std::move(message);
    }
    changed_.notify_all();
    return OkStatus();
  }

  Status HandleStop(const Frame& frame) {
    v1::StopRank stop;
    RETURN_IF_ERROR(Parse(frame, &stop));
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stop_requested_ = true;
    }
    if (handlers_.on_stop) handlers_.on_stop(stop);
    return OkStatus();
  }

  Status HandleCheckpoint(const Frame& frame) {
    v1::CheckpointReply reply;
    RETURN_IF_ERROR(Parse(frame, &reply));
    bool unsolicited = false;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto wait = checkpoint_waits_.find(reply.request());
      unsolicited = reply.request() == 0 || wait == checkpoint_waits_.end();
      if (!unsolicited) wait->second = reply;
      const v1::CheckpointVerdict verdict = reply.verdict();
      if (verdict == v1::CHECKPOINT_VERDICT_COMMITTED ||
          verdict == v1::CHECKPOINT_VERDICT_REFUSED) {
        decided_[reply.step()] = reply;
        if (decided_.size() > kDecidedStepsMax) decided_.erase(decided_.begin());
      }
      if (verdict == v1::CHECKPOINT_VERDICT_FENCED) fenced_ = reply;
    }
    changed_.notify_all();
    if (unsolicited && handlers_.on_checkpoint) handlers_.on_checkpoint(reply);
    return OkStatus();
  }

  Status HandleRendezvous(const Frame& frame) {
    v1::RendezvousReply reply;
    RETURN_IF_ERROR(Parse(frame, &reply));
    {
      std::lock_guard<std::mutex> lock(mutex_);
      const auto wait = rendezvous_waits_.find(reply.n());
      if (wait != rendezvous_waits_.end() && !wait->second.has_value()) wait->second = reply;
    }
    changed_.notify_all();
    return OkStatus();
  }

  const int fd_;
  const int wake_;
  const Identity identity_;
  const Handlers handlers_;
  FrameReader reader_;  // link thread only

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Outgoing> queue_;
  size_t progress_queued_ = 0;
  uint64_t progress_dropped_ = 0;
  bool writing_ = false;
  bool closing_ = false;
  bool stop_requested_ = false;
  Status lost_;
  uint64_t next_number_ = 1;
  std::optional<v1::RankSpec> spec_;
  std::optional<v1::StartRank> start_;
  std::map<uint64_t, std::optional<v1::CheckpointReply>> checkpoint_waits_;
  std::map<FrameType, std::pair<uint64_t, uint64_t>> unanswered_;  // step, number
  std::map<uint64_t, std::optional<v1::RendezvousReply>> rendezvous_waits_;
  std::map<uint64_t, v1::CheckpointReply> decided_;
  std::optional<v1::CheckpointReply> fenced_;
  std::thread thread_;
};

RankLink::RankLink(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
RankLink::~RankLink() = default;

StatusOr<std::unique_ptr<RankLink>> RankLink::FromEnvironment(Handlers handlers) {
  const std::optional<uint64_t> fd = EnvironmentNumber("HEDDLE_CONTROL", "fd:");
  const std::optional<uint64_t> fence = EnvironmentNumber("HEDDLE_FENCE", "");
  const std::optional<uint64_t> rank = EnvironmentNumber("HEDDLE_RANK", "");
  if (!fd || !fence || !rank || *fd > 1 << 20) {
    return FailedPrecondition(
        "HEDDLE_CONTROL, HEDDLE_FENCE or HEDDLE_RANK is missing: this program is started by "
        "heddle-shim");
  }
  return Adopt(static_cast<int>(*fd), {*fence, static_cast<uint32_t>(*rank)}, std::move(handlers));
}

StatusOr<std::unique_ptr<RankLink>> RankLink::Adopt(int fd, Identity identity, Handlers handlers) {
  // Children of the trainer must not hold the link open.
  if (fcntl(fd, F_SETFD, FD_CLOEXEC) != 0) return FromErrno("control link", Str("fd ", fd));
  const int wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  if (wake < 0) return FromErrno("eventfd");
  return std::unique_ptr<RankLink>(
      new RankLink(std::make_unique<Impl>(fd, wake, identity, std::move(handlers))));
}

uint64_t RankLink::fence() const { return impl_->identity().fence; }
uint32_t RankLink::rank() const { return impl_->identity().rank; }

Status RankLink::Hello(const v1::RankHello& hello) { return impl_->Send(FrameType::kHello, hello); }
StatusOr<v1::RankSpec> RankLink::WaitForSpec(milliseconds timeout) {
  return impl_->WaitForMessage(impl_->spec(), "SPEC", timeout);
}
Status RankLink::Ready(const v1::RankReady& ready) { return impl_->Send(FrameType::kReady, ready); }
StatusOr<v1::StartRank> RankLink::WaitForStart(milliseconds timeout) {
  return impl_->WaitForMessage(impl_->start(), "START", timeout);
}
Status RankLink::Joined(const v1::RankJoined& joined) {
  return impl_->Send(FrameType::kJoined, joined);
}
Status RankLink::Progress(const v1::RankProgress& progress) {
  return impl_->Send(FrameType::kProgress, progress);
}
uint64_t RankLink::progress_dropped() const { return impl_->progress_dropped(); }
Status RankLink::Damage(const v1::DamageReport& damage) {
  return impl_->Send(FrameType::kDamage, damage);
}

Status RankLink::Exit(const v1::RankExit& exit) {
  RETURN_IF_ERROR(impl_->Send(FrameType::kExit, exit));
  if (!impl_->Flush(kExitFlush)) return DeadlineExceeded("last words are still queued");
  return OkStatus();
}

StatusOr<v1::CheckpointReply> RankLink::OpenCheckpoint(v1::OpenCheckpoint open,
                                                       milliseconds timeout) {
  return impl_->AskCheckpoint(FrameType::kOpenCheckpoint, std::move(open), timeout);
}
StatusOr<v1::CheckpointReply> RankLink::SealShard(v1::SealShard seal, milliseconds timeout) {
  return impl_->AskCheckpoint(FrameType::kSeal, std::move(seal), timeout);
}
StatusOr<v1::CheckpointReply> RankLink::WaitForCommit(uint64_t step, milliseconds timeout) {
  return impl_->WaitForCommit(step, timeout);
}
StatusOr<v1::RendezvousReply> RankLink::Rendezvous(v1::RendezvousRequest request,
                                                   milliseconds timeout) {
  return impl_->AskRendezvous(std::move(request), timeout);
}
bool RankLink::StopRequested() const { return impl_->stop_requested(); }

}  // namespace heddle::control
