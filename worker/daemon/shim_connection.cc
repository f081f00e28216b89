#include "worker/daemon/shim_connection.h"

#include <fcntl.h>
#include <spawn.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <utility>

#include <boost/asio/buffer.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/write.hpp>

namespace heddle::worker {
namespace {

using control::Frame;
using control::FrameReader;
using control::FrameType;

constexpr size_t kReadBytes = 65536;
constexpr std::string_view kReady = "ready\n";
constexpr std::string_view kStartedBefore = "started before";

// Runs `shim run task_dir` with stdout on a pipe; returns the reading end.
StatusOr<int> SpawnShim(const std::string& shim, const std::string& task_dir, int* pid) {
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) != 0) return FromErrno("pipe");
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, fds[1], STDOUT_FILENO);
  posix_spawnattr_t attributes;
  posix_spawnattr_init(&attributes);
  // gRPC's threads block signals and the daemon ignores some; the shim starts from defaults.
  sigset_t none, all;
  sigemptyset(&none);
  sigfillset(&all);
  posix_spawnattr_setsigmask(&attributes, &none);
  posix_spawnattr_setsigdefault(&attributes, &all);
  posix_spawnattr_setflags(&attributes, POSIX_SPAWN_SETSIGMASK | POSIX_SPAWN_SETSIGDEF);
  std::string program = shim, verb = "run", folder = task_dir;
  char* argv[] = {program.data(), verb.data(), folder.data(), nullptr};
  const int error = posix_spawn(pid, shim.c_str(), &actions, &attributes, argv, environ);
  posix_spawn_file_actions_destroy(&actions);
  posix_spawnattr_destroy(&attributes);
  close(fds[1]);
  if (error != 0) {
    close(fds[0]);
    return FromErrno("start", shim, error);
  }
  return fds[0];
}

}  // namespace

ShimConnection::ShimConnection(boost::asio::io_context* io, std::string task_dir, Handlers handlers)
    : io_(io),
      task_dir_(std::move(task_dir)),
      handlers_(std::move(handlers)),
      word_pipe_(*io),
      socket_(*io) {}

void ShimConnection::Start(const std::string& shim) {
  StatusOr<int> pipe = SpawnShim(shim, task_dir_, &shim_pid_);
  if (!pipe.ok()) {
    boost::asio::post(*io_, [self = shared_from_this(), status = pipe.status()] {
      if (!self->closed_) self->handlers_.on_started(status);
    });
    return;
  }
  word_pipe_.assign(*pipe);
  ReadWord();
}

void ShimConnection::ReadWord() {
  buffer_.resize(kReadBytes);
  word_pipe_.async_read_some(
      boost::asio::buffer(buffer_),
      [self = shared_from_this()](const boost::system::error_code& error, size_t count) {
        self->word_.append(self->buffer_, 0, count);
        if (!error && self->word_ != kReady) return self->ReadWord();
        self->word_pipe_.close();
        // The process we started has forked twice and is about to end, if it did not already.
        waitpid(self->shim_pid_, nullptr, 0);
        if (self->closed_) return;
        if (self->word_ == kReady) return self->handlers_.on_started(OkStatus());
        const std::string text = self->word_.empty() ? "it ended without a word" : self->word_;
        const bool before = text.find(kStartedBefore) != std::string::npos;
        const std::string what = Str("heddle-shim: ", text.substr(0, text.find('\n')));
        self->handlers_.on_started(before ? AlreadyExists(what) : FailedPrecondition(what));
      });
}

Status ShimConnection::Connect() {
  // The path of a task may exceed what a socket address holds; the folder's descriptor never does.
  const int folder = open(task_dir_.c_str(), O_PATH | O_DIRECTORY | O_CLOEXEC);
  if (folder < 0) return FromErrno("open", task_dir_);
  const std::string path = Str("/proc/self/fd/", folder, "/shim.sock");
  boost::system::error_code error;
  boost::asio::local::stream_protocol::socket socket(*io_);
  socket.connect(boost::asio::local::stream_protocol::endpoint(path), error);
  close(folder);
  if (error) return Unavailable(Str("shim.sock of ", task_dir_, ": ", error.message()));
  fcntl(socket.native_handle(), F_SETFD, FD_CLOEXEC);
  socket_ = std::move(socket);
  received_ = 0;
  reader_ = FrameReader();
  Read();
  return OkStatus();
}

void ShimConnection::Close() {
  closed_ = true;
  boost::system::error_code ignored;
  socket_.close(ignored);
  word_pipe_.close(ignored);
}

void ShimConnection::Send(FrameType type, uint64_t fence, uint32_t rank, std::string_view payload) {
  if (!socket_.is_open()) return;
  queue_.push_back(control::EncodeFrame(type, fence, rank, payload));
  if (!writing_) Write();
}

void ShimConnection::Write() {
  writing_ = true;
  boost::asio::async_write(
      socket_, boost::asio::buffer(queue_.front()),
      [self = shared_from_this()](const boost::system::error_code& error, size_t) {
        self->writing_ = false;
        if (error) return;  // the read side reports it
        self->queue_.pop_front();
        if (!self->queue_.empty()) self->Write();
      });
}

void ShimConnection::Read() {
  buffer_.resize(kReadBytes);
  socket_.async_read_some(
      boost::asio::buffer(buffer_),
      [self = shared_from_this()](const boost::system::error_code& error, size_t count) {
        if (self->closed_) return;
        if (error) return self->Fail(Unavailable(Str("shim: ", error.message())));
        self->reader_.Append(std::string_view(self->buffer_.data(), count));
        Frame frame;
        FrameReader::Result result;
        while ((result = self->reader_.Next(&frame)) == FrameReader::Result::kFrame) {
          const uint64_t number = control::IsReliable(frame.header.type) ? ++self->received_ : 0;
          self->handlers_.on_frame(frame, number);
          if (self->closed_ || !self->socket_.is_open()) return;
        }
        if (result == FrameReader::Result::kBad) {
          return self->Fail(DataLoss(Str("shim: ", self->reader_.error())));
        }
        self->Read();
      });
}

void ShimConnection::Fail(const Status& status) {
  boost::system::error_code ignored;
  socket_.close(ignored);
  queue_.clear();
  if (!closed_) handlers_.on_closed(status);
}

}  // namespace heddle::worker
