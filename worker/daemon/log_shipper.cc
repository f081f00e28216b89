#include "worker/daemon/log_shipper.h"

#include <fcntl.h>
#include <sys/inotify.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <map>
#include <utility>

#include <grpcpp/channel.h>
#include <boost/asio/buffer.hpp>
#include <boost/asio/posix/stream_descriptor.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/steady_timer.hpp>

#include "base/log/log.h"
#include "heddle/v1/worker_link.grpc.pb.h"
#include "worker/daemon/grpc_stream.h"

namespace heddle::worker {
namespace {

using Stream = GrpcStream<v1::LogChunk, v1::LogAck>;
using std::chrono::milliseconds;

constexpr size_t kChunkBytes = 65536;
constexpr uint32_t kRanksAllShipped = 64;
// Writes of a busy rank are sent together.
constexpr milliseconds kCollect{20};
constexpr milliseconds kFirstBackoff{100};
constexpr milliseconds kBackoffMax{2'000};

struct RankLog {
  std::string path;
  std::string loss_path;  // its size is what the shim lost (worker/shim/log_file.h)
  uint64_t job = 0;
  uint32_t attempt = 0;
  bool known = false;      // the coordinator said where it stands on this stream
  bool in_flight = false;  // one chunk waits for its acknowledgement
  bool sent_data = false;  // with the chunk in flight
  bool refused = false;    // the coordinator takes no more of it on this stream
  uint64_t offset = 0;     // the coordinator has everything before it
  uint64_t given_up = 0;   // bytes from there on that will not be sent
  uint64_t lost = 0;       // as the coordinator knows it
  uint64_t telling = 0;    // with the chunk in flight
};

struct TaskLogs {
  std::string folder;
  int watch = -1;
  std::map<uint32_t, RankLog> ranks;
  std::function<void()> finished;
  std::shared_ptr<boost::asio::steady_timer> finish_timer;
};

uint64_t FileSize(const std::string& path) {
  struct stat info = {};
  return stat(path.c_str(), &info) == 0 ? static_cast<uint64_t>(info.st_size) : 0;
}

// What the rank printed and the coordinator will never get.
uint64_t Lost(const RankLog& log) { return FileSize(log.loss_path) + log.given_up; }

std::string ReadAt(const std::string& path, uint64_t offset) {
  std::string data;
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) return data;
  data.resize(kChunkBytes);
  const ssize_t count = pread(fd, data.data(), data.size(), static_cast<off_t>(offset));
  data.resize(count > 0 ? static_cast<size_t>(count) : 0);
  close(fd);
  return data;
}

}  // namespace

class LogShipper::Impl : public std::enable_shared_from_this<Impl> {
 public:
  Impl(boost::asio::io_context* io, std::shared_ptr<grpc::Channel> channel, std::string worker_id,
       milliseconds timeout)
      : io_(io),
        timeout_(timeout),
        stub_(v1::WorkerLink::NewStub(std::move(channel))),
        worker_id_(std::move(worker_id)),
        inotify_(*io),
        collect_(*io),
        retry_(*io) {}

  void Watch(const TaskFolder& folder) {
    TaskLogs& task = tasks_[folder.key()];
    if (!task.folder.empty()) return;
    task.folder = folder.path();
    EnsureInotify();
    task.watch = inotify_add_watch(inotify_.native_handle(), (folder.path() + "/logs").c_str(),
                                   IN_MODIFY | IN_CREATE);
    const bool all = folder.assignment().world_size() <= kRanksAllShipped;
    for (const uint32_t rank : folder.assignment().ranks()) {
      if (all || rank == 0) AddRank(&task, folder, rank);
    }
    PumpSoon();
  }

  void Add(const TaskFolder& folder, uint32_t rank) {
    const auto task = tasks_.find(folder.key());
    if (task == tasks_.end() || task->second.ranks.contains(rank)) return;
    AddRank(&task->second, folder, rank);
    PumpSoon();
  }

  void Poke(const TaskKey& key) {
    if (tasks_.contains(key)) PumpSoon();
  }

  void Finish(const TaskKey& key, std::function<void()> done) {
    const auto found = tasks_.find(key);
    if (found == tasks_.end()) return boost::asio::post(*io_, std::move(done));
    found->second.finished = std::move(done);
    found->second.finish_timer = std::make_shared<boost::asio::steady_timer>(*io_);
    AwaitFinish(key, &found->second);
    PumpSoon();
  }

  void Connect() {
    wanted_ = true;
    backoff_ = kFirstBackoff;
    if (stream_ == nullptr && !tasks_.empty()) Open();
  }

  void Stop(std::function<void()> done) {
    stopping_ = true;
    stopped_ = std::move(done);
    boost::system::error_code ignored;
    inotify_.close(ignored);
    collect_.cancel();
    retry_.cancel();
    for (auto& [key, task] : tasks_) {
      if (task.finish_timer != nullptr) task.finish_timer->cancel();
    }
    if (stream_ != nullptr) return stream_->Cancel();
    boost::asio::post(*io_, std::exchange(stopped_, nullptr));
  }

 private:
  static void AddRank(TaskLogs* task, const TaskFolder& folder, uint32_t rank) {
    RankLog& log = task->ranks[rank];
    log.path = folder.LogPath(rank);
    log.loss_path = folder.LogLossPath(rank);
    log.job = folder.assignment().job();
    log.attempt = folder.assignment().attempt();
  }

  // Counts anew with every byte that arrives.
  void AwaitFinish(const TaskKey& key, TaskLogs* task) {
    task->finish_timer->expires_after(timeout_);
    task->finish_timer->async_wait(
        [self = shared_from_this(), key](const boost::system::error_code& error) {
          if (!error) self->FinishLate(key);
        });
  }

  // Without a coordinator, or one whose disk is full, the files wait: both pass. One that answers
  // and takes no more is told how much is missing, and given time once more to hear that.
  void FinishLate(const TaskKey& key) {
    const auto found = tasks_.find(key);
    if (found == tasks_.end()) return;
    TaskLogs& task = found->second;
    if (!answered_) return AwaitFinish(key, &task);
    uint64_t given_up = 0;
    for (auto& [rank, log] : task.ranks) {
      if (log.given_up == 0) given_up += GiveUp(&log);
    }
    if (given_up == 0) return Drop(key);
    HEDDLE_WARN("log not sent to its end", {"task", ToText(key)}, {"bytes", given_up});
    AwaitFinish(key, &task);
    PumpSoon();
  }

  // Returns how much.
  static uint64_t GiveUp(RankLog* log) {
    log->given_up = FileSize(log->path) - log->offset;
    log->refused = false;
    return log->given_up;
  }

  void EnsureInotify() {
    if (inotify_.is_open()) return;
    const int fd = inotify_init1(IN_CLOEXEC | IN_NONBLOCK);
    if (fd < 0) return;
    inotify_.assign(fd);
    ReadInotify();
  }

  void ReadInotify() {
    inotify_.async_read_some(
        boost::asio::buffer(events_),
        [self = shared_from_this()](const boost::system::error_code& error, size_t) {
          if (error) return;
          self->PumpSoon();
          self->ReadInotify();
        });
  }

  void PumpSoon() {
    if (collecting_ || stopping_) return;
    collecting_ = true;
    collect_.expires_after(kCollect);
    collect_.async_wait([self = shared_from_this()](const boost::system::error_code& error) {
      self->collecting_ = false;
      if (!error) self->Pump();
    });
  }

  void Open() {
    auto stream = std::make_shared<Stream>(
        io_,
        Stream::Handlers{[self = shared_from_this()](const v1::LogAck& ack) { self->OnAck(ack); },
                         [self = shared_from_this()](const Status& why) { self->OnDone(why); }});
    stub_->async()->AppendLogs(stream->context(), stream.get());
    stream_ = stream;
    stream->Start();
    for (auto& [key, task] : tasks_) {
      for (auto& [rank, log] : task.ranks) log.known = log.in_flight = log.refused = false;
    }
    PumpSoon();
  }

  void OnDone(const Status& why) {
    stream_.reset();
    answered_ = false;
    if (stopping_) {
      if (stopped_) boost::asio::post(*io_, std::exchange(stopped_, nullptr));
      return;
    }
    HEDDLE_DEBUG("log stream ended", {"why", Message(why)});
    retry_.expires_after(backoff_);
    backoff_ = std::min(backoff_ * 2, kBackoffMax);
    retry_.async_wait([self = shared_from_this()](const boost::system::error_code& error) {
      if (!error && self->stream_ == nullptr && !self->tasks_.empty()) self->Open();
    });
  }

  // Sends what is due; drops tasks that are complete.
  void Pump() {
    if (stream_ == nullptr && wanted_ && !tasks_.empty()) return Open();
    std::vector<TaskKey> complete;
    for (auto& [key, task] : tasks_) {
      bool all_sent = true;
      for (auto& [rank, log] : task.ranks) {
        if (log.refused && task.finished) GiveUp(&log);
        if (log.refused || IsSent(log)) continue;
        all_sent = false;
        if (stream_ != nullptr && !log.in_flight) SendChunk(key, rank, &log);
      }
      if (all_sent && task.finished) complete.push_back(key);
    }
    for (const TaskKey& key : complete) Drop(key);
  }

  static bool IsSent(const RankLog& log) {
    const uint64_t size = FileSize(log.path);
    const uint64_t lost = Lost(log);
    if (log.in_flight || lost != log.lost || (size != log.offset && log.given_up == 0))
      return false;
    // A rank that wrote nothing needs no word with the coordinator.
    return log.known || size + lost == 0;
  }

  void SendChunk(const TaskKey& key, uint32_t rank, RankLog* log) {
    v1::LogChunk chunk;
    chunk.set_job(log->job);
    chunk.set_fence(key.fence);
    chunk.set_attempt(log->attempt);
    chunk.set_rank(rank);
    chunk.set_worker_id(worker_id_);
    chunk.set_offset(log->offset);
    // The first chunk of a stream is empty: its answer says where to go on.
    if (log->known && log->given_up == 0) chunk.set_data(ReadAt(log->path, log->offset));
    log->telling = Lost(*log);
    if (log->telling > 0) chunk.set_lost(log->telling);
    log->in_flight = true;
    log->sent_data = !chunk.data().empty();
    stream_->Send(std::move(chunk));
  }

  void OnAck(const v1::LogAck& ack) {
    backoff_ = kFirstBackoff;
    answered_ = true;
    for (auto& [key, task] : tasks_) {
      if (key.fence != ack.fence()) continue;
      const auto log = task.ranks.find(ack.rank());
      if (log == task.ranks.end()) continue;
      const bool moved = ack.next_offset() > log->second.offset;
      log->second.refused = log->second.known && log->second.sent_data && !moved;
      log->second.known = true;
      log->second.in_flight = false;
      log->second.lost = log->second.telling;
      log->second.offset = std::min(ack.next_offset(), FileSize(log->second.path));
      if (moved && task.finished) AwaitFinish(key, &task);
    }
    Pump();
  }

  void Drop(const TaskKey& key) {
    const auto found = tasks_.find(key);
    if (found == tasks_.end()) return;
    TaskLogs task = std::move(found->second);
    tasks_.erase(found);
    if (task.watch >= 0 && inotify_.is_open()) {
      inotify_rm_watch(inotify_.native_handle(), task.watch);
    }
    if (task.finish_timer != nullptr) task.finish_timer->cancel();
    if (task.finished) task.finished();
  }

  boost::asio::io_context* const io_;
  const milliseconds timeout_;
  const std::unique_ptr<v1::WorkerLink::Stub> stub_;
  const std::string worker_id_;
  boost::asio::posix::stream_descriptor inotify_;
  char events_[4096];
  boost::asio::steady_timer collect_;
  boost::asio::steady_timer retry_;
  std::map<TaskKey, TaskLogs> tasks_;
  std::shared_ptr<Stream> stream_;
  milliseconds backoff_ = kFirstBackoff;
  bool wanted_ = false;
  bool answered_ = false;  // the coordinator, on this stream
  bool collecting_ = false;
  bool stopping_ = false;
  std::function<void()> stopped_;
};

LogShipper::LogShipper(boost::asio::io_context* io, std::shared_ptr<grpc::Channel> channel,
                       std::string worker_id, milliseconds timeout)
    : impl_(std::make_shared<Impl>(io, std::move(channel), std::move(worker_id), timeout)) {}
LogShipper::~LogShipper() = default;
void LogShipper::Watch(const TaskFolder& folder) { impl_->Watch(folder); }
void LogShipper::Add(const TaskFolder& folder, uint32_t rank) { impl_->Add(folder, rank); }
void LogShipper::Poke(const TaskKey& key) { impl_->Poke(key); }
void LogShipper::Finish(const TaskKey& key, std::function<void()> done) {
  impl_->Finish(key, std::move(done));
}
void LogShipper::Connect() { impl_->Connect(); }
void LogShipper::Stop(std::function<void()> done) { impl_->Stop(std::move(done)); }

}  // namespace heddle::worker
