// The other end of heddle-trainer in tests: starts the real binary per rank with a socketpair and a
// shared page, and answers its frames as shim, daemon and coordinator together would. Commits are
// decided by the real coverage check, so that a record it hands out is one the coordinator would.
#pragma once

#include <condition_variable>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "heddle/v1/control.pb.h"
#include "heddle/v1/worker_link.pb.h"
#include "tests/worker/comm/fake_rendezvous.h"
#include "worker/control/control_frame.h"
#include "worker/control/rank_page.h"

namespace heddle::trainer {

struct FakeRankEnd {
  int code = -1;  // exit status; -1: killed by `signal`
  int signal = 0;
  std::optional<heddle::v1::RankExit> words;
};

struct FakeAttemptOptions {
  std::string binary;  // heddle-trainer
  std::string folder;  // for pages and logs; must exist
  std::string checkpoint_root;
  heddle::v1::RunConfig config;
  uint64_t fence = 1;
  uint32_t attempt = 1;
  uint32_t ranks = 1;
  uint32_t threads = 1;
  std::vector<heddle::v1::CheckpointRecord> restore;
  bool permit = true;
  // What Open and Seal are answered; OK lets the fake decide. May be empty.
  std::function<heddle::v1::CheckpointVerdict(uint64_t step)> verdict;
};

// One attempt of a job: all its ranks. Thread-safe.
class FakeAttempt {
 public:
  explicit FakeAttempt(FakeAttemptOptions options);
  // Kills what still runs.
  ~FakeAttempt();
  FakeAttempt(const FakeAttempt&) = delete;
  FakeAttempt& operator=(const FakeAttempt&) = delete;

  // Blocks until rank 0 reported `step` or every rank ended; true in the first case.
  bool WaitForStep(uint64_t step);
  // Blocks until all ranks ended; kills them after `seconds`.
  std::vector<FakeRankEnd> Wait(int seconds = 120);

  void Kill(uint32_t rank, int signal);
  void Stop(heddle::v1::StopMode mode);
  void SetPermit(bool permit);
  // Closes the control sockets, as if the shim had died.
  void DropLinks();

  std::map<uint64_t, heddle::v1::MetricPoint> points();
  std::vector<heddle::v1::CheckpointRecord> committed();
  std::vector<heddle::v1::DamageReport> damages();
  uint64_t deferred();
  std::optional<uint64_t> start_step();
  std::string Log(uint32_t rank) const;
  int pid(uint32_t rank) const { return ranks_[rank].pid; }

 private:
  struct Rank {
    int pid = -1;
    int fd = -1;
    std::unique_ptr<control::RankPage> page;
    std::thread reader;
    std::optional<FakeRankEnd> end;
    std::optional<heddle::v1::RankExit> words;
  };

  void Spawn(uint32_t rank);
  void Serve(uint32_t rank);
  void Handle(uint32_t rank, const control::Frame& frame);
  void OnReady();
  void OnProgress(const heddle::v1::RankProgress& progress);
  void OnOpen(uint32_t rank, const heddle::v1::OpenCheckpoint& open);
  void OnSeal(uint32_t rank, const heddle::v1::SealShard& seal);
  void Send(uint32_t rank, control::FrameType type, const google::protobuf::MessageLite& message);
  heddle::v1::RankSpec SpecOf(uint32_t rank) const;
  bool AllEnded() const;

  const FakeAttemptOptions options_;
  comm::FakeRendezvous rendezvous_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<Rank> ranks_;
  uint32_t ready_ = 0;
  std::map<uint64_t, heddle::v1::MetricPoint> points_;
  std::map<uint64_t, heddle::v1::CheckpointRecord> open_;
  std::vector<heddle::v1::CheckpointRecord> committed_;
  std::vector<heddle::v1::DamageReport> damages_;
  uint64_t deferred_ = 0;
  std::optional<uint64_t> start_step_;
};

}  // namespace heddle::trainer
