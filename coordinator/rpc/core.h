// What the gRPC services need of the coordinator's heart, which runtime/ implements. Every method
// but Post must be called on the state thread; callbacks run there too (control-plane "Threads").
//
// The order of release is the promise P8: `done`, effects and events of a change run only after its
// batch and all before it are durable.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/status/status.h"
#include "coordinator/schedule/schedule.h"
#include "coordinator/state/apply.h"
#include "coordinator/state/state.h"
#include "heddle/v1/jobs.pb.h"
#include "heddle/v1/records.pb.h"
#include "heddle/v1/worker_link.pb.h"

namespace heddle::rpc {

// Receives events and points as they become durable. Called on the state thread; must not block.
// A false return ends the subscription.
using EventSink = std::function<bool(const v1::EventRecord&)>;
using PointSink = std::function<bool(uint64_t job, const v1::MetricPoint&)>;
// Sends to a worker's stream; callable on the state thread until the stream is closed.
using WorkerSender = std::function<void(const v1::CoordMsg&)>;

// Figures of `status` that are not in the records.
struct CoreFigures {
  double last_pass_ms = 0;
  double pass_p99_ms = 0;
  uint64_t placed = 0;
  uint64_t dropped_decisions = 0;
  double commit_p50_ms = 0;
  double commit_p99_ms = 0;
  uint64_t commits = 0;
  uint64_t free_disk_bytes = 0;
  bool read_only = false;  // disk nearly full, or the store is poisoned
  bool mass_silence = false;
};

class Core {
 public:
  virtual ~Core() = default;

  // Runs `work` on the state thread. Any thread.
  virtual void Post(std::function<void()> work) = 0;
  virtual void PostAfter(int64_t delay_ms, std::function<void()> work) = 0;

  virtual const state::State& state() const = 0;
  virtual state::Time Now() const = 0;
  virtual CoreFigures Figures() const = 0;
  // As in Figures, which is dear.
  virtual bool read_only() const = 0;

  // Applies one event. `done` gets the outcome after it is durable; with UNAVAILABLE in its status
  // if the store failed first: then nobody knows, and a repeat with the same request id settles it.
  virtual void Execute(state::Event event, std::function<void(const state::Outcome&)> done) = 0;
  // Runs `done` once everything applied so far is durable: for replies computed from state().
  virtual void AfterDurable(std::function<void(const Status&)> done) = 0;

  virtual JobId NewJobId() = 0;

  // Durable and published events with from <= seq, oldest first, only of `job` if not 0, at most
  // `limit`. What Subscribe gives afterwards, in the same turn of the state thread, follows them
  // without gap or repeat.
  virtual StatusOr<std::vector<v1::EventRecord>> ReadEvents(uint64_t from_seq, uint64_t job,
                                                            size_t limit) = 0;
  // The newest `limit` of them of `job`, oldest first.
  virtual StatusOr<std::vector<v1::EventRecord>> ReadLastEvents(uint64_t job, size_t limit) = 0;
  virtual void SubscribeEvents(EventSink sink) = 0;
  virtual uint64_t newest_durable_seq() const = 0;
  // The same for metric points of one job, in order of (attempt, step), after `after`.
  virtual StatusOr<std::vector<v1::MetricPoint>> ReadPoints(uint64_t job,
                                                            std::pair<uint32_t, uint64_t> after,
                                                            size_t limit) = 0;
  virtual void SubscribePoints(PointSink sink) = 0;
  // The newest point of a job; nullptr if there is none.
  virtual const v1::MetricPoint* LastPoint(uint64_t job) = 0;
  // All points of a job but for the newest, in the background; what fails stays.
  virtual void RemovePoints(uint64_t job) = 0;

  // A registered worker opened its stream; replaces the former one, which is closed by its owner.
  virtual void AttachWorker(const std::string& worker, uint64_t session, WorkerSender sender) = 0;
  virtual void DetachWorker(const std::string& worker, uint64_t session) = 0;
  virtual void OnWorkerMessage(const v1::WorkerMsg& message) = 0;
  // Age of the last message in ms, -1 if unknown.
  virtual int64_t HeardAgeMs(const std::string& worker) const = 0;

  virtual const std::string& checkpoint_root() const = 0;
  virtual const std::string& logs_root() const = 0;
  virtual const std::string& version() const = 0;
  virtual int64_t uptime_seconds() const = 0;
  // Runs short blocking work on the file pool. Any thread.
  virtual void PostFileWork(std::function<void()> work) = 0;
  // The same of work on whole checkpoints, one after the other, so that nobody waits for it who
  // only wants to look at a job or to send a log.
  virtual void PostLongFileWork(std::function<void()> work) = 0;
};

}  // namespace heddle::rpc
