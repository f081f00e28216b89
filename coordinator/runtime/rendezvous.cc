#include "coordinator/runtime/rendezvous.h"

#include <algorithm>
#include <charconv>
#include <limits>

#include "base/log/log.h"

namespace heddle::runtime {
namespace {

using store::Family;

std::string StoredKey(uint64_t fence, const std::string& key) {
  std::string stored;
  store::AppendBigEndian64(&stored, fence);
  return stored + key;
}

// Stored beside the keys: the answers to a rank's changes, which a repeat must not apply twice.
// Ranks ask from several threads, so a repeat is not always of the newest one.
constexpr char kAnswerMark = '\0';
constexpr size_t kAnswerKeyBytes = 17;
std::string AnswerKey(uint64_t fence, uint32_t rank, uint64_t n) {
  std::string key = StoredKey(fence, std::string(1, kAnswerMark));
  store::AppendBigEndian64(&key, rank);
  store::AppendBigEndian64(&key, n);
  return key;
}

// What a repeat must not do again; reading twice is harmless.
bool ChangesStore(v1::RendezvousVerb verb) {
  switch (verb) {
    case v1::RENDEZVOUS_VERB_SET:
    case v1::RENDEZVOUS_VERB_ADD:
    case v1::RENDEZVOUS_VERB_COMPARE_SET:
    case v1::RENDEZVOUS_VERB_DELETE:
    case v1::RENDEZVOUS_VERB_APPEND:
      return true;
    case v1::RENDEZVOUS_VERB_GET:
    case v1::RENDEZVOUS_VERB_CHECK:
    case v1::RENDEZVOUS_VERB_WAIT:
    case v1::RENDEZVOUS_VERB_COUNT:
      return false;
  }
  return false;
}

v1::RendezvousReply Refuse(uint64_t n, const Status& status) {
  v1::RendezvousReply reply;
  reply.set_n(n);
  reply.set_code(static_cast<int32_t>(status.code()));
  reply.set_message(Message(status));
  return reply;
}

int64_t Number(const std::string& text) {
  int64_t value = 0;
  std::from_chars(text.data(), text.data() + text.size(), value);
  return value;
}

}  // namespace

void Rendezvous::Load(store::StateLog* log, const std::function<bool(Fence)>& alive) {
  log_ = log;
  spaces_.clear();
  std::vector<uint64_t> dead;
  const Status scanned =
      log->Scan(Family::kRendezvous, "", "", [&](const std::string& key, const std::string& value) {
        const uint64_t fence = store::ReadBigEndian64(key);
        if (!alive(Fence{fence})) {
          if (dead.empty() || dead.back() != fence) {
            dead.push_back(fence);
          }
          return true;
        }
        Space& space = spaces_[fence];
        if (key.size() == 8 + kAnswerKeyBytes && key[8] == kAnswerMark) {
          const uint32_t rank = static_cast<uint32_t>(store::ReadBigEndian64(key, 9));
          space.answered[{rank, store::ReadBigEndian64(key, 17)}].ParseFromString(value);
          return true;
        }
        space.bytes += key.size() + value.size();
        space.values[key.substr(8)] = value;
        return true;
      });
  if (!scanned.ok()) {
    HEDDLE_WARN("rendezvous keys were not read", {"error", scanned});
  }
  for (const uint64_t fence : dead) {
    Drop(Fence{fence});
  }
}

bool Rendezvous::Ready(const Space& space, const v1::RendezvousRequest& request) const {
  if (request.verb() != v1::RENDEZVOUS_VERB_GET && request.verb() != v1::RENDEZVOUS_VERB_WAIT) {
    return true;
  }
  return std::all_of(request.keys().begin(), request.keys().end(),
                     [&](const std::string& key) { return space.values.contains(key); });
}

void Rendezvous::Set(Fence fence, Space& space, const std::string& key, const std::string& value,
                     store::Batch* batch) {
  std::string& slot = space.values[key];
  space.bytes += key.size() + value.size() - slot.size();
  slot = value;
  batch->Put(Family::kRendezvous, StoredKey(fence.value, key), value);
}

v1::RendezvousReply Rendezvous::Answer(Fence fence, Space& space,
                                       const v1::RendezvousRequest& request, store::Batch* batch) {
  v1::RendezvousReply reply;
  reply.set_n(request.n());
  reply.set_code(0);
  const auto key = [&](int i) -> const std::string& { return request.keys(i); };
  switch (request.verb()) {
    case v1::RENDEZVOUS_VERB_SET:
      for (int i = 0; i < std::min(request.keys_size(), request.values_size()); ++i) {
        Set(fence, space, key(i), request.values(i), batch);
      }
      break;
    case v1::RENDEZVOUS_VERB_GET:
      for (const std::string& wanted : request.keys()) {
        reply.add_values(space.values.at(wanted));
      }
      break;
    case v1::RENDEZVOUS_VERB_WAIT:
      break;
    case v1::RENDEZVOUS_VERB_ADD: {
      const auto found = space.values.find(key(0));
      const int64_t sum =
          (found == space.values.end() ? 0 : Number(found->second)) + request.amount();
      Set(fence, space, key(0), Str(sum), batch);
      reply.set_number(sum);
      break;
    }
    case v1::RENDEZVOUS_VERB_COMPARE_SET: {
      // values: expected, desired. Absent key: set if `expected` is empty (c10d's rule).
      const auto found = space.values.find(key(0));
      const bool absent = found == space.values.end();
      if (absent ? request.values(0).empty() : found->second == request.values(0)) {
        Set(fence, space, key(0), request.values(1), batch);
      }
      const auto now = space.values.find(key(0));
      reply.add_values(now == space.values.end() ? request.values(0) : now->second);
      break;
    }
    case v1::RENDEZVOUS_VERB_CHECK:
      reply.set_number(std::all_of(request.keys().begin(), request.keys().end(),
                                   [&](const std::string& k) { return space.values.contains(k); }));
      break;
    case v1::RENDEZVOUS_VERB_DELETE:
      reply.set_number(static_cast<int64_t>(space.values.erase(key(0))));
      batch->Delete(Family::kRendezvous, StoredKey(fence.value, key(0)));
      break;
    case v1::RENDEZVOUS_VERB_APPEND: {
      const auto found = space.values.find(key(0));
      Set(fence, space, key(0),
          (found == space.values.end() ? "" : found->second) + request.values(0), batch);
      break;
    }
    case v1::RENDEZVOUS_VERB_COUNT:
      reply.set_number(static_cast<int64_t>(space.values.size()));
      break;
  }
  return reply;
}

// Answers of a rank are few and small (changes only); the oldest go first.
void Rendezvous::Remember(Space& space, uint32_t rank, const v1::RendezvousReply& answer) {
  space.answered[{rank, answer.n()}] = answer;
  const auto first = space.answered.lower_bound({rank, 0});
  const auto last = space.answered.lower_bound({rank + 1, 0});
  if (std::distance(first, last) > kAnswersPerRankMax) {
    space.answered.erase(first);
  }
}

void Rendezvous::Handle(Fence fence, uint32_t rank, const v1::RendezvousRequest& request,
                        int64_t now_ms, Reply reply) {
  Space& space = spaces_[fence.value];
  if (const auto before = space.answered.find({rank, request.n()});
      before != space.answered.end()) {
    reply(before->second);
    return;
  }
  const bool one_key = request.verb() != v1::RENDEZVOUS_VERB_COUNT && request.keys_size() == 0;
  const int values_min = request.verb() == v1::RENDEZVOUS_VERB_COMPARE_SET ? 2
                         : request.verb() == v1::RENDEZVOUS_VERB_APPEND    ? 1
                                                                           : 0;
  if (one_key || request.values_size() < values_min) {
    reply(Refuse(request.n(), InvalidArgument("rendezvous request without key or value")));
    return;
  }
  const size_t bytes = request.ByteSizeLong();
  if (bytes > kValueBytesMax || space.bytes + bytes > kAttemptBytesMax) {
    reply(Refuse(request.n(), ResourceExhausted("rendezvous store: too much data")));
    return;
  }
  if (!Ready(space, request)) {
    std::erase_if(space.waiters, [&](const Waiter& waiter) {  // a repeat replaces its former self
      return waiter.rank == rank && waiter.request.n() == request.n();
    });
    space.waiters.push_back({.rank = rank,
                             .request = request,
                             .deadline_ms = now_ms + std::max<int64_t>(request.timeout_ms(), 1),
                             .reply = std::move(reply)});
    return;
  }
  store::Batch batch;
  const v1::RendezvousReply answer = Answer(fence, space, request, &batch);
  if (ChangesStore(request.verb())) {
    Remember(space, rank, answer);
    // The answer may leave only when a coordinator killed now would still know it, and it stands in
    // the batch of what it is the answer to: else a repeated ADD counts twice and the gang waits
    // for a rank that does not exist.
    batch.Put(Family::kRendezvous, AnswerKey(fence.value, rank, answer.n()),
              answer.SerializeAsString());
    const Status queued = log_->AppendVolatile(
        std::move(batch), [reply, answer](const StatusOr<store::CommitSeq>&) { reply(answer); });
    if (!queued.ok()) {
      HEDDLE_WARN("rendezvous key is kept in memory only", {"fence", fence}, {"error", queued});
      reply(answer);  // in memory only; a crash now ends in RENDEZVOUS_TIMEOUT and a new attempt
    }
  } else {
    reply(answer);
  }
  Wake(fence, space);
}

void Rendezvous::Wake(Fence fence, Space& space) {
  std::vector<Waiter> ready;
  std::erase_if(space.waiters, [&](Waiter& waiter) {
    if (!Ready(space, waiter.request)) {
      return false;
    }
    ready.push_back(std::move(waiter));
    return true;
  });
  store::Batch unchanged;  // waits only read
  for (const Waiter& waiter : ready) {
    waiter.reply(Answer(fence, space, waiter.request, &unchanged));
  }
}

void Rendezvous::Drop(Fence fence) {
  if (const auto space = spaces_.find(fence.value); space != spaces_.end()) {
    for (const Waiter& waiter : space->second.waiters) {
      waiter.reply(Refuse(waiter.request.n(), Aborted("the attempt has ended")));
    }
    spaces_.erase(space);
  }
  store::Batch batch;
  batch.DeletePrefix(Family::kRendezvous, StoredKey(fence.value, ""));
  (void)log_->AppendVolatile(std::move(batch));  // Load drops what is left of a dead fence
}

void Rendezvous::Expire(int64_t now_ms) {
  for (auto& [fence, space] : spaces_) {
    std::vector<Waiter> late;
    std::erase_if(space.waiters, [&](Waiter& waiter) {
      if (waiter.deadline_ms > now_ms) {
        return false;
      }
      late.push_back(std::move(waiter));
      return true;
    });
    for (const Waiter& waiter : late) {
      waiter.reply(
          Refuse(waiter.request.n(), DeadlineExceeded(Str("rendezvous key ", waiter.request.keys(0),
                                                          " was not set in time"))));
    }
  }
}

int64_t Rendezvous::NextMs() const {
  int64_t next = std::numeric_limits<int64_t>::max();
  for (const auto& [fence, space] : spaces_) {
    for (const Waiter& waiter : space.waiters) {
      next = std::min(next, waiter.deadline_ms);
    }
  }
  return next;
}

}  // namespace heddle::runtime
