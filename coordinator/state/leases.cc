#include "coordinator/state/leases.h"

#include <algorithm>
#include <limits>

namespace heddle::state {

namespace {
constexpr int64_t kNever = std::numeric_limits<int64_t>::max();
}

LeaseTable::LeaseTable(LeaseOptions options, int64_t now_ms)
    : options_(options),
      no_lost_before_ms_(now_ms + options.start_grace_ms),
      last_poll_ms_(now_ms) {}

void LeaseTable::Recovered(const std::string& worker, uint64_t session, int64_t now_ms) {
  Entry entry;
  entry.session = session;
  entry.heard_ms = now_ms;
  entry.permit_sent_ms = now_ms;
  entry.suspect = true;
  entry.silent_ms = now_ms;
  entries_[worker] = entry;
  silences_.push_back(now_ms);
  JudgeMass(now_ms);
}

void LeaseTable::Registered(const std::string& worker, uint64_t session, int64_t now_ms) {
  Entry entry;
  entry.session = session;
  entry.heard_ms = now_ms;
  entry.permit_sent_ms = now_ms;  // the reply says what it may go on with
  entries_[worker] = entry;
  Returned(now_ms);
}

void LeaseTable::Heard(const std::string& worker, uint64_t session, int64_t now_ms) {
  const auto it = entries_.find(worker);
  if (it == entries_.end() || it->second.session != session || it->second.lost) {
    return;
  }
  it->second.heard_ms = now_ms;
  it->second.closed_ms = -1;
  it->second.heard_again = it->second.suspect;
}

void LeaseTable::StreamClosed(const std::string& worker, uint64_t session, int64_t now_ms) {
  const auto it = entries_.find(worker);
  if (it != entries_.end() && it->second.session == session && it->second.closed_ms < 0) {
    it->second.closed_ms = now_ms;
    it->second.heard_again = false;
  }
}

void LeaseTable::PermitSent(const std::string& worker, int64_t now_ms) {
  const auto it = entries_.find(worker);
  if (it != entries_.end()) {
    it->second.permit_sent_ms = now_ms;
  }
}

void LeaseTable::Remove(const std::string& worker) { entries_.erase(worker); }

int64_t LeaseTable::SuspectMs(const Entry& entry) const {
  const int64_t silent = entry.heard_ms + options_.suspect_ms;
  return entry.closed_ms < 0 ? silent : std::min(silent, entry.closed_ms + options_.closed_ms);
}

int64_t LeaseTable::LostMs(const Entry& entry) const {
  const int64_t expired = std::max(entry.permit_sent_ms, entry.heard_ms) + options_.permit_ttl_ms +
                          options_.permit_margin_ms;
  return std::max({expired, no_lost_before_ms_, entry.by_closing ? 0 : mass_hold_until_ms_});
}

void LeaseTable::JudgeMass(int64_t now_ms) {
  while (!silences_.empty() && silences_.front() < now_ms - options_.mass_window_ms) {
    silences_.pop_front();
  }
  size_t known = 0;
  size_t live = 0;
  size_t silent = 0;  // not LOST yet, and not by a closed connection
  for (const auto& [id, entry] : entries_) {
    known += entry.lost ? 0 : 1;
    live += entry.lost || entry.suspect ? 0 : 1;
    silent += !entry.lost && entry.suspect && !entry.by_closing ? 1 : 0;
  }
  // With nobody left to hear from, it does not matter how far apart they fell silent.
  const bool many = silences_.size() >= 2 && silences_.size() * 5 > known;
  const bool all = options_.mass_window_ms >= 0 && live == 0 && silent >= 2;
  if ((many || all) && mass_start_ms_ < 0) {
    mass_start_ms_ = now_ms;
  }
  if (mass_start_ms_ < 0) {
    return;
  }
  int64_t hold = 0;
  if (live == 0) {
    hold = kNever / 2;
  } else if (silent * 2 > known) {
    hold = mass_start_ms_ + options_.mass_hold_long_ms;
  } else if (silent >= 2 && silent * 5 > known) {
    hold = mass_start_ms_ + options_.mass_hold_ms;
  } else {
    mass_start_ms_ = -1;
    // Who is silent still counts with the next one that falls silent.
    silences_.clear();
    for (const auto& [id, entry] : entries_) {
      if (!entry.lost && entry.suspect && !entry.by_closing) {
        silences_.push_back(entry.silent_ms);
      }
    }
    std::sort(silences_.begin(), silences_.end());
  }
  mass_hold_until_ms_ = std::max(hold, mass_return_ms_);
}

// A silent worker spoke: its fellows get time to do so too.
void LeaseTable::Returned(int64_t now_ms) {
  if (mass_start_ms_ >= 0 || mass_hold_until_ms_ > now_ms) {
    mass_return_ms_ = now_ms + options_.mass_return_ms;
    JudgeMass(now_ms);
  }
}

std::vector<Event> LeaseTable::Poll(int64_t now_ms) {
  // A late loop proves nothing about the workers: their messages wait in our own queue.
  const int64_t due = NextMs();
  if (due != kNever && now_ms - std::max(due, last_poll_ms_) > options_.stall_ms) {
    no_lost_before_ms_ = now_ms + options_.start_grace_ms;
    for (auto& [id, entry] : entries_) {
      if (!entry.suspect && !entry.lost) {
        entry.heard_ms = std::max(entry.heard_ms, now_ms);
      }
    }
  }
  last_poll_ms_ = now_ms;
  std::vector<Event> events;
  for (auto& [id, entry] : entries_) {
    if (entry.suspect && !entry.lost && entry.heard_again) {
      entry.suspect = false;
      entry.heard_again = false;
      entry.by_closing = false;
      Returned(now_ms);
      events.push_back(event::WorkerHeard{id, entry.session});
    }
  }
  for (auto& [id, entry] : entries_) {
    if (!entry.suspect && !entry.lost && SuspectMs(entry) <= now_ms) {
      const bool closed = entry.closed_ms >= 0;
      entry.suspect = true;
      entry.silent_ms = now_ms;
      entry.by_closing = closed;
      if (!closed) {
        silences_.push_back(now_ms);
      }
      events.push_back(
          event::WorkerSuspect{id, entry.session, closed ? "its stream closed" : "no heartbeat"});
    }
  }
  JudgeMass(now_ms);
  for (auto& [id, entry] : entries_) {
    if (entry.suspect && !entry.lost && !entry.heard_again && LostMs(entry) <= now_ms) {
      entry.lost = true;
      events.push_back(event::WorkerLost{id, entry.session});
    }
  }
  return events;
}

int64_t LeaseTable::NextMs() const {
  int64_t next = kNever;
  for (const auto& [id, entry] : entries_) {
    if (entry.lost) {
      continue;
    }
    next = std::min(next, entry.heard_again ? last_poll_ms_
                          : entry.suspect   ? LostMs(entry)
                                            : SuspectMs(entry));
  }
  return next;
}

int64_t LeaseTable::AgeMs(const std::string& worker, int64_t now_ms) const {
  const auto it = entries_.find(worker);
  return it == entries_.end() ? -1 : now_ms - it->second.heard_ms;
}

}  // namespace heddle::state
