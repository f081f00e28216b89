#include "coordinator/store/mem_log.h"

namespace heddle::store {
namespace {

std::map<std::string, std::string>& Of(MemDisk* disk, Family family) {
  return (*disk)[static_cast<size_t>(family)];
}

uint64_t NextTerm(MemDisk* disk) {
  std::string& stored = Of(disk, Family::kMeta)[kTermKey];
  const uint64_t term = (stored.empty() ? 0 : ReadBigEndian64(stored)) + 1;
  stored.clear();
  AppendBigEndian64(&stored, term);
  return term;
}

}  // namespace

MemLog::MemLog(MemDisk* disk, bool auto_commit)
    : disk_(disk), auto_commit_(auto_commit), term_(NextTerm(disk)) {}

Status MemLog::Append(Batch batch, Done done) {
  if (poisoned_) {
    return Unavailable("state store is poisoned");
  }
  queue_.emplace_back(std::move(batch), std::move(done));
  if (auto_commit_) {
    Commit();
  }
  return OkStatus();
}

Status MemLog::AppendVolatile(Batch batch, Done done) {
  return Append(std::move(batch), std::move(done));
}

void MemLog::Apply(const Batch& batch) {
  for (const Mutation& mutation : batch.mutations) {
    std::map<std::string, std::string>& family = Of(disk_, mutation.family);
    if (mutation.whole_prefix) {
      auto it = family.lower_bound(mutation.key);
      while (it != family.end() && it->first.rfind(mutation.key, 0) == 0) {
        it = family.erase(it);
      }
    } else if (mutation.value) {
      family[mutation.key] = *mutation.value;
    } else {
      family.erase(mutation.key);
    }
  }
}

size_t MemLog::Commit(size_t limit) {
  size_t committed = 0;
  while (!queue_.empty() && committed < limit && !poisoned_) {
    auto [batch, done] = std::move(queue_.front());
    queue_.pop_front();
    Apply(batch);
    ++committed;
    ++seq_;
    ++stats_.commits;
    ++stats_.batches;
    if (done) {
      done(seq_);
    }
  }
  return committed;
}

void MemLog::Poison() {
  poisoned_ = true;
  std::deque<std::pair<Batch, Done>> queue = std::move(queue_);
  queue_.clear();
  for (const auto& [batch, done] : queue) {
    if (done) {
      done(Unavailable("state store is poisoned"));
    }
  }
}

Status MemLog::Scan(Family family, const std::string& first, const std::string& last,
                    const Visit& visit) const {
  const auto& map = (*disk_)[static_cast<size_t>(family)];
  for (auto it = map.lower_bound(first); it != map.end(); ++it) {
    if ((!last.empty() && it->first >= last) || !visit(it->first, it->second)) {
      break;
    }
  }
  return OkStatus();
}

Status MemLog::ScanBack(Family family, const std::string& first, const std::string& last,
                        size_t limit, const Visit& visit) const {
  const auto& map = (*disk_)[static_cast<size_t>(family)];
  auto it = last.empty() ? map.end() : map.lower_bound(last);
  for (size_t n = 0; it != map.begin() && n < limit; ++n) {
    --it;
    if (it->first < first || !visit(it->first, it->second)) {
      break;
    }
  }
  return OkStatus();
}

StatusOr<std::string> MemLog::Get(Family family, const std::string& key) const {
  const auto& map = (*disk_)[static_cast<size_t>(family)];
  const auto it = map.find(key);
  if (it == map.end()) {
    return NotFound(Str("no ", FamilyName(family), " record"));
  }
  return it->second;
}

Status MemLog::Snapshot(const std::string& dir) {
  return FailedPrecondition(Str("a log in memory has no snapshot to put in ", dir));
}

}  // namespace heddle::store
