#include "tests/support/worker/fake_daemon_end.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <utility>

#include "heddle/v1/control.pb.h"

namespace heddle::test {

using control::Frame;
using control::FrameReader;
using control::FrameType;
using std::chrono::milliseconds;

FakeDaemonEnd::FakeDaemonEnd(std::string dir, int64_t max_orphan_ms) : dir_(std::move(dir)) {
  for (const std::string& folder : {dir_, dir_ + "/logs", dir_ + "/scratch"}) {
    mkdir(folder.c_str(), 0700);
  }
  contact_ = control::ContactFile::Create(dir_ + "/contact", max_orphan_ms * 1'000'000);
}

FakeDaemonEnd::~FakeDaemonEnd() {
  Disconnect();
  if (shim_pid() > 0) kill(shim_pid(), SIGKILL);
}

std::string FakeDaemonEnd::BinDir() {
  return std::string(getenv("HEDDLE_BIN") == nullptr ? "build/bin" : getenv("HEDDLE_BIN"));
}

control::RankLaunch FakeDaemonEnd::Shell(uint32_t rank, const std::string& script) {
  control::RankLaunch launch;
  launch.rank = rank;
  launch.argv = {"/bin/sh", "-c", script};
  launch.env = {"PATH=/usr/bin:/bin", "HEDDLE_TEST_MARK=shell"};
  return launch;
}

control::RankLaunch FakeDaemonEnd::Trainer(uint32_t rank, const std::string& wishes) const {
  control::RankLaunch launch;
  launch.rank = rank;
  launch.argv = {BinDir() + "/heddle-fake-trainer"};
  launch.env = {"FAKE_TRAINER=" + wishes, "HEDDLE_CONTROL=fd:3",
                "HEDDLE_RANK=" + std::to_string(rank), "HEDDLE_FENCE=" + std::to_string(kFence),
                "HEDDLE_TASK_DIR=" + dir_};
  return launch;
}

control::LaunchFile FakeDaemonEnd::Launch(std::vector<control::RankLaunch> ranks,
                                          bool control) const {
  control::LaunchFile launch;
  launch.fence = kFence;
  launch.task = 0;
  launch.control = control;
  launch.ranks = std::move(ranks);
  for (control::RankLaunch& rank : launch.ranks) rank.env.push_back("HEDDLE_TEST_DIR=" + dir_);
  return launch;
}

std::string FakeDaemonEnd::Start(const control::LaunchFile& launch) {
  EXPECT_TRUE(control::WriteFileDurably(dir_ + "/launch", control::EncodeLaunch(launch)));
  int fds[2];
  EXPECT_EQ(pipe2(fds, O_CLOEXEC), 0);
  const pid_t pid = fork();
  if (pid == 0) {
    dup2(fds[1], STDOUT_FILENO);
    const std::string shim = BinDir() + "/heddle-shim";
    execl(shim.c_str(), shim.c_str(), "run", dir_.c_str(), nullptr);
    _exit(126);
  }
  close(fds[1]);
  std::string word;
  char buffer[256];
  ssize_t count = 0;
  while (word != "ready\n" && (count = read(fds[0], buffer, sizeof(buffer))) > 0) {
    word.append(buffer, static_cast<size_t>(count));
  }
  close(fds[0]);
  waitpid(pid, nullptr, 0);
  while (!word.empty() && word.back() == '\n') word.pop_back();
  return word;
}

bool FakeDaemonEnd::Connect() {
  Disconnect();
  frames_.clear();
  reader_ = FrameReader();
  fd_ = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  const std::string path = dir_ + "/shim.sock";
  strncpy(address.sun_path, path.c_str(), sizeof(address.sun_path) - 1);
  if (connect(fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) == 0) return true;
  Disconnect();
  return false;
}

void FakeDaemonEnd::Disconnect() {
  if (fd_ >= 0) close(fd_);
  fd_ = -1;
}

void FakeDaemonEnd::SendRaw(const std::string& bytes) {
  EXPECT_EQ(send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL),
            static_cast<ssize_t>(bytes.size()));
}
void FakeDaemonEnd::Send(FrameType type, uint32_t rank, const std::string& payload) {
  SendRaw(control::EncodeFrame(type, kFence, rank, payload));
}
void FakeDaemonEnd::StopTask(control::StopTaskMode mode, int64_t grace_ms) {
  control::StopTaskPod order;
  order.mode = static_cast<uint32_t>(mode);
  order.grace_ms = grace_ms;
  Send(FrameType::kStopTask, 0, std::string(control::AsBytes(order)));
}
void FakeDaemonEnd::Ack(uint64_t number) {
  control::AckPod ack;
  ack.number = number;
  Send(FrameType::kAck, 0, std::string(control::AsBytes(ack)));
}

bool FakeDaemonEnd::ReadSome(milliseconds limit) {
  pollfd fd = {fd_, POLLIN, 0};
  if (fd_ < 0 || poll(&fd, 1, static_cast<int>(limit.count())) <= 0) return false;
  char buffer[65536];
  const ssize_t count = read(fd_, buffer, sizeof(buffer));
  if (count <= 0) {
    Disconnect();
    return false;
  }
  reader_.Append(std::string_view(buffer, static_cast<size_t>(count)));
  Frame frame;
  FrameReader::Result result;
  while ((result = reader_.Next(&frame)) == FrameReader::Result::kFrame) frames_.push_back(frame);
  EXPECT_EQ(result, FrameReader::Result::kNeedMore) << reader_.error();
  return true;
}

std::optional<Frame> FakeDaemonEnd::WaitFor(FrameType type, std::optional<uint32_t> rank,
                                            milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  size_t seen = 0;
  while (true) {
    for (; seen < frames_.size(); ++seen) {
      const Frame& frame = frames_[seen];
      if (frame.header.type == type && (!rank.has_value() || frame.header.rank == *rank)) {
        return frame;
      }
    }
    const auto left =
        std::chrono::duration_cast<milliseconds>(deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0 || !ReadSome(left)) return std::nullopt;
  }
}

bool FakeDaemonEnd::WaitForEnd(milliseconds limit) {
  const auto deadline = std::chrono::steady_clock::now() + limit;
  while (fd_ >= 0) {
    const auto left =
        std::chrono::duration_cast<milliseconds>(deadline - std::chrono::steady_clock::now());
    if (left.count() <= 0) return false;
    ReadSome(left);
  }
  return true;
}

uint64_t FakeDaemonEnd::NumberOf(size_t index) const {
  uint64_t number = 0;
  for (size_t i = 0; i <= index && i < frames_.size(); ++i) {
    number += control::IsReliable(frames_[i].header.type);
  }
  return number;
}

control::RankExitedPod FakeDaemonEnd::WaitForExit(uint32_t rank) {
  control::RankExitedPod pod;
  const std::optional<Frame> frame = WaitFor(FrameType::kRankExited, rank);
  EXPECT_TRUE(frame.has_value()) << "no exit of rank " << rank;
  if (frame.has_value()) {
    EXPECT_TRUE(control::Unpack(frame->payload, &pod));
  }
  return pod;
}

void FakeDaemonEnd::ServeLaunch(uint32_t rank) {
  ASSERT_TRUE(WaitFor(FrameType::kHello, rank).has_value());
  const std::string page = dir_ + "/page-" + std::to_string(rank);
  if (access(page.c_str(), F_OK) != 0) {
    ASSERT_NE(control::RankPage::Create(page), nullptr);
  }
  v1::RankSpec spec;
  spec.set_rank(rank);
  spec.set_page(page);
  spec.set_world_size(1);
  Send(FrameType::kSpec, rank, spec.SerializeAsString());
  ASSERT_TRUE(WaitFor(FrameType::kReady, rank).has_value());
  Send(FrameType::kStart, rank, v1::StartRank().SerializeAsString());
}

pid_t FakeDaemonEnd::shim_pid() const {
  std::string text;
  control::ShimIdentity identity;
  if (!control::ReadWholeFile(dir_ + "/shim", &text) ||
      !control::DecodeShimIdentity(text, &identity) ||
      control::ProcessStartTicks(identity.pid) != identity.start_ticks) {
    return -1;
  }
  return identity.pid;
}

std::string FakeDaemonEnd::Log(uint32_t rank) const {
  std::string text;
  if (!control::ReadWholeFile(dir_ + "/logs/rank-" + std::to_string(rank) + ".log", &text))
    return "";
  return text;
}

std::vector<Frame> FakeDaemonEnd::ExitFile() const {
  std::vector<Frame> frames;
  std::string bytes;
  if (!control::ReadWholeFile(dir_ + "/exit", &bytes)) return frames;
  FrameReader reader;
  reader.Append(bytes);
  Frame frame;
  while (reader.Next(&frame) == FrameReader::Result::kFrame) frames.push_back(frame);
  EXPECT_TRUE(reader.AtBoundary());
  return frames;
}

}  // namespace heddle::test
