// A coordinator for tests of the worker daemon: the WorkerLink service on a unix socket, with every
// word it hears kept and every answer in the test's hands.
#pragma once

#include <chrono>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "heddle/v1/worker_link.pb.h"

namespace heddle::test {

class FakeCoordinator {
 public:
  explicit FakeCoordinator(std::string socket_path);
  ~FakeCoordinator();

  // Listens; again after Stop, as a coordinator of term + 1 that forgot nothing but its sessions.
  void Start();
  void Stop();

  // --- what it answers; set before or while it runs ---
  uint64_t term = 1;
  int64_t heartbeat_interval_ms = 100;
  int64_t permit_ttl_ms = 20'000;
  int64_t max_orphan_ms = 600'000;
  std::string checkpoint_root = "/checkpoints";
  bool answer_heartbeats = true;
  bool acknowledge_reports = true;
  // A worker that lost its count of reports is no fault: old numbers are no news.
  bool numbers_may_fall = false;
  uint64_t log_bytes_max = UINT64_MAX;  // of a rank; takes no more, as with a full disk
  // Fences that get a permit with each heartbeat.
  std::vector<uint64_t> permitted;
  // Verdict per listed task; default ADOPT, FORGET for EXITED and GONE.
  std::function<v1::TaskVerdict(const v1::TaskReport&)> verdict;
  // Called with every message, on gRPC's thread and without the lock: may Send.
  std::function<void(const v1::WorkerMsg&)> on_message;

  // --- what it heard ---
  std::vector<v1::RegisterRequest> registrations();
  std::vector<v1::WorkerMsg> messages();
  // The newest report of a task, over registrations and stream.
  std::optional<v1::TaskReport> Report(uint64_t fence);
  std::string Log(uint64_t fence, uint32_t rank);
  // What the worker said that it will never send.
  uint64_t LogLost(uint64_t fence, uint32_t rank);
  // How many bytes arrived twice (offsets below what was there).
  uint64_t log_bytes_repeated();

  bool WaitFor(const std::function<bool()>& condition,
               std::chrono::milliseconds limit = std::chrono::milliseconds(15'000));
  bool WaitForSessions(size_t count);
  bool WaitForState(uint64_t fence, v1::TaskState state);
  size_t sessions();

  // To the newest session; term and session are filled in. False without a session.
  bool Send(v1::CoordMsg message);
  void Assign(const v1::TaskAssignment& assignment);
  void StartTask(const v1::TaskAssignment& assignment);
  void StopTask(uint64_t fence, int64_t grace_ms, bool kill_now);
  void Forget(uint64_t fence);

 private:
  class Service;
  class Session;

  // REQUIRES: mutex_ is held.
  void Take(const v1::TaskReport& report);

  const std::string socket_path_;
  std::unique_ptr<Service> service_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<v1::RegisterRequest> registrations_;
  std::vector<v1::WorkerMsg> messages_;
  std::map<uint64_t, v1::TaskReport> reports_;
  std::map<std::pair<uint64_t, uint32_t>, std::string> logs_;
  std::map<std::pair<uint64_t, uint32_t>, uint64_t> logs_lost_;
  uint64_t log_bytes_repeated_ = 0;
  size_t sessions_ = 0;
};

}  // namespace heddle::test
