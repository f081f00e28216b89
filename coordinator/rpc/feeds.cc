#include "coordinator/rpc/feeds.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <optional>
#include <utility>

#include "base/net/grpc_channel.h"
#include "coordinator/rpc/core.h"
#include "coordinator/rpc/log_files.h"
#include "coordinator/rpc/stream_writer.h"
#include "coordinator/rpc/views.h"

namespace heddle::rpc {
namespace {

constexpr size_t kPiece = 512;
// Frames a live reader may lag behind before it is told to start over (O2).
constexpr size_t kQueueMax = 1024;
constexpr size_t kLogPieceBytes = 64 * 1024;
// Memory of the lines queued for one reader of logs; the rest of the file waits on the disk (P10).
constexpr size_t kLogQueueBytes = 1024 * 1024;
constexpr size_t kLineOverhead = 128;  // of the message around a line's text
constexpr int64_t kBeatMs = 5000;

bool JobDone(Core& core, JobId job) {
  const v1::JobRecord* record = core.state().job(job);
  return record == nullptr || record->state() == v1::JOB_STATE_DONE;
}

// ---- events ----

class WatchFeed : public std::enable_shared_from_this<WatchFeed> {
 public:
  using Writer = StreamWriter<v1::WatchFrame>;
  WatchFeed(Core* core, std::shared_ptr<Writer> writer, const v1::WatchRequest& request)
      : core_(core), writer_(std::move(writer)), request_(request) {}

  // State thread.
  void Start() {
    if (!request_.job().empty()) {
      const StatusOr<JobId> job = FindJob(core_->state(), request_.job());
      if (!job.ok()) {
        writer_->Close(net::ToGrpc(job.status()));
        return;
      }
      job_ = job->value;
    }
    next_ = request_.from_seq() > 0 ? request_.from_seq() : core_->newest_durable_seq() + 1;
    writer_->OnDrained([feed = weak_from_this(), core = core_] {
      core->Post([feed] {
        if (const std::shared_ptr<WatchFeed> self = feed.lock(); self != nullptr && !self->live_) {
          self->Pump(self);
        }
      });
    });
    self_ = shared_from_this();
    Pump(self_);
  }

 private:
  void Pump(const std::shared_ptr<WatchFeed>& self) {
    const StatusOr<std::vector<v1::EventRecord>> events = core_->ReadEvents(next_, job_, kPiece);
    if (!events.ok()) {
      End(net::ToGrpc(events.status()));
      return;
    }
    for (const v1::EventRecord& event : *events) {
      if (!Send(event)) {
        self_.reset();
        return;
      }
    }
    if (events->size() == kPiece) {
      return;  // on_drained goes on
    }
    if (request_.no_follow()) {
      End(grpc::Status::OK);
      return;
    }
    live_ = true;
    core_->SubscribeEvents([self](const v1::EventRecord& event) { return self->OnEvent(event); });
    Beat(core_, self);
    self_.reset();
  }

  // Now and every 5 s: a reader that hears nothing for longer knows that the stream is dead.
  static void Beat(Core* core, const std::weak_ptr<WatchFeed>& weak) {
    const std::shared_ptr<WatchFeed> feed = weak.lock();
    if (feed == nullptr) {
      return;
    }
    if (!feed->writer_->open()) {
      return;
    }
    v1::WatchFrame beat;
    beat.set_kind(v1::WatchFrame::KIND_HEARTBEAT);
    beat.set_seq(feed->next_ - 1);
    core->AfterDurable([writer = feed->writer_, beat](const Status&) { writer->Push(beat); });
    core->PostAfter(kBeatMs, [core, weak] { Beat(core, weak); });
  }

  bool OnEvent(const v1::EventRecord& event) {
    if (event.seq() < next_ || (job_ != 0 && event.job() != job_)) {
      return writer_->open();
    }
    if (writer_->queued() >= kQueueMax) {
      v1::WatchFrame resync;
      resync.set_kind(v1::WatchFrame::KIND_RESYNC);
      resync.set_seq(event.seq());
      writer_->Push(std::move(resync));
      writer_->Close(grpc::Status::OK);
      return false;
    }
    return Send(event);
  }

  bool Send(const v1::EventRecord& event) {
    next_ = event.seq() + 1;
    v1::WatchFrame frame;
    frame.set_kind(v1::WatchFrame::KIND_EVENT);
    frame.set_seq(event.seq());
    *frame.mutable_event() = EventView(event);
    if (const v1::JobRecord* job = core_->state().job(JobId{event.job()}); job != nullptr) {
      *frame.mutable_job() = JobView(*core_, *job);
    }
    // The view may show a later change that is not durable yet (P8).
    core_->AfterDurable(
        [writer = writer_, frame = std::move(frame)](const Status& durable) mutable {
          if (!durable.ok()) {
            frame.clear_job();  // the event itself is durable
          }
          writer->Push(std::move(frame));
        });
    return writer_->open();
  }

  void End(const grpc::Status& status) {
    core_->AfterDurable([writer = writer_, status](const Status&) { writer->Close(status); });
    self_.reset();
  }

  Core* const core_;
  const std::shared_ptr<Writer> writer_;
  const v1::WatchRequest request_;
  uint64_t job_ = 0;
  uint64_t next_ = 1;
  bool live_ = false;
  std::shared_ptr<WatchFeed> self_;  // while history is read
};

// ---- metric points ----

class MetricFeed : public std::enable_shared_from_this<MetricFeed> {
 public:
  using Writer = StreamWriter<v1::MetricPoint>;
  MetricFeed(Core* core, std::shared_ptr<Writer> writer, const v1::MetricsRequest& request)
      : core_(core), writer_(std::move(writer)), request_(request) {}

  void Start() {
    const StatusOr<JobId> job = FindJob(core_->state(), request_.job());
    if (!job.ok()) {
      writer_->Close(net::ToGrpc(job.status()));
      return;
    }
    job_ = *job;
    writer_->OnDrained([feed = weak_from_this(), core = core_] {
      core->Post([feed] {
        if (const std::shared_ptr<MetricFeed> self = feed.lock(); self != nullptr && !self->live_) {
          self->Pump(self);
        }
      });
    });
    self_ = shared_from_this();
    Pump(self_);
  }

 private:
  void Pump(const std::shared_ptr<MetricFeed>& self) {
    const StatusOr<std::vector<v1::MetricPoint>> points =
        core_->ReadPoints(job_.value, last_, kPiece);
    if (!points.ok()) {
      End(net::ToGrpc(points.status()));
      return;
    }
    size_t sent = 0;
    for (const v1::MetricPoint& point : *points) {
      last_ = {point.attempt(), point.step()};
      if (point.step() >= request_.from_step()) {
        ++sent;
        if (!writer_->Push(point)) {
          self_.reset();
          return;
        }
      }
    }
    if (points->size() == kPiece) {
      if (sent == 0) {
        core_->Post([self] { self->Pump(self); });
      }
      return;
    }
    if (!request_.follow() || JobDone(*core_, job_)) {
      End(grpc::Status::OK);
      return;
    }
    live_ = true;
    core_->SubscribePoints(
        [self](uint64_t job, const v1::MetricPoint& point) { return self->OnPoint(job, point); });
    core_->SubscribeEvents([self](const v1::EventRecord& event) {
      if (event.job() == self->job_.value && JobDone(*self->core_, self->job_)) {
        self->writer_->Close(grpc::Status::OK);
      }
      return self->writer_->open();
    });
    self_.reset();
  }

  bool OnPoint(uint64_t job, const v1::MetricPoint& point) {
    if (job != job_.value || std::pair(point.attempt(), point.step()) <= last_ ||
        point.step() < request_.from_step()) {
      return writer_->open();
    }
    if (writer_->queued() >= kQueueMax) {
      writer_->Close(grpc::Status(grpc::StatusCode::UNAVAILABLE, "the reader is too slow"));
      return false;
    }
    last_ = {point.attempt(), point.step()};
    return writer_->Push(point);
  }

  void End(const grpc::Status& status) {
    writer_->Close(status);
    self_.reset();
  }

  Core* const core_;
  const std::shared_ptr<Writer> writer_;
  const v1::MetricsRequest request_;
  JobId job_;
  std::pair<uint32_t, uint64_t> last_ = {0, 0};
  bool live_ = false;
  std::shared_ptr<MetricFeed> self_;
};

// ---- logs ----

// Reads files on the file pool, as fast as its reader takes lines: a full queue ends a look, and
// the next one begins when the queue is empty. While following it looks again every 200 ms, which
// ends once the job is done and looks find nothing new.
class LogFeed : public std::enable_shared_from_this<LogFeed> {
 public:
  using Writer = StreamWriter<v1::LogLine>;
  LogFeed(Core* core, LogFiles* logs, std::shared_ptr<Writer> writer,
          const v1::LogsRequest& request)
      : core_(core), logs_(logs), writer_(std::move(writer)), request_(request) {}

  void Start() {
    const StatusOr<JobId> job = FindJob(core_->state(), request_.job());
    if (!job.ok()) {
      writer_->Close(net::ToGrpc(job.status()));
      return;
    }
    job_ = *job;
    // Holds this feed until the stream is over.
    writer_->OnDrained([self = shared_from_this()] { self->GoOn(); });
    Look();
  }

 private:
  enum class Sent { kNothing, kSome, kFull };

  // State thread: one look on the file pool.
  void Look() {
    const bool last = !request_.follow() || JobDone(*core_, job_);
    core_->PostFileWork([self = shared_from_this(), last] { self->LookNow(last); });
  }

  // File pool.
  void LookNow(bool last) {
    Sent sent = SendNew(!request_.follow());
    quiet_looks_ = last && sent == Sent::kNothing ? quiet_looks_ + 1 : 0;
    const bool end = last && (!request_.follow() || quiet_looks_ >= kQuietLooks);
    if (end && sent != Sent::kFull) {
      sent = SendNew(/*unfinished_too=*/true);
    }
    if (!writer_->open()) {
      return;
    }
    if (sent == Sent::kFull) {
      full_ = true;
      if (writer_->queued() == 0) {
        GoOn();  // it became empty before `full_` said that somebody waits for that
      }
    } else if (end) {
      writer_->Close(grpc::Status::OK);
    } else {
      core_->PostAfter(last ? kLastLookMs : kLookMs, [self = shared_from_this()] { self->Look(); });
    }
  }

  // The queue is empty; any thread.
  void GoOn() {
    if (full_.exchange(false)) {
      core_->Post([self = shared_from_this()] { self->Look(); });
    }
  }

  // Files that this reader wants. Who does not follow gets what was there at the first look: a
  // newer attempt must not cut off the rest, nor a fast writer make an endless stream of it.
  std::vector<LogFile> Wanted() {
    if (listed_.has_value() && !request_.follow()) {
      return *listed_;
    }
    std::vector<LogFile> files = logs_->List(job_);
    uint32_t attempt = request_.attempt();
    if (attempt == 0 && !request_.follow()) {
      for (const LogFile& file : files) {
        attempt = std::max(attempt, file.attempt);
      }
    }
    std::erase_if(files, [&](const LogFile& file) {
      return (attempt != 0 && file.attempt != attempt) ||
             (request_.has_rank() && file.rank != static_cast<uint32_t>(request_.rank()));
    });
    listed_ = files;
    return files;
  }

  // Whole lines that are new, and what follows the last of them if nothing more can come.
  Sent SendNew(bool unfinished_too) {
    std::vector<LogFile> files = Wanted();
    if (request_.follow() && !files.empty()) {
      // A rank that fills every queue must not keep the others waiting for ever.
      std::rotate(files.begin(), files.begin() + static_cast<int64_t>(turn_ % files.size()),
                  files.end());
    }
    Sent sent = Sent::kNothing;
    for (const LogFile& file : files) {
      const Sent now = SendFile(file, unfinished_too);
      if (now == Sent::kFull) {
        ++turn_;
        return now;
      }
      sent = std::max(sent, now);
      sent = std::max(sent, SendLoss(file, unfinished_too));
    }
    return sent;
  }

  // A line where bytes are missing tells how many, when it is reached and, if more were lost since,
  // at the end.
  Sent SendLoss(const LogFile& file, bool at_end) {
    uint64_t& told = losses_[{file.attempt, file.rank}];
    if (file.missing() == told || (told > 0 && !at_end)) {
      return Sent::kNothing;
    }
    told = file.missing();
    v1::LogLine line;
    line.set_offset(file.bytes);
    line.set_data(Str("... at least ", told, " bytes are missing: ", WhereLost(file), "\n"));
    line.set_lost(told);
    Push(file, std::move(line));
    return Sent::kSome;
  }

  static std::string WhereLost(const LogFile& file) {
    const std::string limit = "beyond the limit of a job's logs";
    const std::string worker = "lost on the worker (its log limit or a full disk)";
    if (file.lost == 0) return limit;
    return file.dropped == 0 ? worker : Str(file.dropped, " ", limit, ", ", file.lost, " ", worker);
  }

  Sent SendFile(const LogFile& file, bool unfinished_too) {
    const auto [place, first] = offsets_.try_emplace({file.attempt, file.rank}, 0);
    if (first && request_.has_tail()) {
      place->second = TailOffset(file);
    }
    // The end of a file that lost bytes is final.
    unfinished_too = unfinished_too || file.dropped > 0;
    Sent sent = Sent::kNothing;
    while (place->second < file.bytes) {
      if (!writer_->open() || writer_->queued_bytes() >= kLogQueueBytes) {
        return Sent::kFull;
      }
      const StatusOr<std::string> piece = LogFiles::Read(
          file.path, place->second, std::min<uint64_t>(kLogPieceBytes, file.bytes - place->second));
      if (!piece.ok() || piece->empty()) {
        return sent;
      }
      size_t used = 0;
      for (size_t end = piece->find('\n'); end != std::string::npos;
           end = piece->find('\n', used)) {
        SendLine(file, place->second + used, piece->substr(used, end + 1 - used));
        used = end + 1;
      }
      const bool whole_rest = used == 0 && (piece->size() == kLogPieceBytes || unfinished_too);
      if (whole_rest ||
          (unfinished_too && place->second + piece->size() >= file.bytes && used < piece->size())) {
        SendLine(file, place->second + used, piece->substr(used));
        used = piece->size();
      }
      if (used == 0) {
        return sent;  // an unfinished line
      }
      place->second += used;
      sent = Sent::kSome;
    }
    return sent;
  }

  uint64_t TailOffset(const LogFile& file) const {
    const uint64_t from = file.bytes > kLogPieceBytes * 16 ? file.bytes - kLogPieceBytes * 16 : 0;
    const StatusOr<std::string> text = LogFiles::Read(file.path, from, file.bytes - from);
    if (!text.ok()) {
      return 0;
    }
    int64_t lines = request_.tail();
    size_t at = text->size();
    if (at > 0 && (*text)[at - 1] == '\n') {
      --at;
    }
    while (at > 0 && lines > 0) {
      --at;
      if ((*text)[at] == '\n' && --lines == 0) {
        return from + at + 1;
      }
    }
    return lines == 0 && at > 0 ? file.bytes : from;
  }

  void SendLine(const LogFile& file, uint64_t offset, std::string data) {
    v1::LogLine line;
    line.set_offset(offset);
    line.set_data(std::move(data));
    Push(file, std::move(line));
  }

  void Push(const LogFile& file, v1::LogLine line) {
    line.set_attempt(file.attempt);
    line.set_rank(file.rank);
    const size_t bytes = line.data().size() + kLineOverhead;
    writer_->Push(std::move(line), bytes);
  }

  static constexpr int64_t kLookMs = 200;
  // A worker ships a rank's last words a moment after it reported the end.
  static constexpr int64_t kLastLookMs = 100;
  static constexpr int kQuietLooks = 2;
  Core* const core_;
  LogFiles* const logs_;
  const std::shared_ptr<Writer> writer_;
  const v1::LogsRequest request_;
  JobId job_;
  // Of the file pool only, one look at a time.
  std::optional<std::vector<LogFile>> listed_;
  std::map<std::pair<uint32_t, uint32_t>, uint64_t> offsets_;
  std::map<std::pair<uint32_t, uint32_t>, uint64_t> losses_;  // told so far
  size_t turn_ = 0;                                           // first file of the next look
  int quiet_looks_ = 0;                                       // since the job is done
  std::atomic<bool> full_ = false;                            // the next look waits for the reader
};

}  // namespace

grpc::ServerWriteReactor<v1::WatchFrame>* StartWatch(Core* core, const v1::WatchRequest& request) {
  const auto writer = StreamWriter<v1::WatchFrame>::Make();
  core->Post([feed = std::make_shared<WatchFeed>(core, writer, request)] { feed->Start(); });
  return writer.get();
}

grpc::ServerWriteReactor<v1::MetricPoint>* StartMetrics(Core* core,
                                                        const v1::MetricsRequest& request) {
  const auto writer = StreamWriter<v1::MetricPoint>::Make();
  core->Post([feed = std::make_shared<MetricFeed>(core, writer, request)] { feed->Start(); });
  return writer.get();
}

grpc::ServerWriteReactor<v1::LogLine>* StartLogs(Core* core, LogFiles* logs,
                                                 const v1::LogsRequest& request) {
  const auto writer = StreamWriter<v1::LogLine>::Make();
  core->Post([feed = std::make_shared<LogFeed>(core, logs, writer, request)] { feed->Start(); });
  return writer.get();
}

}  // namespace heddle::rpc
