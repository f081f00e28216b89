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

LeaseTable::Group LeaseTable::GroupOf(const Entry& entry) {
  if (entry.lost) {
    return kLost;
  }
  if (!entry.suspect) {
    return kLive;
  }
  if (entry.heard_again) {
    return entry.by_closing ? kClosedHeard : kSilentHeard;
  }
  return entry.by_closing ? kClosed : kSilent;
}

int64_t LeaseTable::KeyOf(const Entry& entry) const {
  return GroupOf(entry) == kLive ? SuspectMs(entry) : ExpiredMs(entry);
}

void LeaseTable::Take(const Entry& entry) {
  std::multiset<int64_t>& group = groups_[GroupOf(entry)];
  group.erase(group.find(KeyOf(entry)));
}

void LeaseTable::Put(const Entry& entry) { groups_[GroupOf(entry)].insert(KeyOf(entry)); }

void LeaseTable::Recovered(const std::string& worker, uint64_t session, int64_t now_ms) {
  Remove(worker);
  Entry entry;
  entry.session = session;
  entry.heard_ms = now_ms;
  entry.permit_sent_ms = now_ms;
  entry.suspect = true;
  entry.silent_ms = now_ms;
  Put(entries_[worker] = entry);
  silences_.push_back(now_ms);
  JudgeMass(now_ms);
}

void LeaseTable::Registered(const std::string& worker, uint64_t session, int64_t now_ms) {
  Remove(worker);
  Entry entry;
  entry.session = session;
  entry.heard_ms = now_ms;
  entry.permit_sent_ms = now_ms;  // the reply says what it may go on with
  Put(entries_[worker] = entry);
  Returned(now_ms);
}

void LeaseTable::Heard(const std::string& worker, uint64_t session, int64_t now_ms) {
  const auto it = entries_.find(worker);
  if (it == entries_.end() || it->second.session != session || it->second.lost) {
    return;
  }
  Take(it->second);
  it->second.heard_ms = now_ms;
  it->second.closed_ms = -1;
  it->second.heard_again = it->second.suspect;
  Put(it->second);
}

void LeaseTable::StreamClosed(const std::string& worker, uint64_t session, int64_t now_ms) {
  const auto it = entries_.find(worker);
  if (it != entries_.end() && it->second.session == session && it->second.closed_ms < 0) {
    Take(it->second);
    it->second.closed_ms = now_ms;
    it->second.heard_again = false;
    Put(it->second);
  }
}

void LeaseTable::PermitSent(const std::string& worker, int64_t now_ms) {
  const auto it = entries_.find(worker);
  if (it != entries_.end()) {
    Take(it->second);
    it->second.permit_sent_ms = now_ms;
    Put(it->second);
  }
}

void LeaseTable::Remove(const std::string& worker) {
  const auto it = entries_.find(worker);
  if (it != entries_.end()) {
    Take(it->second);
    entries_.erase(it);
  }
}

int64_t LeaseTable::SuspectMs(const Entry& entry) const {
  const int64_t silent = entry.heard_ms + options_.suspect_ms;
  return entry.closed_ms < 0 ? silent : std::min(silent, entry.closed_ms + options_.closed_ms);
}

int64_t LeaseTable::ExpiredMs(const Entry& entry) const {
  return std::max(entry.permit_sent_ms, entry.heard_ms) + options_.permit_ttl_ms +
         options_.permit_margin_ms;
}

int64_t LeaseTable::LostMs(Group group, int64_t expired_ms) const {
  return std::max({expired_ms, no_lost_before_ms_, group == kClosed ? 0 : mass_hold_until_ms_});
}

int64_t LeaseTable::FirstLostMs(Group group) const {
  return groups_[group].empty() ? kNever : LostMs(group, *groups_[group].begin());
}

void LeaseTable::JudgeMass(int64_t now_ms) {
  while (!silences_.empty() && silences_.front() < now_ms - options_.mass_window_ms) {
    silences_.pop_front();
  }
  const size_t known = entries_.size() - groups_[kLost].size();
  const size_t live = groups_[kLive].size();
  // Not LOST yet, and not by a closed connection.
  const size_t silent = groups_[kSilent].size() + groups_[kSilentHeard].size();
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
        Take(entry);
        entry.heard_ms = std::max(entry.heard_ms, now_ms);
        Put(entry);
      }
    }
  }
  last_poll_ms_ = now_ms;
  std::vector<Event> events;
  if (!groups_[kSilentHeard].empty() || !groups_[kClosedHeard].empty()) {
    TakeBack(now_ms, &events);
  }
  if (!groups_[kLive].empty() && *groups_[kLive].begin() <= now_ms) {
    Suspect(now_ms, &events);
  }
  JudgeMass(now_ms);
  if (std::min(FirstLostMs(kSilent), FirstLostMs(kClosed)) <= now_ms) {
    GiveUp(now_ms, &events);
  }
  return events;
}

void LeaseTable::TakeBack(int64_t now_ms, std::vector<Event>* events) {
  for (auto& [id, entry] : entries_) {
    if (entry.suspect && !entry.lost && entry.heard_again) {
      Take(entry);
      entry.suspect = false;
      entry.heard_again = false;
      entry.by_closing = false;
      Put(entry);
      Returned(now_ms);
      events->push_back(event::WorkerHeard{id, entry.session});
    }
  }
}

void LeaseTable::Suspect(int64_t now_ms, std::vector<Event>* events) {
  for (auto& [id, entry] : entries_) {
    if (!entry.suspect && !entry.lost && SuspectMs(entry) <= now_ms) {
      const bool closed = entry.closed_ms >= 0;
      Take(entry);
      entry.suspect = true;
      entry.silent_ms = now_ms;
      entry.by_closing = closed;
      Put(entry);
      if (!closed) {
        silences_.push_back(now_ms);
      }
      events->push_back(
          event::WorkerSuspect{id, entry.session, closed ? "its stream closed" : "no heartbeat"});
    }
  }
}

void LeaseTable::GiveUp(int64_t now_ms, std::vector<Event>* events) {
  for (auto& [id, entry] : entries_) {
    if (entry.suspect && !entry.lost && !entry.heard_again &&
        LostMs(GroupOf(entry), ExpiredMs(entry)) <= now_ms) {
      Take(entry);
      entry.lost = true;
      Put(entry);
      events->push_back(event::WorkerLost{id, entry.session});
    }
  }
}

int64_t LeaseTable::NextMs() const {
  if (!groups_[kSilentHeard].empty() || !groups_[kClosedHeard].empty()) {
    return last_poll_ms_;
  }
  const int64_t suspect = groups_[kLive].empty() ? kNever : *groups_[kLive].begin();
  return std::min({suspect, FirstLostMs(kSilent), FirstLostMs(kClosed)});
}

int64_t LeaseTable::AgeMs(const std::string& worker, int64_t now_ms) const {
  const auto it = entries_.find(worker);
  return it == entries_.end() ? -1 : now_ms - it->second.heard_ms;
}

}  // namespace heddle::state
