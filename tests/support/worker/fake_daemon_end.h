// The daemon's end of a shim, for tests: a task folder made by hand, the real heddle-shim, blocking
// sends and waits on the frames that came.
#pragma once

#include <sys/types.h>

#include <chrono>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "worker/control/control_frame.h"
#include "worker/control/rank_page.h"
#include "worker/control/task_files.h"

namespace heddle::test {

class FakeDaemonEnd {
 public:
  // `dir` is the task folder; it is made with everything but `launch`.
  explicit FakeDaemonEnd(std::string dir, int64_t max_orphan_ms = 600'000);
  // SIGKILLs the shim if it lives.
  ~FakeDaemonEnd();

  // A rank that runs `/bin/sh -c script`, or `program` with FAKE_TRAINER=`wishes`.
  static control::RankLaunch Shell(uint32_t rank, const std::string& script);
  control::RankLaunch Trainer(uint32_t rank, const std::string& wishes) const;
  // Writes `launch` and runs the shim. Its word: "ready", or the error.
  std::string Start(const control::LaunchFile& launch);
  control::LaunchFile Launch(std::vector<control::RankLaunch> ranks, bool control = true) const;

  bool Connect();
  void Disconnect();
  bool connected() const { return fd_ >= 0; }
  void Send(control::FrameType type, uint32_t rank, const std::string& payload);
  void SendRaw(const std::string& bytes);
  void StopTask(control::StopTaskMode mode, int64_t grace_ms);
  void Ack(uint64_t number);

  // Reads until a frame matches (also among those read before); nothing after `limit` or at the
  // end.
  std::optional<control::Frame> WaitFor(
      control::FrameType type, std::optional<uint32_t> rank = {},
      std::chrono::milliseconds limit = std::chrono::milliseconds(10'000));
  // Reads until the connection ends.
  bool WaitForEnd(std::chrono::milliseconds limit = std::chrono::milliseconds(10'000));
  const std::vector<control::Frame>& frames() const { return frames_; }
  // Number of the reliable frame at `index` of frames(), as an ACK names it.
  uint64_t NumberOf(size_t index) const;

  // The exit of `rank` by frame; gives the daemon's SPEC and START to a fake trainer on the way if
  // `serve`. Fails the test if none comes.
  control::RankExitedPod WaitForExit(uint32_t rank);
  void ServeLaunch(uint32_t rank);

  pid_t shim_pid() const;
  const std::string& dir() const { return dir_; }
  control::ContactFile* contact() { return contact_.get(); }
  std::string Log(uint32_t rank) const;
  std::vector<control::Frame> ExitFile() const;
  static std::string BinDir();

  static constexpr uint64_t kFence = 0x123456789abcull;

 private:
  bool ReadSome(std::chrono::milliseconds limit);

  std::string dir_;
  std::unique_ptr<control::ContactFile> contact_;
  int fd_ = -1;
  control::FrameReader reader_;
  std::vector<control::Frame> frames_;
};

}  // namespace heddle::test
