#include "tests/worker/trainer/fake_worker.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <fstream>
#include <iostream>
#include <sstream>

#include "base/ids/ids.h"
#include "base/status/status.h"
#include "checkpoint/catalog/coverage.h"

namespace heddle::trainer {

namespace {

using control::FrameType;
using heddle::v1::CheckpointRecord;
using heddle::v1::CheckpointReply;

constexpr uint64_t kJob = 123456789;

void WriteAll(int fd, const std::string& bytes) {
  size_t done = 0;
  while (done < bytes.size()) {
    const ssize_t sent = send(fd, bytes.data() + done, bytes.size() - done, MSG_NOSIGNAL);
    if (sent <= 0) {
      return;  // the rank is gone; its end is noted elsewhere
    }
    done += static_cast<size_t>(sent);
  }
}

// What the shared page tells of a rank that hangs.
std::string WhereIs(control::RankPage& page) {
  const control::Progress progress = page.ReadProgress();
  const uint64_t head = page.ring_head().load();
  const control::CollectiveEntry& entry = page.ring()[head % control::kRingEntries];
  return Str("step ", progress.step, ", phase ", progress.phase, ", collective ", head, " (op ",
             entry.op, ", ", entry.count, " elements) ", entry.ended_ns == 0 ? "open" : "done");
}

template <typename Message>
Message Parsed(const control::Frame& frame) {
  Message message;
  HEDDLE_CHECK(message.ParseFromString(frame.payload));
  return message;
}

}  // namespace

FakeAttempt::FakeAttempt(FakeAttemptOptions options)
    : options_(std::move(options)), ranks_(options_.ranks) {
  for (uint32_t rank = 0; rank < options_.ranks; ++rank) {
    Spawn(rank);
  }
  for (uint32_t rank = 0; rank < options_.ranks; ++rank) {
    ranks_[rank].reader = std::thread([this, rank] { Serve(rank); });
  }
}

FakeAttempt::~FakeAttempt() {
  for (uint32_t rank = 0; rank < options_.ranks; ++rank) {
    Kill(rank, SIGKILL);
  }
  Wait(10);
  for (Rank& rank : ranks_) {
    rank.reader.join();
    close(rank.fd);
  }
}

void FakeAttempt::Spawn(uint32_t rank) {
  int ends[2];
  HEDDLE_CHECK(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends) == 0);
  const std::string page = Str(options_.folder, "/page-", options_.fence, "-", rank);
  ranks_[rank].page = control::RankPage::Create(page);
  HEDDLE_CHECK(ranks_[rank].page != nullptr);
  ranks_[rank].page->PublishPermit(
      {.fence = options_.fence, .deadline_ns = options_.permit ? INT64_MAX : 0});
  const std::string log = Str(options_.folder, "/log-", options_.fence, "-", rank);
  const std::vector<std::string> environment = {
      "HEDDLE_CONTROL=fd:3", Str("HEDDLE_FENCE=", options_.fence), Str("HEDDLE_RANK=", rank),
      Str("OMP_NUM_THREADS=", options_.threads), "PATH=/usr/bin:/bin"};
  std::vector<char*> variables;
  for (const std::string& variable : environment) {
    variables.push_back(const_cast<char*>(variable.c_str()));
  }
  variables.push_back(nullptr);
  char* const arguments[] = {const_cast<char*>(options_.binary.c_str()), nullptr};
  const int pid = fork();
  if (pid == 0) {
    const int out = open(log.c_str(), O_CREAT | O_WRONLY | O_TRUNC, 0644);
    dup2(out, 1);
    dup2(out, 2);
    // dup2 onto itself would keep the close-on-exec flag.
    const int end = fcntl(ends[1], F_DUPFD, 10);
    dup2(end, 3);
    close(end);
    execve(options_.binary.c_str(), arguments, variables.data());
    _exit(127);
  }
  close(ends[1]);
  ranks_[rank].pid = pid;
  ranks_[rank].fd = ends[0];
}

void FakeAttempt::Serve(uint32_t rank) {
  control::FrameReader reader;
  std::vector<char> buffer(64 << 10);
  while (true) {
    const ssize_t got = recv(ranks_[rank].fd, buffer.data(), buffer.size(), 0);
    if (got <= 0) {
      break;
    }
    reader.Append({buffer.data(), static_cast<size_t>(got)});
    control::Frame frame;
    while (reader.Next(&frame) == control::FrameReader::Result::kFrame) {
      Handle(rank, frame);
    }
  }
  int status = 0;
  waitpid(ranks_[rank].pid, &status, 0);
  const std::lock_guard<std::mutex> lock(mutex_);
  ranks_[rank].end = FakeRankEnd{.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1,
                                 .signal = WIFSIGNALED(status) ? WTERMSIG(status) : 0,
                                 .words = ranks_[rank].words};
  changed_.notify_all();
}

void FakeAttempt::Send(uint32_t rank, FrameType type,
                       const google::protobuf::MessageLite& message) {
  WriteAll(ranks_[rank].fd,
           control::EncodeFrame(type, options_.fence, rank, message.SerializeAsString()));
}

heddle::v1::RankSpec FakeAttempt::SpecOf(uint32_t rank) const {
  heddle::v1::RankSpec spec;
  *spec.mutable_config() = options_.config;
  spec.set_job(ToText(JobId{kJob}));
  spec.set_attempt(options_.attempt);
  spec.set_fence(options_.fence);
  spec.set_rank(rank);
  spec.set_local_rank(rank);
  spec.set_world_size(options_.ranks);
  spec.set_checkpoint_root(options_.checkpoint_root);
  spec.set_attempt_dir(Str(ToText(JobId{kJob}), "/f", options_.fence));
  for (const CheckpointRecord& record : options_.restore) {
    *spec.add_restore() = record;
  }
  spec.set_page(Str(options_.folder, "/page-", options_.fence, "-", rank));
  spec.set_data_address("127.0.0.1");
  spec.set_threads(options_.threads);
  return spec;
}

void FakeAttempt::Handle(uint32_t rank, const control::Frame& frame) {
  switch (frame.header.type) {
    case FrameType::kHello:
      return Send(rank, FrameType::kSpec, SpecOf(rank));
    case FrameType::kReady:
      return OnReady();
    case FrameType::kJoined: {
      const std::lock_guard<std::mutex> lock(mutex_);
      start_step_ = Parsed<heddle::v1::RankJoined>(frame).start_step();
      return;
    }
    case FrameType::kProgress:
      return OnProgress(Parsed<heddle::v1::RankProgress>(frame));
    case FrameType::kOpenCheckpoint:
      return OnOpen(rank, Parsed<heddle::v1::OpenCheckpoint>(frame));
    case FrameType::kSeal:
      return OnSeal(rank, Parsed<heddle::v1::SealShard>(frame));
    case FrameType::kRendezvous:
      return Send(rank, FrameType::kRendezvousReply,
                  rendezvous_.Answer(rank, Parsed<heddle::v1::RendezvousRequest>(frame)));
    case FrameType::kDamage: {
      const std::lock_guard<std::mutex> lock(mutex_);
      damages_.push_back(Parsed<heddle::v1::DamageReport>(frame));
      return;
    }
    case FrameType::kExit: {
      const std::lock_guard<std::mutex> lock(mutex_);
      ranks_[rank].words = Parsed<heddle::v1::RankExit>(frame);
      return;
    }
    default:
      HEDDLE_CHECK(false, "a rank sent ", control::ToText(frame.header.type));
  }
}

void FakeAttempt::OnReady() {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (++ready_ < options_.ranks) {
    return;
  }
  heddle::v1::StartRank start;
  start.set_world_size(options_.ranks);
  start.set_secret(Str("secret-", options_.fence));
  for (uint32_t peer = 0; peer < options_.ranks; ++peer) {
    Send(peer, FrameType::kStart, start);
  }
}

void FakeAttempt::OnProgress(const heddle::v1::RankProgress& progress) {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (const heddle::v1::MetricPoint& point : progress.points()) {
    points_[point.step()] = point;
  }
  deferred_ = progress.checkpoints_deferred();
  changed_.notify_all();
}

void FakeAttempt::OnOpen(uint32_t rank, const heddle::v1::OpenCheckpoint& open) {
  CheckpointReply reply;
  reply.set_request(open.request());
  reply.set_step(open.step());
  reply.set_verdict(options_.verdict ? options_.verdict(open.step())
                                     : heddle::v1::CHECKPOINT_VERDICT_OK);
  reply.set_current_fence(options_.fence);
  Send(rank, FrameType::kCheckpointReply, reply);
}

void FakeAttempt::OnSeal(uint32_t rank, const heddle::v1::SealShard& seal) {
  CheckpointReply reply;
  reply.set_request(seal.request());
  reply.set_step(seal.step());
  reply.set_current_fence(options_.fence);
  reply.set_verdict(options_.verdict ? options_.verdict(seal.step())
                                     : heddle::v1::CHECKPOINT_VERDICT_OK);
  if (reply.verdict() != heddle::v1::CHECKPOINT_VERDICT_OK) {
    return Send(rank, FrameType::kCheckpointReply, reply);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  CheckpointRecord& record = open_[seal.step()];
  record.set_job(kJob);
  record.set_fence(options_.fence);
  record.set_step(seal.step());
  record.set_attempt(options_.attempt);
  record.set_world_size(options_.ranks);
  record.set_dir(checkpoint::StepDir(Str(ToText(JobId{kJob}), "/f", options_.fence), seal.step()));
  heddle::v1::RankSeal* part = record.add_seals();
  part->set_rank(rank);
  *part->mutable_files() = seal.files();
  if (seal.has_train_state()) {
    *record.mutable_tensors() = seal.tensors();
    *record.mutable_train_state() = seal.train_state();
  }
  const bool last = record.seals_size() == static_cast<int>(options_.ranks);
  if (last) {
    const Status whole = checkpoint::CheckCoverage(record);
    HEDDLE_CHECK(whole.ok(), Message(whole));
    record.set_state(heddle::v1::CHECKPOINT_STATE_COMMITTED);
    committed_.push_back(record);
    reply.set_verdict(heddle::v1::CHECKPOINT_VERDICT_COMMITTED);
    changed_.notify_all();
  }
  Send(rank, FrameType::kCheckpointReply, reply);
  for (uint32_t other = 0; last && other < options_.ranks; ++other) {
    if (other != rank) {
      reply.set_request(0);
      Send(other, FrameType::kCheckpointReply, reply);
    }
  }
}

bool FakeAttempt::AllEnded() const {
  for (const Rank& rank : ranks_) {
    if (!rank.end.has_value()) {
      return false;
    }
  }
  return true;
}

bool FakeAttempt::WaitForStep(uint64_t step) {
  std::unique_lock<std::mutex> lock(mutex_);
  const auto there = [&] { return !points_.empty() && points_.rbegin()->first >= step; };
  changed_.wait_for(lock, std::chrono::seconds(120), [&] { return there() || AllEnded(); });
  return there();
}

std::vector<FakeRankEnd> FakeAttempt::Wait(int seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  if (!changed_.wait_for(lock, std::chrono::seconds(seconds), [this] { return AllEnded(); })) {
    for (const Rank& rank : ranks_) {
      std::cout << "still there: " << WhereIs(*rank.page) << "\n"
                << Log(static_cast<uint32_t>(&rank - ranks_.data())) << "\n";
      if (!rank.end.has_value()) {
        kill(rank.pid, SIGKILL);
      }
    }
    changed_.wait(lock, [this] { return AllEnded(); });
  }
  std::vector<FakeRankEnd> ends;
  for (const Rank& rank : ranks_) {
    ends.push_back(*rank.end);
  }
  return ends;
}

void FakeAttempt::Kill(uint32_t rank, int signal) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!ranks_[rank].end.has_value()) {
    kill(ranks_[rank].pid, signal);
  }
}

void FakeAttempt::Stop(heddle::v1::StopMode mode) {
  heddle::v1::StopRank stop;
  stop.set_mode(mode);
  for (uint32_t rank = 0; rank < options_.ranks; ++rank) {
    Send(rank, FrameType::kStop, stop);
  }
}

void FakeAttempt::SetPermit(bool permit) {
  for (const Rank& rank : ranks_) {
    rank.page->PublishPermit({.fence = options_.fence, .deadline_ns = permit ? INT64_MAX : 0});
  }
}

void FakeAttempt::DropLinks() {
  for (const Rank& rank : ranks_) {
    shutdown(rank.fd, SHUT_RDWR);
  }
}

std::map<uint64_t, heddle::v1::MetricPoint> FakeAttempt::points() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return points_;
}

std::vector<CheckpointRecord> FakeAttempt::committed() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return committed_;
}

std::vector<heddle::v1::DamageReport> FakeAttempt::damages() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return damages_;
}

uint64_t FakeAttempt::deferred() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return deferred_;
}

std::optional<uint64_t> FakeAttempt::start_step() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return start_step_;
}

std::string FakeAttempt::Log(uint32_t rank) const {
  std::ifstream file(Str(options_.folder, "/log-", options_.fence, "-", rank));
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

}  // namespace heddle::trainer
