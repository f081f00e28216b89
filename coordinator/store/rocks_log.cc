#include "coordinator/store/rocks_log.h"

#include <rocksdb/cache.h>
#include <rocksdb/db.h>
#include <rocksdb/env.h>
#include <rocksdb/table.h>
#include <rocksdb/utilities/checkpoint.h>
#include <rocksdb/write_batch.h>
#include <unistd.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <utility>

#include "base/clock/clock.h"
#include "base/log/log.h"

namespace heddle::store {
namespace {

constexpr size_t kGroupBatches = 128;
constexpr size_t kGroupBytes = 1 << 20;
constexpr size_t kLatencySamples = 1024;
constexpr uint64_t kTermLimit = 1ULL << 24;

Status FromRocks(const rocksdb::Status& status) {
  if (status.ok()) {
    return OkStatus();
  }
  const std::string text = Str("state store: ", status.ToString());
  if (status.IsNotFound()) {
    return NotFound(text);
  }
  if (status.IsNoSpace()) {
    return ResourceExhausted(text);
  }
  if (status.IsCorruption()) {
    return DataLoss(text);
  }
  if (status.IsInvalidArgument()) {
    return FailedPrecondition(text);
  }
  return Unavailable(text);
}

// RocksDB's own LOG file would abort the process at disk full (reliability D1).
class InfoLog : public rocksdb::Logger {
 public:
  InfoLog() : rocksdb::Logger(rocksdb::InfoLogLevel::WARN_LEVEL) {}
  using rocksdb::Logger::Logv;
  void Logv(const char* format, va_list arguments) override {
    char text[1024];
    vsnprintf(text, sizeof(text), format, arguments);
    HEDDLE_WARN("state store", {"message", std::string(text)});
  }
};

// Control-plane D5, exactly; sizes chosen for an idle daemon of 40 MB.
rocksdb::Options MakeOptions(bool point_in_time) {
  rocksdb::Options options;
  options.create_if_missing = true;
  options.create_missing_column_families = true;
  options.paranoid_checks = true;
  options.wal_recovery_mode = point_in_time
                                  ? rocksdb::WALRecoveryMode::kPointInTimeRecovery
                                  : rocksdb::WALRecoveryMode::kTolerateCorruptedTailRecords;
  options.avoid_flush_during_recovery = false;
  options.enable_pipelined_write = false;
  options.track_and_verify_wals_in_manifest = false;
  options.allow_mmap_reads = false;
  options.allow_mmap_writes = false;
  options.info_log = std::make_shared<InfoLog>();
  options.max_total_wal_size = 64 << 20;
  options.max_open_files = 256;
  options.write_buffer_size = 16 << 20;
  options.arena_block_size = 64 << 10;
  options.stats_dump_period_sec = 0;
  options.stats_persist_period_sec = 0;
  options.compression = rocksdb::kNoCompression;
  rocksdb::BlockBasedTableOptions table;
  table.format_version = 5;
  table.checksum = rocksdb::kXXH3;
  table.block_cache = rocksdb::NewLRUCache(16 << 20, /*num_shard_bits=*/2);
  options.table_factory.reset(rocksdb::NewBlockBasedTableFactory(table));
  return options;
}

// The smallest key above every key that starts with `prefix`; empty if there is none.
std::string AfterPrefix(std::string prefix) {
  while (!prefix.empty()) {
    if (static_cast<unsigned char>(prefix.back()) != 0xff) {
      prefix.back() = static_cast<char>(static_cast<unsigned char>(prefix.back()) + 1);
      return prefix;
    }
    prefix.pop_back();
  }
  return prefix;
}

std::string Number(uint64_t value) {
  std::string text;
  AppendBigEndian64(&text, value);
  return text;
}

}  // namespace

RocksLog::RocksLog(RocksLogOptions options) : options_(std::move(options)) {}

StatusOr<std::unique_ptr<RocksLog>> RocksLog::Open(RocksLogOptions options) {
  std::unique_ptr<RocksLog> log(new RocksLog(std::move(options)));
  ASSIGN_OR_RETURN(CommitMark mark, CommitMark::Open(log->options_.dir + "/mark"));
  log->mark_ = std::make_unique<CommitMark>(std::move(mark));
  RETURN_IF_ERROR(log->OpenDatabase());
  RETURN_IF_ERROR(log->StartTerm());
  log->thread_ = std::thread([raw = log.get()] { raw->CommitLoop(); });
  return log;
}

StatusOr<std::unique_ptr<RocksLog>> RocksLog::OpenReadOnly(const std::string& dir) {
  RocksLogOptions options;
  options.dir = dir;
  std::unique_ptr<RocksLog> log(new RocksLog(std::move(options)));
  log->read_only_ = true;
  log->poison_ = FailedPrecondition("state store is open for reading only");
  ASSIGN_OR_RETURN(CommitMark mark, CommitMark::Open(dir + "/mark"));
  log->mark_ = std::make_unique<CommitMark>(std::move(mark));
  RETURN_IF_ERROR(log->OpenMode(/*point_in_time=*/false, /*read_only=*/true));
  RETURN_IF_ERROR(log->CheckMark());
  ASSIGN_OR_RETURN(log->term_, log->ReadMeta(kTermKey));
  return log;
}

RocksLog::~RocksLog() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_all();
  if (thread_.joinable()) {
    thread_.join();
  }
  CloseDatabase();
}

void RocksLog::CloseDatabase() {
  if (db_ == nullptr) {
    return;
  }
  for (rocksdb::ColumnFamilyHandle* family : families_) {
    db_->DestroyColumnFamilyHandle(family);
  }
  families_.clear();
  const rocksdb::Status status = db_->Close();
  if (!status.ok()) {
    HEDDLE_WARN("state store closed with an error", {"error", status.ToString()});
  }
  db_.reset();
}

Status RocksLog::OpenMode(bool point_in_time, bool read_only) {
  CloseDatabase();
  const rocksdb::Options options = MakeOptions(point_in_time);
  std::vector<rocksdb::ColumnFamilyDescriptor> descriptors;
  for (size_t i = 0; i < kFamilyCount; ++i) {
    descriptors.emplace_back(FamilyName(static_cast<Family>(i)),
                             rocksdb::ColumnFamilyOptions(options));
  }
  descriptors.emplace_back(rocksdb::kDefaultColumnFamilyName,
                           rocksdb::ColumnFamilyOptions(options));
  rocksdb::DB* db = nullptr;
  const std::string path = options_.dir + "/db";
  const rocksdb::Status status =
      read_only
          ? rocksdb::DB::OpenForReadOnly(options, path, descriptors, &families_, &db)
          : rocksdb::DB::Open(rocksdb::DBOptions(options), path, descriptors, &families_, &db);
  db_.reset(db);
  return FromRocks(status);
}

Status RocksLog::OpenDatabase() {
  Status status = OpenMode(/*point_in_time=*/false, /*read_only=*/false);
  if (status.code() == StatusCode::kDataLoss) {
    // A damaged record: harmless only if everything acknowledged lies before it.
    const Status damage = status;
    RETURN_IF_ERROR(OpenMode(/*point_in_time=*/true, /*read_only=*/true));
    const Status mark = CheckMark();
    if (!mark.ok() && !options_.repair) {
      CloseDatabase();
      return DataLoss(Str(Message(damage), "; ", Message(mark),
                          ". Restore a backup, or accept the loss with --repair"));
    }
    HEDDLE_WARN("state log has a damaged tail", {"error", Message(damage)});
    status = OpenMode(/*point_in_time=*/true, /*read_only=*/false);
  }
  RETURN_IF_ERROR(status);
  const Status mark = CheckMark();
  if (mark.ok()) {
    return OkStatus();
  }
  if (!options_.repair) {
    CloseDatabase();
    return DataLoss(Str(Message(mark), ". Restore a backup, or accept the loss with --repair"));
  }
  HEDDLE_ERROR("acknowledged operations are lost, as accepted by --repair",
               {"detail", Message(mark)});
  const std::string path = options_.dir + "/mark";
  mark_.reset();
  if (unlink(path.c_str()) != 0) {
    return FromErrno("cannot remove", path);
  }
  ASSIGN_OR_RETURN(CommitMark fresh, CommitMark::Open(path));
  mark_ = std::make_unique<CommitMark>(std::move(fresh));
  return OkStatus();
}

Status RocksLog::CheckMark() {
  ASSIGN_OR_RETURN(commit_seq_, ReadMeta(kCommitSeqKey));
  if (mark_->seq() > commit_seq_) {
    return DataLoss(Str("state log ends at commit ", commit_seq_, " but commit ", mark_->seq(),
                        " was acknowledged"));
  }
  return OkStatus();
}

StatusOr<uint64_t> RocksLog::ReadMeta(const char* key) const {
  StatusOr<std::string> value = Get(Family::kMeta, key);
  if (value.status().code() == StatusCode::kNotFound) {
    return uint64_t{0};
  }
  RETURN_IF_ERROR(value.status());
  if (value->size() != 8) {
    return DataLoss(Str("state store: meta/", key, " has ", value->size(), " bytes"));
  }
  return ReadBigEndian64(*value);
}

Status RocksLog::StartTerm() {
  ASSIGN_OR_RETURN(const uint64_t last, ReadMeta(kTermKey));
  term_ = last + 1;
  if (term_ >= kTermLimit) {
    return FailedPrecondition(Str("term ", term_, " exceeds 24 bits"));
  }
  Pending pending;
  pending.synced = true;
  pending.batch.Put(Family::kMeta, kTermKey, Number(term_));
  std::vector<Pending> group;
  group.push_back(std::move(pending));
  RETURN_IF_ERROR(WriteGroup(group));
  stats_ = LogStats();
  return OkStatus();
}

Status RocksLog::Append(Batch batch, Done done) {
  return Enqueue({std::move(batch), std::move(done), /*synced=*/true});
}

Status RocksLog::AppendVolatile(Batch batch, Done done) {
  const Status status = Enqueue({std::move(batch), std::move(done), /*synced=*/false});
  if (!status.ok()) {
    const std::lock_guard lock(mutex_);
    ++stats_.volatile_drops;
  }
  return status;
}

Status RocksLog::Enqueue(Pending pending) {
  {
    const std::lock_guard lock(mutex_);
    if (!poison_.ok()) {
      return Unavailable(Message(poison_));
    }
    if (queue_.size() >= options_.queue_limit) {
      return ResourceExhausted(Str("state store: ", queue_.size(), " writes are queued"));
    }
    queue_.push_back(std::move(pending));
  }
  work_.notify_one();
  return OkStatus();
}

void RocksLog::CommitLoop() {
  const SystemClock clock;  // measures only; no decision rests on it
  while (true) {
    std::vector<Pending> group = TakeGroup();
    if (group.empty()) {
      return;
    }
    const int64_t begin = clock.NowSteady();
    const Status status = WriteGroup(group);
    const float took_ms = static_cast<float>(clock.NowSteady() - begin) * 1e-6f;
    if (status.ok() && group.back().synced) {
      const std::lock_guard lock(mutex_);
      if (latencies_ms_.size() < kLatencySamples) {
        latencies_ms_.push_back(took_ms);
      } else {
        latencies_ms_[latency_next_++ % kLatencySamples] = took_ms;
      }
    }
    FinishGroup(std::move(group), status);
  }
}

std::vector<RocksLog::Pending> RocksLog::TakeGroup() {
  std::vector<Pending> group;
  std::unique_lock lock(mutex_);
  in_flight_ = false;
  if (queue_.empty()) {
    idle_.notify_all();
  }
  work_.wait(lock, [this] { return stop_ || !queue_.empty(); });
  size_t bytes = 0;
  while (!queue_.empty() && group.size() < kGroupBatches && bytes < kGroupBytes) {
    bytes += queue_.front().batch.Bytes();
    group.push_back(std::move(queue_.front()));
    queue_.pop_front();
  }
  in_flight_ = !group.empty();
  if (queue_.size() <= options_.queue_limit / 2) {
    room_.notify_all();
  }
  return group;
}

Status RocksLog::WriteGroup(const std::vector<Pending>& group) {
  {
    const std::lock_guard lock(mutex_);
    if (!poison_.ok()) {
      return Unavailable(Message(poison_));
    }
  }
  rocksdb::WriteBatch writes;
  bool synced = false;
  for (const Pending& pending : group) {
    synced |= pending.synced;
    for (const Mutation& mutation : pending.batch.mutations) {
      rocksdb::ColumnFamilyHandle* family = families_[static_cast<size_t>(mutation.family)];
      rocksdb::Status status;
      if (mutation.whole_prefix) {
        status = writes.DeleteRange(family, mutation.key, AfterPrefix(mutation.key));
      } else if (mutation.value) {
        status = writes.Put(family, mutation.key, *mutation.value);
      } else {
        status = writes.Delete(family, mutation.key);
      }
      HEDDLE_CHECK(status.ok(), status.ToString());
    }
  }
  const CommitSeq seq = commit_seq_ + (synced ? 1 : 0);
  writes.Put(families_[static_cast<size_t>(Family::kMeta)], kCommitSeqKey, Number(seq));
  rocksdb::WriteOptions write_options;
  write_options.sync = synced;
  RETURN_IF_ERROR(FromRocks(db_->Write(write_options, &writes)));
  if (synced) {
    if (const Status marked = mark_->Write(seq); !marked.ok()) {
      HEDDLE_WARN("commit mark not written", {"error", Message(marked)});
    }
    const std::lock_guard lock(mutex_);
    commit_seq_ = seq;
    ++stats_.commits;
    stats_.batches += group.size();
  }
  return OkStatus();
}

void RocksLog::FinishGroup(std::vector<Pending> group, const Status& status) {
  StatusOr<CommitSeq> result = CommitSeq{0};
  if (status.ok()) {
    const std::lock_guard lock(mutex_);
    result = commit_seq_;
  } else {
    // One error ends this log: what the kernel kept of a failed sync is unknown (reliability D9).
    const std::lock_guard lock(mutex_);
    if (poison_.ok()) {
      poison_ = status;
      HEDDLE_ERROR("state store stopped at a write error", {"error", Message(status)});
    }
    for (Pending& pending : queue_) {
      group.push_back(std::move(pending));
    }
    queue_.clear();
    result = Unavailable(Message(poison_));
  }
  std::vector<Done> dones;
  dones.reserve(group.size());
  for (Pending& pending : group) {
    if (pending.done) {
      dones.push_back(std::move(pending.done));
    }
  }
  if (dones.empty()) {
    return;
  }
  auto run = [dones = std::move(dones), result] {
    for (const Done& done : dones) {
      done(result);
    }
  };
  if (options_.deliver) {
    options_.deliver(std::move(run));
  } else {
    run();
  }
}

std::unique_ptr<rocksdb::Iterator> RocksLog::NewIterator(Family family, const std::string& last,
                                                         std::string* bound) const {
  rocksdb::ReadOptions options;
  options.verify_checksums = true;
  *bound = last;
  std::unique_ptr<rocksdb::Iterator> it(
      db_->NewIterator(options, families_[static_cast<size_t>(family)]));
  return it;
}

Status RocksLog::Scan(Family family, const std::string& first, const std::string& last,
                      const Visit& visit) const {
  std::string bound;
  const std::unique_ptr<rocksdb::Iterator> it = NewIterator(family, last, &bound);
  for (it->Seek(first); it->Valid(); it->Next()) {
    if (!bound.empty() && it->key().compare(bound) >= 0) {
      break;
    }
    if (!visit(it->key().ToString(), it->value().ToString())) {
      break;
    }
  }
  return FromRocks(it->status());
}

Status RocksLog::ScanBack(Family family, const std::string& first, const std::string& last,
                          size_t limit, const Visit& visit) const {
  std::string bound;
  const std::unique_ptr<rocksdb::Iterator> it = NewIterator(family, last, &bound);
  if (bound.empty()) {
    it->SeekToLast();
  } else {
    it->SeekForPrev(bound);
    if (it->Valid() && it->key().compare(bound) >= 0) {
      it->Prev();
    }
  }
  for (size_t n = 0; it->Valid() && n < limit && it->key().compare(first) >= 0; it->Prev(), ++n) {
    if (!visit(it->key().ToString(), it->value().ToString())) {
      break;
    }
  }
  return FromRocks(it->status());
}

StatusOr<std::string> RocksLog::Get(Family family, const std::string& key) const {
  std::string value;
  rocksdb::ReadOptions options;
  RETURN_IF_ERROR(
      FromRocks(db_->Get(options, families_[static_cast<size_t>(family)], key, &value)));
  return value;
}

void RocksLog::Flush() {
  std::unique_lock lock(mutex_);
  idle_.wait(lock, [this] { return queue_.empty() && !in_flight_; });
}

void RocksLog::AwaitRoom() {
  std::unique_lock lock(mutex_);
  if (queue_.size() >= options_.queue_limit / 8 * 7) {
    room_.wait(lock, [this] { return queue_.size() <= options_.queue_limit / 2; });
  }
}

Status RocksLog::Snapshot(const std::string& dir) {
  rocksdb::Checkpoint* raw = nullptr;
  RETURN_IF_ERROR(FromRocks(rocksdb::Checkpoint::Create(db_.get(), &raw)));
  const std::unique_ptr<rocksdb::Checkpoint> checkpoint(raw);
  return FromRocks(checkpoint->CreateCheckpoint(dir));
}

Role RocksLog::role() const {
  const std::lock_guard lock(mutex_);
  if (read_only_) {
    return Role::kFollower;
  }
  return poison_.ok() ? Role::kLeader : Role::kPoisoned;
}

LogStats RocksLog::Stats() const {
  const std::lock_guard lock(mutex_);
  LogStats stats = stats_;
  stats.queued = queue_.size();
  if (!latencies_ms_.empty()) {
    std::vector<float> sorted = latencies_ms_;
    std::sort(sorted.begin(), sorted.end());
    stats.commit_p50_ms = sorted[sorted.size() / 2];
    stats.commit_p99_ms = sorted[sorted.size() * 99 / 100];
  }
  return stats;
}

CommitSeq RocksLog::commit_seq() const {
  const std::lock_guard lock(mutex_);
  return commit_seq_;
}

Status RocksLog::VerifyChecksums() const { return FromRocks(db_->VerifyChecksum()); }

}  // namespace heddle::store
