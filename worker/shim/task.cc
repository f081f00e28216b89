#include "worker/shim/task.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/timerfd.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "worker/shim/process_tree.h"

namespace heddle::shim {
namespace {

using control::BootTimeNs;
using control::Frame;
using control::FrameReader;
using control::FrameType;
using control::KillReason;

constexpr int64_t kMsNs = 1'000'000;
constexpr int64_t kTermToKillNs = 10'000 * kMsNs;
constexpr int64_t kPeerFailedNs = 250 * kMsNs;
constexpr int64_t kKillAgainNs = 50 * kMsNs;
constexpr int64_t kFinishAgainNs = 1'000 * kMsNs;
constexpr int64_t kLeaveNs = 2'000 * kMsNs;
// Above this the shim stops reading ranks until the daemon acknowledges something.
constexpr size_t kKeptBytesMax = size_t{64} << 20;
constexpr size_t kDaemonBufferBytes = size_t{256} << 10;
// A rank that does not read this much is broken.
constexpr size_t kRankBufferBytesMax = size_t{64} << 20;

int64_t WallMs() {
  timespec now = {};
  clock_gettime(CLOCK_REALTIME, &now);
  return int64_t{now.tv_sec} * 1000 + now.tv_nsec / 1'000'000;
}

// Lines of shim.log.
void Note(const std::string& text) {
  dprintf(STDERR_FILENO, "%lld %s\n", static_cast<long long>(WallMs()), text.c_str());
}

void CloseFd(int* fd) {
  if (*fd >= 0) close(*fd);
  *fd = -1;
}

// True for what a rank may send; everything else on its socket is a fault.
bool IsFromRank(FrameType type) {
  return static_cast<uint16_t>(type) < static_cast<uint16_t>(FrameType::kSpec);
}
bool IsToRank(FrameType type) {
  return static_cast<uint16_t>(type) >= static_cast<uint16_t>(FrameType::kSpec) &&
         static_cast<uint16_t>(type) < static_cast<uint16_t>(FrameType::kStopTask);
}

// The earlier of two deadlines, 0 being none.
int64_t Earlier(int64_t a, int64_t b) {
  if (a == 0 || b == 0) return a + b;
  return std::min(a, b);
}

}  // namespace

Task::Task(control::LaunchFile launch, std::unique_ptr<control::ContactFile> contact)
    : launch_(std::move(launch)), contact_(std::move(contact)), cgroup_(launch_) {
  if (!cgroup_.notes().empty()) Note(cgroup_.notes());
}

Task::~Task() {
  for (Rank& rank : ranks_) {
    CloseFd(&rank.process.control_fd);
    CloseFd(&rank.process.error_fd);
  }
  for (int* fd : {&signal_fd_, &timer_fd_, &listen_fd_, &daemon_fd_}) CloseFd(fd);
}

std::string Task::Prepare() {
  const auto failed = [](const std::string& what) { return what + ": " + strerror(errno); };
  control::ShimIdentity identity;
  identity.pid = getpid();
  identity.start_ticks = control::ProcessStartTicks(identity.pid);
  identity.cgroup = cgroup_.folder();
  const std::string temporary = "shim." + std::to_string(identity.pid);
  const int fd = open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
  const std::string text = control::EncodeShimIdentity(identity);
  if (fd < 0 || write(fd, text.data(), text.size()) != static_cast<ssize_t>(text.size())) {
    return failed(temporary);
  }
  close(fd);
  // link() fails if `shim` exists: this folder was started before.
  const bool first = link(temporary.c_str(), "shim") == 0;
  const int error = errno;
  unlink(temporary.c_str());
  if (!first) return error == EEXIST ? "this task was started before" : strerror(error);

  listen_fd_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  memcpy(address.sun_path, "shim.sock", sizeof("shim.sock"));
  const mode_t old_mask = umask(0177);
  const bool bound = listen_fd_ >= 0 &&
                     bind(listen_fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0;
  umask(old_mask);
  if (!bound || listen(listen_fd_, 4) != 0) return failed("shim.sock");

  sigset_t set;
  sigemptyset(&set);
  for (const int number : {SIGCHLD, SIGTERM, SIGINT}) sigaddset(&set, number);
  sigprocmask(SIG_BLOCK, &set, nullptr);
  for (const int number : {SIGHUP, SIGPIPE, SIGQUIT, SIGUSR1, SIGUSR2}) signal(number, SIG_IGN);
  signal_fd_ = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
  timer_fd_ = timerfd_create(CLOCK_BOOTTIME, TFD_CLOEXEC | TFD_NONBLOCK);
  if (signal_fd_ < 0 || timer_fd_ < 0) return failed("signalfd, timerfd");
  return "";
}

void Task::Spawn() {
  SpawnOptions options;
  options.control = launch_.control;
  options.uid = launch_.uid;
  options.gid = launch_.gid;
  options.working_dir = launch_.working_dir.empty() ? "scratch" : launch_.working_dir;
  options.cgroup_files = cgroup_.join_files();
  started_at_ms_ = WallMs();
  oom_kills_ = cgroup_.OomKills();
  ranks_.resize(launch_.ranks.size());
  for (size_t i = 0; i < ranks_.size(); ++i) {
    Rank& rank = ranks_[i];
    rank.launch = launch_.ranks[i];
    rank.process = SpawnRank(rank.launch, options);
    rank.live = rank.process.pid > 0;
    if (rank.live) {
      const std::string stem = "logs/rank-" + std::to_string(rank.launch.rank);
      rank.log = std::make_unique<LogFile>(stem, rank.process.log_fd, launch_.log_bytes_max);
      continue;
    }
    rank.failure = {static_cast<uint32_t>(rank.process.failed_step), rank.process.error};
    FinishRank(&rank, siginfo_t{});
  }
}

void Task::Run() {
  while (!finished_ || (daemon_fd_ >= 0 && BootTimeNs() < leave_at_ns_)) {
    if (!AnyLive() && !finished_) {
      if (!no_children_ && kill_again_at_ns_ == 0) KillTree();  // what ranks left behind
      Reap();
      if (no_children_ && finish_again_at_ns_ == 0) Finish();
    }
    WriteDaemon();
    if (finished_ && (daemon_fd_ < 0 || (outbox_.Drained() && to_daemon_.empty()))) break;
    std::vector<pollfd> fds;
    FillPoll(&fds);
    ArmTimer();
    const int count = poll(fds.data(), fds.size(), -1);
    if (count < 0 && errno != EINTR) {
      Note(std::string("poll: ") + strerror(errno));
      Kill(KillReason::kTerminated);
    }
    if (count > 0) HandlePoll(fds);
    HandleDeadlines();
  }
}

void Task::FillPoll(std::vector<pollfd>* fds) {
  fds->push_back({signal_fd_, POLLIN, 0});
  fds->push_back({timer_fd_, POLLIN, 0});
  fds->push_back({listen_fd_, POLLIN, 0});
  const short daemon_events = to_daemon_.empty() ? POLLIN : POLLIN | POLLOUT;
  fds->push_back({daemon_fd_, daemon_events, 0});
  const bool read_ranks = outbox_.kept_bytes() < kKeptBytesMax;
  for (const Rank& rank : ranks_) {
    short events = read_ranks ? POLLIN : 0;
    if (!rank.to_rank.empty()) events |= POLLOUT;
    // A negative number is skipped by poll, so the order stays fixed: three per rank.
    fds->push_back({rank.process.control_fd, events, 0});
    fds->push_back({rank.log == nullptr ? -1 : rank.log->pipe_fd(), POLLIN, 0});
    fds->push_back({rank.process.error_fd, POLLIN, 0});
  }
}

void Task::HandlePoll(const std::vector<pollfd>& fds) {
  // Ranks before signals: last words and the end of file come before the exit (X7).
  for (size_t i = 0; i < ranks_.size(); ++i) {
    Rank& rank = ranks_[i];
    const pollfd* slots = &fds[4 + 3 * i];
    if (slots[2].revents != 0) CheckLaunch(&rank);
    if (slots[0].revents & POLLOUT) WriteRank(&rank);
    if (slots[0].revents & (POLLIN | POLLHUP | POLLERR)) ReadRank(&rank);
    if (slots[1].revents != 0) rank.log->Drain();
  }
  if (fds[1].revents != 0) {
    uint64_t expirations = 0;
    if (read(timer_fd_, &expirations, sizeof(expirations)) > 0) armed_ns_ = -1;
  }
  if (fds[0].revents != 0) HandleSignals();
  if (fds[3].revents & (POLLIN | POLLHUP | POLLERR)) ReadDaemon();
  if (fds[2].revents != 0) AcceptDaemon();
}

void Task::HandleSignals() {
  signalfd_siginfo info = {};
  while (read(signal_fd_, &info, sizeof(info)) == static_cast<ssize_t>(sizeof(info))) {
    if (info.ssi_signo == SIGTERM) {
      kill_at_ns_ = Earlier(kill_at_ns_, BootTimeNs() + kTermToKillNs);
      kill_at_reason_ = KillReason::kTerminated;
      if (kill_reason_ == KillReason::kNone) kill_reason_ = KillReason::kTerminated;
      Terminate();
    }
  }
  Reap();
}

int64_t Task::NextDeadlineNs() const {
  int64_t next = Earlier(term_at_ns_, kill_at_ns_);
  next = Earlier(next, peer_failed_at_ns_);
  next = Earlier(next, kill_again_at_ns_);
  next = Earlier(next, finish_again_at_ns_);
  next = Earlier(next, leave_at_ns_);
  if (AnyLive() && kill_again_at_ns_ == 0) next = Earlier(next, contact_->deadline_ns());
  return next;
}

void Task::ArmTimer() {
  const int64_t next = std::max<int64_t>(NextDeadlineNs(), 0);
  if (next == armed_ns_) return;
  armed_ns_ = next;
  itimerspec when = {};
  when.it_value.tv_sec = next / 1'000'000'000;
  when.it_value.tv_nsec = next % 1'000'000'000;
  timerfd_settime(timer_fd_, TFD_TIMER_ABSTIME, &when, nullptr);
}

void Task::HandleDeadlines() {
  const int64_t now = BootTimeNs();
  const auto due = [now](int64_t deadline) { return deadline != 0 && deadline <= now; };
  if (due(term_at_ns_)) {
    term_at_ns_ = 0;
    kill_at_ns_ = Earlier(kill_at_ns_, now + kTermToKillNs);
    kill_at_reason_ = KillReason::kGraceOver;
    if (kill_reason_ == KillReason::kNone) kill_reason_ = KillReason::kGraceOver;
    Terminate();
  }
  if (due(kill_at_ns_)) {
    kill_at_ns_ = 0;
    Kill(kill_at_reason_);
  }
  if (due(peer_failed_at_ns_)) {
    peer_failed_at_ns_ = 0;
    if (daemon_fd_ < 0) Kill(KillReason::kPeerFailed);
  }
  if (due(kill_again_at_ns_)) {
    kill_again_at_ns_ = 0;
    if (!no_children_) KillTree();
  }
  if (due(finish_again_at_ns_)) finish_again_at_ns_ = 0;
  if (AnyLive() && kill_again_at_ns_ == 0 && contact_->deadline_ns() <= now) {
    Kill(KillReason::kOrphan);
  }
}

void Task::ReadRank(Rank* rank) {
  char buffer[65536];
  while (rank->process.control_fd >= 0 && outbox_.kept_bytes() < kKeptBytesMax) {
    const ssize_t count = read(rank->process.control_fd, buffer, sizeof(buffer));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EAGAIN) return;
    if (count <= 0) return CloseRank(rank);
    rank->reader.Append(std::string_view(buffer, static_cast<size_t>(count)));
    Frame frame;
    FrameReader::Result result;
    while ((result = rank->reader.Next(&frame)) == FrameReader::Result::kFrame) {
      if (!IsFromRank(frame.header.type) || frame.header.fence != launch_.fence ||
          frame.header.rank != rank->launch.rank) {
        Note("rank " + std::to_string(rank->launch.rank) + " sent a " +
             control::ToText(frame.header.type) + " that is not its own: link closed");
        return CloseRank(rank);
      }
      outbox_.Add(frame);
    }
    if (result == FrameReader::Result::kBad) {
      Note("rank " + std::to_string(rank->launch.rank) + ": " + rank->reader.error() +
           ": link closed");
      return CloseRank(rank);
    }
  }
}

void Task::CloseRank(Rank* rank) {
  if (rank->process.control_fd < 0) return;
  CloseFd(&rank->process.control_fd);
  rank->to_rank.clear();
  if (rank->live) Send(FrameType::kRankEof, rank->launch.rank, "");
}

void Task::WriteRank(Rank* rank) {
  while (rank->process.control_fd >= 0 && !rank->to_rank.empty()) {
    const ssize_t count = send(rank->process.control_fd, rank->to_rank.data(), rank->to_rank.size(),
                               MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) {
      if (errno != EAGAIN) rank->to_rank.clear();  // the read side reports the end of file
      return;
    }
    rank->to_rank.erase(0, static_cast<size_t>(count));
  }
}

void Task::CheckLaunch(Rank* rank) {
  if (rank->process.error_fd < 0) return;
  const ssize_t count = read(rank->process.error_fd, &rank->failure, sizeof(rank->failure));
  if (count < 0 && (errno == EAGAIN || errno == EINTR)) return;
  CloseFd(&rank->process.error_fd);
  if (count == static_cast<ssize_t>(sizeof(rank->failure))) return;
  rank->failure = LaunchFailure();
  rank->announced = true;
  control::SpawnedPod spawned;
  spawned.rank = rank->launch.rank;
  spawned.pid = rank->process.pid;
  spawned.at_ms = WallMs();
  Send(FrameType::kSpawned, rank->launch.rank, control::AsBytes(spawned));
}

void Task::Reap() {
  while (true) {
    siginfo_t info = {};
    // Looked at before it is reaped: the process group of a rank is certain only until then.
    if (waitid(P_ALL, 0, &info, WEXITED | WNOHANG | WNOWAIT) != 0) {
      no_children_ = errno == ECHILD;
      return;
    }
    if (info.si_pid == 0) return;
    Rank* const rank = FindPid(info.si_pid);
    if (rank != nullptr && rank->live) FinishRank(rank, info);
    siginfo_t reaped = {};
    waitid(P_PID, static_cast<id_t>(info.si_pid), &reaped, WEXITED | WNOHANG);
  }
}

void Task::FinishRank(Rank* rank, const siginfo_t& info) {
  CheckLaunch(rank);
  ReadRank(rank);  // last words
  CloseRank(rank);
  if (rank->log != nullptr) rank->log->Drain();
  if (rank->process.pid > 0) kill(-rank->process.pid, SIGKILL);  // its own children
  rank->live = false;

  control::RankExitedPod exited;
  exited.rank = rank->launch.rank;
  exited.at_ms = WallMs();
  exited.launch_step = rank->failure.step;
  exited.launch_errno = rank->failure.error;
  if (info.si_code == CLD_EXITED) {
    exited.code = info.si_status;
  } else if (info.si_pid != 0) {
    exited.signal = info.si_status;
  }
  const uint64_t oom_kills = cgroup_.OomKills();
  if (exited.signal == SIGKILL && oom_kills > oom_kills_) {
    exited.oom = 1;
    oom_kills_ = oom_kills;
  } else if (exited.signal == SIGKILL || exited.signal == SIGTERM) {
    exited.by_shim = static_cast<uint32_t>(kill_reason_);
  }
  Send(FrameType::kRankExited, rank->launch.rank, control::AsBytes(exited));
  if (exited.code != 0 && daemon_fd_ < 0 && peer_failed_at_ns_ == 0) {
    peer_failed_at_ns_ = BootTimeNs() + kPeerFailedNs;
  }
}

Task::Rank* Task::FindPid(pid_t pid) {
  for (Rank& rank : ranks_) {
    if (rank.process.pid == pid) return &rank;
  }
  return nullptr;
}

Task::Rank* Task::FindRank(uint32_t number) {
  for (Rank& rank : ranks_) {
    if (rank.launch.rank == number) return &rank;
  }
  return nullptr;
}

bool Task::AnyLive() const {
  return std::any_of(ranks_.begin(), ranks_.end(), [](const Rank& rank) { return rank.live; });
}

void Task::StopTask(const control::StopTaskPod& order) {
  const int64_t now = BootTimeNs();
  // Bounded, so that no sum overflows: a day is beyond every grace.
  const int64_t grace_ns = std::clamp<int64_t>(order.grace_ms, 0, 86'400'000) * kMsNs;
  switch (static_cast<control::StopTaskMode>(order.mode)) {
    case control::StopTaskMode::kGraceful:
      // A repeated order never prolongs the first.
      if (kill_at_ns_ == 0)
        term_at_ns_ = Earlier(term_at_ns_, now + std::max<int64_t>(grace_ns, 1));
      return;
    case control::StopTaskMode::kTerm:
      term_at_ns_ = 0;
      kill_at_ns_ = Earlier(kill_at_ns_, now + std::max<int64_t>(grace_ns, 1));
      kill_at_reason_ = KillReason::kGraceOver;
      if (kill_reason_ == KillReason::kNone) kill_reason_ = KillReason::kOrdered;
      return Terminate();
    case control::StopTaskMode::kKill:
      return Kill(KillReason::kOrdered);
  }
}

void Task::Terminate() {
  for (const Rank& rank : ranks_) {
    if (rank.live) kill(-rank.process.pid, SIGTERM);
  }
}

void Task::Kill(KillReason reason) {
  if (!AnyLive()) return;
  Note(std::string("killing the task: ") + control::ToText(reason));
  kill_reason_ = reason;
  term_at_ns_ = kill_at_ns_ = 0;
  KillTree();
}

void Task::KillTree() {
  cgroup_.Kill();
  for (const Rank& rank : ranks_) {
    if (rank.live) kill(-rank.process.pid, SIGKILL);
  }
  for (const pid_t pid : Descendants(getpid())) kill(pid, SIGKILL);
  kill_again_at_ns_ = BootTimeNs() + kKillAgainNs;
}

void Task::AcceptDaemon() {
  const int fd = accept4(listen_fd_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) return;
  ucred peer = {};
  socklen_t size = sizeof(peer);
  if (getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &peer, &size) != 0 || peer.uid != geteuid()) {
    Note("refused a connection of user " + std::to_string(peer.uid));
    close(fd);
    return;
  }
  DropDaemon();  // the newest daemon is the right one
  daemon_fd_ = fd;
  daemon_reader_ = FrameReader();
  outbox_.Attach();
  Frame state;
  state.header.type = FrameType::kTaskState;
  state.header.fence = launch_.fence;
  state.payload = TaskState();
  to_daemon_ = control::EncodeFrame(state);
}

void Task::DropDaemon() {
  if (daemon_fd_ < 0) return;
  CloseFd(&daemon_fd_);
  to_daemon_.clear();
  outbox_.Detach();
}

void Task::ReadDaemon() {
  char buffer[65536];
  while (daemon_fd_ >= 0) {
    const ssize_t count = read(daemon_fd_, buffer, sizeof(buffer));
    if (count < 0 && errno == EINTR) continue;
    if (count < 0 && errno == EAGAIN) return;
    if (count <= 0) return DropDaemon();
    daemon_reader_.Append(std::string_view(buffer, static_cast<size_t>(count)));
    Frame frame;
    FrameReader::Result result;
    while ((result = daemon_reader_.Next(&frame)) == FrameReader::Result::kFrame) {
      if (frame.header.fence == launch_.fence) HandleDaemonFrame(frame);
    }
    if (result == FrameReader::Result::kBad) {
      Note("daemon: " + daemon_reader_.error());
      return DropDaemon();
    }
  }
}

void Task::HandleDaemonFrame(const Frame& frame) {
  if (IsToRank(frame.header.type)) {
    Rank* const rank = FindRank(frame.header.rank);
    if (rank == nullptr || rank->process.control_fd < 0) return;
    if (rank->to_rank.size() > kRankBufferBytesMax) return CloseRank(rank);
    rank->to_rank += control::EncodeFrame(frame);
    return WriteRank(rank);
  }
  control::StopTaskPod order;
  control::AckPod ack;
  if (frame.header.type == FrameType::kStopTask && control::Unpack(frame.payload, &order)) {
    StopTask(order);
  } else if (frame.header.type == FrameType::kAck && control::Unpack(frame.payload, &ack)) {
    outbox_.Acknowledge(ack.number);
  }
}

void Task::WriteDaemon() {
  if (daemon_fd_ < 0) return;
  while (to_daemon_.size() < kDaemonBufferBytes) {
    const std::string bytes = outbox_.Next();
    if (bytes.empty()) break;
    to_daemon_ += bytes;
  }
  while (!to_daemon_.empty()) {
    const ssize_t count =
        send(daemon_fd_, to_daemon_.data(), to_daemon_.size(), MSG_NOSIGNAL | MSG_DONTWAIT);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) {
      if (errno != EAGAIN) DropDaemon();
      return;
    }
    to_daemon_.erase(0, static_cast<size_t>(count));
  }
}

std::string Task::TaskState() const {
  control::TaskStatePod state;
  state.ranks = static_cast<uint32_t>(ranks_.size());
  state.live = static_cast<uint32_t>(
      std::count_if(ranks_.begin(), ranks_.end(), [](const Rank& rank) { return rank.live; }));
  state.replay = outbox_.kept();
  state.progress_dropped = outbox_.progress_dropped();
  for (const Rank& rank : ranks_) {
    if (rank.log != nullptr) state.log_bytes_dropped += rank.log->dropped();
  }
  state.started_at_ms = started_at_ms_;
  return std::string(control::AsBytes(state));
}

void Task::Send(FrameType type, uint32_t rank, std::string_view payload) {
  Frame frame;
  frame.header.type = type;
  frame.header.fence = launch_.fence;
  frame.header.rank = rank;
  frame.payload = payload;
  outbox_.Add(frame);
}

void Task::Finish() {
  for (Rank& rank : ranks_) {
    if (rank.log != nullptr) rank.log->Drain();
  }
  const std::string bytes =
      control::EncodeFrame(FrameType::kTaskState, launch_.fence, 0, TaskState()) + outbox_.Replay();
  term_at_ns_ = kill_at_ns_ = kill_again_at_ns_ = peer_failed_at_ns_ = 0;
  if (!control::WriteFileDurably("exit", bytes)) {
    const int error = errno;
    if (!finish_failed_) Note(std::string("exit: ") + strerror(error));
    finish_failed_ = true;
    // A full disk: what the ranks said would end with this process. Without its folder (ENOENT)
    // the task has been forgotten.
    if (error != ENOENT) {
      finish_again_at_ns_ = BootTimeNs() + kFinishAgainNs;
      return;
    }
  }
  if (!cgroup_.Remove()) Note("the cgroup is not empty");
  finished_ = true;
  leave_at_ns_ = BootTimeNs() + kLeaveNs;
}

}  // namespace heddle::shim
