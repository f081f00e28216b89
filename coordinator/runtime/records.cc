#include "coordinator/runtime/records.h"

#include <google/protobuf/util/message_differencer.h>

#include <optional>

namespace heddle::runtime {
namespace {

using store::Family;

constexpr char kMetaKey[] = "record";

std::string Key(std::initializer_list<uint64_t> parts) {
  std::string key;
  for (const uint64_t part : parts) {
    store::AppendBigEndian64(&key, part);
  }
  return key;
}

std::string IdempotencyKey(const v1::IdempotencyRecord& record) {
  return record.identity() + '\0' + record.request_id();
}

std::string CheckpointKey(uint64_t job, uint64_t fence, uint64_t step) {
  return Key({job, fence, step});
}

void AddChange(const v1::RecordChange& change, store::Batch* batch) {
  switch (change.change_case()) {
    case v1::RecordChange::kMeta:
      return batch->Put(Family::kMeta, kMetaKey, change.meta().SerializeAsString());
    case v1::RecordChange::kJob:
      return batch->Put(Family::kJobs, Key({change.job().id()}), change.job().SerializeAsString());
    case v1::RecordChange::kAttempt:
      return batch->Put(Family::kAttempts, Key({change.attempt().job(), change.attempt().number()}),
                        change.attempt().SerializeAsString());
    case v1::RecordChange::kTask:
      return batch->Put(Family::kTasks,
                        Key({change.task().job(), change.task().attempt(), change.task().task()}),
                        change.task().SerializeAsString());
    case v1::RecordChange::kWorker:
      return batch->Put(Family::kWorkers, change.worker().id(),
                        change.worker().SerializeAsString());
    case v1::RecordChange::kCheckpoint: {
      const v1::CheckpointRecord& record = change.checkpoint();
      return batch->Put(Family::kCheckpoints,
                        CheckpointKey(record.job(), record.fence(), record.step()),
                        record.SerializeAsString());
    }
    case v1::RecordChange::kIdempotency:
      return batch->Put(Family::kIdempotency, IdempotencyKey(change.idempotency()),
                        change.idempotency().SerializeAsString());
    case v1::RecordChange::kDeleteJob:
      batch->Delete(Family::kJobs, Key({change.delete_job()}));
      batch->DeletePrefix(Family::kAttempts, Key({change.delete_job()}));
      return batch->DeletePrefix(Family::kTasks, Key({change.delete_job()}));
    case v1::RecordChange::kDeleteWorker:
      return batch->Delete(Family::kWorkers, change.delete_worker());
    case v1::RecordChange::kDeleteCheckpoint: {
      const v1::CheckpointKeyRecord& key = change.delete_checkpoint();
      return batch->Delete(Family::kCheckpoints, CheckpointKey(key.job(), key.fence(), key.step()));
    }
    case v1::RecordChange::kDeleteIdempotency:
      return batch->Delete(Family::kIdempotency, IdempotencyKey(change.delete_idempotency()));
    case v1::RecordChange::CHANGE_NOT_SET:
      return;
  }
}

// Reads one family; `field` gives the message inside a RecordChange to parse into.
template <typename Field>
Status LoadFamily(const store::StateLog& log, Family family, Field field, state::State* state) {
  Status bad;
  const Status scanned =
      log.Scan(family, "", "", [&](const std::string& key, const std::string& value) {
        if (family == Family::kMeta && key != kMetaKey) {
          return true;
        }
        v1::RecordChange change;
        if (!field(&change)->ParseFromString(value)) {
          bad = DataLoss(Str("a record of family ", store::FamilyName(family), " cannot be read"));
          return false;
        }
        state->Load(std::move(change));
        return true;
      });
  RETURN_IF_ERROR(scanned);
  return bad;
}

Status LoadJournalEnd(const store::StateLog& log, state::State* state) {
  uint64_t next = 1;
  int64_t newest_ms = 0;
  bool bad = false;
  RETURN_IF_ERROR(
      log.ScanBack(Family::kEvents, "", "", 1, [&](const std::string&, const std::string& value) {
        v1::EventRecord event;
        bad = !event.ParseFromString(value);
        next = event.seq() + 1;
        newest_ms = event.at_ms();
        return false;
      }));
  if (bad) {
    return DataLoss("the newest event of the journal cannot be read");
  }
  state->SetNextSeq(next, newest_ms);
  return OkStatus();
}

}  // namespace

store::Batch BatchOf(const std::vector<v1::EventRecord>& events) {
  store::Batch batch;
  for (const v1::EventRecord& event : events) {
    for (const v1::RecordChange& change : event.delta()) {
      AddChange(change, &batch);
    }
    batch.Put(Family::kEvents, Key({event.seq()}), event.SerializeAsString());
    if (event.job() != 0) {
      batch.Put(Family::kJobEvents, Key({event.job(), event.seq()}), "");
    }
  }
  return batch;
}

StatusOr<state::State> LoadState(const store::StateLog& log) {
  state::State state;
  using Change = v1::RecordChange;
  RETURN_IF_ERROR(LoadFamily(
      log, Family::kMeta, [](Change* c) { return c->mutable_meta(); }, &state));
  RETURN_IF_ERROR(LoadFamily(
      log, Family::kJobs, [](Change* c) { return c->mutable_job(); }, &state));
  RETURN_IF_ERROR(LoadFamily(
      log, Family::kAttempts, [](Change* c) { return c->mutable_attempt(); }, &state));
  RETURN_IF_ERROR(LoadFamily(
      log, Family::kWorkers, [](Change* c) { return c->mutable_worker(); }, &state));
  RETURN_IF_ERROR(LoadFamily(
      log, Family::kTasks, [](Change* c) { return c->mutable_task(); }, &state));
  RETURN_IF_ERROR(LoadFamily(
      log, Family::kCheckpoints, [](Change* c) { return c->mutable_checkpoint(); }, &state));
  RETURN_IF_ERROR(LoadFamily(
      log, Family::kIdempotency, [](Change* c) { return c->mutable_idempotency(); }, &state));
  RETURN_IF_ERROR(LoadJournalEnd(log, &state));
  return state;
}

Status VerifyJournal(const store::StateLog& log) {
  state::State replayed;
  uint64_t expected = 1;
  Status bad;
  RETURN_IF_ERROR(
      log.Scan(Family::kEvents, "", "", [&](const std::string&, const std::string& value) {
        v1::EventRecord event;
        if (!event.ParseFromString(value) || event.seq() != expected) {
          bad = DataLoss(Str("event ", expected, " of the journal is missing or cannot be read"));
          return false;
        }
        ++expected;
        replayed.Commit(event);
        return true;
      }));
  RETURN_IF_ERROR(bad);
  ASSIGN_OR_RETURN(const state::State stored, LoadState(log));
  const std::vector<v1::RecordChange> from_events = replayed.Dump();
  const std::vector<v1::RecordChange> from_records = stored.Dump();
  for (size_t i = 0; i < std::max(from_events.size(), from_records.size()); ++i) {
    if (i >= from_events.size() || i >= from_records.size() ||
        !google::protobuf::util::MessageDifferencer::Equals(from_events[i], from_records[i])) {
      return DataLoss(Str("record ", i, " differs between the journal and the records: ",
                          i < from_records.size()
                              ? from_records[i].ShortDebugString().substr(0, 200)
                              : std::string("missing")));
    }
  }
  return OkStatus();
}

StatusOr<std::vector<v1::EventRecord>> ReadEvents(const store::StateLog& log, uint64_t from,
                                                  uint64_t last, uint64_t job, size_t limit) {
  std::vector<v1::EventRecord> events;
  Status bad;
  const auto take = [&](const std::string& value) {
    v1::EventRecord event;
    if (!event.ParseFromString(value)) {
      bad = DataLoss("an event of the journal cannot be read");
      return false;
    }
    event.clear_delta();
    events.push_back(std::move(event));
    return events.size() < limit;
  };
  if (from > last) {
    return events;
  }
  if (job == 0) {
    RETURN_IF_ERROR(
        log.Scan(Family::kEvents, Key({from}), Key({last + 1}),
                 [&](const std::string&, const std::string& value) { return take(value); }));
    RETURN_IF_ERROR(bad);
    return events;
  }
  std::vector<uint64_t> seqs;
  RETURN_IF_ERROR(log.Scan(Family::kJobEvents, Key({job, from}), Key({job, last + 1}),
                           [&](const std::string& key, const std::string&) {
                             seqs.push_back(store::ReadBigEndian64(key, 8));
                             return seqs.size() < limit;
                           }));
  for (const uint64_t seq : seqs) {
    ASSIGN_OR_RETURN(const std::string value, log.Get(Family::kEvents, Key({seq})));
    take(value);
    RETURN_IF_ERROR(bad);
  }
  return events;
}

StatusOr<std::vector<v1::EventRecord>> ReadLastEvents(const store::StateLog& log, uint64_t last,
                                                      uint64_t job, size_t limit) {
  uint64_t from = last + 1;
  RETURN_IF_ERROR(log.ScanBack(Family::kJobEvents, Key({job}), Key({job, last + 1}), limit,
                               [&](const std::string& key, const std::string&) {
                                 from = store::ReadBigEndian64(key, 8);
                                 return true;
                               }));
  return ReadEvents(log, from, last, job, limit);
}

std::string PointKey(uint64_t job, uint32_t attempt, uint64_t step) {
  return Key({job, attempt, step});
}

StatusOr<std::vector<v1::MetricPoint>> ReadPoints(const store::StateLog& log, uint64_t job,
                                                  std::pair<uint32_t, uint64_t> after,
                                                  size_t limit) {
  std::vector<v1::MetricPoint> points;
  RETURN_IF_ERROR(log.Scan(Family::kSeries, PointKey(job, after.first, after.second + 1),
                           Key({job + 1}), [&](const std::string&, const std::string& value) {
                             v1::MetricPoint point;
                             if (point.ParseFromString(value)) {
                               points.push_back(std::move(point));
                             }
                             return points.size() < limit;
                           }));
  return points;
}

StatusOr<v1::MetricPoint> ReadLastPoint(const store::StateLog& log, uint64_t job,
                                        uint32_t attempt) {
  const std::string first = attempt == 0 ? Key({job}) : PointKey(job, attempt, 0);
  const std::string last = attempt == 0 ? Key({job + 1}) : PointKey(job, attempt + 1, 0);
  std::optional<v1::MetricPoint> found;
  RETURN_IF_ERROR(log.ScanBack(Family::kSeries, first, last, 1,
                               [&](const std::string&, const std::string& value) {
                                 v1::MetricPoint point;
                                 if (point.ParseFromString(value)) {
                                   found = std::move(point);
                                 }
                                 return false;
                               }));
  if (!found.has_value()) {
    return NotFound("no metric point");
  }
  return *found;
}

StatusOr<store::Batch> RemovalOfPoints(const store::StateLog& log, uint64_t job) {
  size_t points = 0;
  std::pair<std::string, std::string> newest;
  RETURN_IF_ERROR(log.ScanBack(Family::kSeries, Key({job}), Key({job + 1}), 2,
                               [&](const std::string& key, const std::string& value) {
                                 if (++points == 1) {
                                   newest = {key, value};
                                 }
                                 return true;
                               }));
  store::Batch batch;
  if (points > 1) {
    batch.DeletePrefix(Family::kSeries, Key({job}));
    batch.Put(Family::kSeries, newest.first, newest.second);
  }
  return batch;
}

}  // namespace heddle::runtime
