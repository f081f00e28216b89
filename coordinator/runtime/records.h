// Records and events as bytes of the store, and back: the only place that knows their keys
// (control-plane section 7).
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "base/status/status.h"
#include "coordinator/state/state.h"
#include "coordinator/store/state_log.h"
#include "heddle/v1/records.pb.h"

namespace heddle::runtime {

// One batch for all events of one Apply: changed records, the events, their index by job.
store::Batch BatchOf(const std::vector<v1::EventRecord>& events);

// Every record and the place in the journal. DATA_LOSS names what cannot be read.
StatusOr<state::State> LoadState(const store::StateLog& log);

// Rebuilds the records from the journal alone and compares them with the stored ones (D9).
// DATA_LOSS names the first difference.
Status VerifyJournal(const store::StateLog& log);

// Durable events with from <= seq <= last, only of `job` if not 0, at most `limit`.
StatusOr<std::vector<v1::EventRecord>> ReadEvents(const store::StateLog& log, uint64_t from,
                                                  uint64_t last, uint64_t job, size_t limit);

// The newest `limit` of them of `job`, oldest first.
StatusOr<std::vector<v1::EventRecord>> ReadLastEvents(const store::StateLog& log, uint64_t last,
                                                      uint64_t job, size_t limit);

// Metric points are stored by (job, attempt, step).
std::string PointKey(uint64_t job, uint32_t attempt, uint64_t step);
StatusOr<std::vector<v1::MetricPoint>> ReadPoints(const store::StateLog& log, uint64_t job,
                                                  std::pair<uint32_t, uint64_t> after,
                                                  size_t limit);
// The newest point of a job, or of one attempt of it (0: any). NOT_FOUND if there is none.
StatusOr<v1::MetricPoint> ReadLastPoint(const store::StateLog& log, uint64_t job, uint32_t attempt);
// What removes the points of a job but for the newest; empty if there are no others.
StatusOr<store::Batch> RemovalOfPoints(const store::StateLog& log, uint64_t job);

}  // namespace heddle::runtime
