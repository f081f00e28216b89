// The daemon's core: all tasks of this worker and its conversation with the coordinator, on one
// thread. Registers with every task it holds, beats, counts permits from when a heartbeat was sent
// (L4), routes orders to task runners and their words back. Nothing here is durable: folders, shims
// and the coordinator are.
#pragma once

#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <utility>

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>

#include "base/clock/clock.h"
#include "worker/daemon/coordinator_link.h"
#include "worker/daemon/log_shipper.h"
#include "worker/daemon/task_runner.h"
#include "worker/daemon/worker_state.h"

namespace heddle::worker {

class Worker : private TaskHost {
 public:
  Worker(boost::asio::io_context* io, const Clock* clock, const Options& options,
         WorkerState* state, std::shared_ptr<grpc::Channel> channel);
  ~Worker() override;

  // Takes over the tasks of the state folder, then registers.
  void Start();
  // SIGTERM: detach (tasks stay) or drain (tasks checkpoint and leave first). `done` when the
  // process may end. A second call detaches at once.
  void Stop(std::function<void()> done);

 private:
  // TaskHost.
  boost::asio::io_context& io() override { return *io_; }
  const Clock& clock() const override { return *clock_; }
  const Options& options() const override { return options_; }
  const CgroupParents& cgroups() const override { return cgroups_; }
  CpuTable& cpus() override { return cpus_; }
  GpuTable& gpus() override { return gpus_; }
  std::string data_address() override;
  void RunOnDisk(std::function<Status()> work, std::function<void(Status)> done) override;
  bool Send(v1::WorkerMsg message) override;
  uint64_t last_heartbeat() const override { return heartbeat_; }
  void LogsMayHaveGrown(const TaskKey& key) override;

  // Registration.
  void AdoptTasks();
  void RegisterWhenSettled(int looks_left);
  v1::RegisterRequest MakeRegister();
  Status OnRegistered(const v1::RegisterReply& reply);
  void OnLost(const Status& why);

  // Messages.
  void OnMessage(const v1::CoordMsg& message);
  void OnAssign(const v1::TaskAssignment& assignment);
  void Refuse(const v1::TaskAssignment& assignment, const std::string& why);
  void OnHeartbeatReply(const v1::HeartbeatReply& reply);
  void Forget(const TaskKey& key);
  void ForgetFolder(const TaskFolder& folder);
  TaskRunner* Find(uint64_t fence, uint32_t task);

  void Beat();
  void BeatLater();
  void DrainTasks();
  void Finish();

  boost::asio::io_context* const io_;
  const Clock* const clock_;
  const Options options_;
  WorkerState* const state_;
  const CgroupParents cgroups_;
  CpuTable cpus_;
  GpuTable gpus_;  // found once: the coordinator counts by their places
  boost::asio::thread_pool disk_;
  boost::asio::steady_timer beat_timer_;
  boost::asio::steady_timer settle_timer_;
  std::string data_address_;
  std::string checkpoint_root_;

  std::map<TaskKey, std::shared_ptr<TaskRunner>> tasks_;
  std::map<uint64_t, uint64_t> highest_fence_;  // per job

  uint64_t session_ = 0;
  int64_t registered_at_ns_ = 0;  // when the registration under way was sent
  uint64_t heartbeat_ = 0;
  std::deque<std::pair<uint64_t, int64_t>> sent_beats_;  // number, when sent
  int64_t heartbeat_interval_ns_ = 2'000'000'000;
  int64_t permit_ttl_ns_ = 20'000'000'000;
  int64_t max_orphan_ns_ = 1'800'000'000'000;

  bool draining_ = false;
  bool stopping_ = false;
  std::function<void()> stopped_;

  // Last: their callbacks use everything above.
  LogShipper logs_;
  CoordinatorLink link_;
};

// The address ranks bind: as told, else of the interface, else the one this host reaches the
// coordinator by; 127.0.0.1 over a unix socket (B1).
StatusOr<std::string> FindDataAddress(const Options& options);

}  // namespace heddle::worker
