// The coordinator's heart: one state thread that owns the records, the journal behind it, and what
// happens after a change is durable. Implements rpc::Core for the services.
//
// Invariants: (1) state, timers, streams and subscriptions are touched by the state thread only;
// (2) effects, replies and published events of a change run after its batch and all before it are
// durable, in order (P8); (3) after any error of the store nothing is acknowledged until it was
// opened and loaded again under a new term (D7).
#pragma once

#include <boost/asio/io_context.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/thread_pool.hpp>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/clock/clock.h"
#include "coordinator/rpc/core.h"
#include "coordinator/runtime/rendezvous.h"
#include "coordinator/state/leases.h"
#include "coordinator/state/policy.h"
#include "coordinator/store/rocks_log.h"
#include "coordinator/store/state_folder.h"

namespace heddle::runtime {

struct CoordinatorOptions {
  std::string state_dir;
  std::string checkpoint_root;
  std::string version;
  bool repair = false;
  state::Policy policy;
  state::LeaseOptions leases;
  store::DiskLimits disk;
};

class Coordinator : public rpc::Core {
 public:
  // REQUIRES: the caller holds the StateLock of options.state_dir. `clock` is borrowed.
  Coordinator(CoordinatorOptions options, const Clock& clock);
  ~Coordinator() override;

  // Recovery (D10): opens the journal, loads, checks the invariants, starts a term. Blocking;
  // before Run. DATA_LOSS, FAILED_PRECONDITION (a higher term exists, N4) say what to do.
  Status Start();
  // The state thread: returns after Stop.
  void Run();
  // Ends Run after everything applied is durable. Any thread; idempotent.
  void Stop();

  // ---- rpc::Core ----
  void Post(std::function<void()> work) override;
  void PostAfter(int64_t delay_ms, std::function<void()> work) override;
  const state::State& state() const override { return state_; }
  state::Time Now() const override;
  rpc::CoreFigures Figures() const override;
  bool read_only() const override { return figures_.read_only || poisoned_; }
  void Execute(state::Event event, std::function<void(const state::Outcome&)> done) override;
  void AfterDurable(std::function<void(const Status&)> done) override;
  JobId NewJobId() override;
  StatusOr<std::vector<v1::EventRecord>> ReadEvents(uint64_t from_seq, uint64_t job,
                                                    size_t limit) override;
  StatusOr<std::vector<v1::EventRecord>> ReadLastEvents(uint64_t job, size_t limit) override;
  void SubscribeEvents(rpc::EventSink sink) override;
  uint64_t newest_durable_seq() const override { return durable_seq_; }
  StatusOr<std::vector<v1::MetricPoint>> ReadPoints(uint64_t job,
                                                    std::pair<uint32_t, uint64_t> after,
                                                    size_t limit) override;
  void SubscribePoints(rpc::PointSink sink) override;
  const v1::MetricPoint* LastPoint(uint64_t job) override;
  void RemovePoints(uint64_t job) override;
  void AttachWorker(const std::string& worker, uint64_t session, rpc::WorkerSender sender) override;
  void DetachWorker(const std::string& worker, uint64_t session) override;
  void OnWorkerMessage(const v1::WorkerMsg& message) override;
  int64_t HeardAgeMs(const std::string& worker) const override;
  const std::string& checkpoint_root() const override { return options_.checkpoint_root; }
  const std::string& logs_root() const override { return logs_root_; }
  const std::string& version() const override { return options_.version; }
  int64_t uptime_seconds() const override;
  void PostFileWork(std::function<void()> work) override;
  void PostLongFileWork(std::function<void()> work) override;

 private:
  // What waits for batches: runs when `batch` batches are durable.
  struct Release {
    uint64_t batch = 0;
    std::vector<v1::EventRecord> events;
    std::function<void(const Status&)> run;
  };
  struct Stream {
    uint64_t session = 0;
    rpc::WorkerSender send;
  };

  // recovery.cc
  Status OpenJournal();
  Status ClaimTerm();
  Status Recover();
  Status PublishUnseen(uint64_t from_seq);
  void Poison(const Status& why);
  void TryReopen();
  void CheckDisk();

  // coordinator.cc
  void OnDurable(const StatusOr<store::CommitSeq>& result, uint64_t generation);
  void RunReleases();
  std::function<void()> LeaseNote(const state::Event& event);
  void Publish(const std::vector<v1::EventRecord>& events);
  void Tick();
  void ArmTimer();
  void FireTimers();

  // effects.cc
  void RunEffect(const state::Effect& effect);
  void SendTo(const std::string& worker, const std::function<void(v1::CoordMsg*)>& fill);
  void DeleteFiles(const state::CheckpointKey& key, const std::string& dir);
  void VerifyFiles(const v1::CheckpointRecord& record);

  // worker_messages.cc
  void OnHeartbeat(const v1::WorkerMsg& message);
  void OnPoints(const v1::RankPoints& points);
  void OnStacks(const v1::WorkerMsg& message);
  // Of the attempt's ranks, from their newest heads.
  void Diagnose(Fence fence, bool at_once);
  void OnRendezvous(const std::string& worker, const v1::RankRendezvous& request);
  uint64_t LastStep(uint64_t job, uint32_t attempt);

  // scheduling.cc
  void WakeScheduler();
  void RunPass();
  void ApplyPass(const schedule::PassResult& result, double pass_ms);
  bool SchedulingOpen();

  const CoordinatorOptions options_;
  const Clock& clock_;
  const std::string logs_root_;
  boost::asio::io_context io_;
  boost::asio::steady_timer timer_;
  boost::asio::thread_pool file_pool_;
  boost::asio::thread_pool long_file_pool_;
  boost::asio::thread_pool pass_pool_;

  std::unique_ptr<store::RocksLog> log_;
  state::State state_;
  std::optional<state::LeaseTable> leases_;
  Rendezvous rendezvous_;
  int64_t time_offset_ms_ = 0;  // Time::ms = steady + offset
  int64_t started_ns_ = 0;
  int64_t armed_ms_ = 0;  // steady ms at which timer_ fires; 0: not armed

  uint64_t appended_ = 0;  // batches handed to the journal
  uint64_t durable_ = 0;
  uint64_t durable_seq_ = 0;
  uint64_t generation_ = 0;  // of the journal; answers of a poisoned one are ignored
  std::deque<Release> releases_;
  bool releasing_ = false;
  bool poisoned_ = false;
  bool stopping_ = false;

  std::map<std::string, Stream> streams_;
  std::vector<rpc::EventSink> event_sinks_;
  std::vector<rpc::PointSink> point_sinks_;
  std::map<uint64_t, std::optional<v1::MetricPoint>> last_points_;  // by job
  std::map<std::pair<uint64_t, uint32_t>, uint64_t> last_steps_;    // by (job, attempt)
  std::map<uint64_t, int64_t> diagnosed_ms_;                        // by fence: the last look
  std::optional<JobIdGenerator> job_ids_;

  std::set<std::string> awaited_workers_;  // with allocations, not back since the start (D10)
  size_t awaited_at_start_ = 0;
  bool wake_pending_ = false;
  bool pass_running_ = false;
  double snapshot_ms_ = 0;  // cost of the last one, on this thread
  rpc::CoreFigures figures_;
  std::vector<double> pass_times_ms_;
};

}  // namespace heddle::runtime
