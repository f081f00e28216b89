// Who is silent: the coordinator's side of heartbeats and permits (control-plane W1, W2, L4, L6,
// L9, L11). Pure bookkeeping in memory; nothing is stored, a restart counts anew. It tells when a
// worker becomes SUSPECT and when it is LOST; Apply turns that into states.
#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "coordinator/state/event.h"
#include "coordinator/state/policy.h"

namespace heddle::state {

struct LeaseOptions {
  int64_t suspect_ms = 6'000;           // W1: silent, 3 h
  int64_t closed_ms = 2'000;            // W1: stream closed and not back
  int64_t permit_ttl_ms = 20'000;       // L4
  int64_t permit_margin_ms = 5'000;     // L6: clock rate and writes in flight
  int64_t start_grace_ms = 35'000;      // L9: no LOST for ttl + 15 s after a start or a stall
  int64_t stall_ms = 1'000;             // L9: own loop late by more: all leases count anew
  int64_t mass_window_ms = 10'000;      // L9; below 0: never
  int64_t mass_hold_ms = 60'000;        // > 20 % silent
  int64_t mass_hold_long_ms = 300'000;  // > 50 % silent
  int64_t mass_return_ms = 15'000;      // after each return of one, the others may follow
};

class LeaseTable {
 public:
  // `now_ms`: Time::ms of the coordinator's start. Workers known from the records count as heard
  // now; `suspect` are those recorded as SUSPECT.
  explicit LeaseTable(LeaseOptions options, int64_t now_ms);

  // A worker of the records (CONNECTED or SUSPECT there) at recovery: silent from the start on, its
  // old permits may still live.
  void Recovered(const std::string& worker, uint64_t session, int64_t now_ms);
  // A registration was accepted.
  void Registered(const std::string& worker, uint64_t session, int64_t now_ms);
  // Any message of the current session. Gives WorkerHeard events at the next Poll if it was
  // SUSPECT.
  void Heard(const std::string& worker, uint64_t session, int64_t now_ms);
  // The peer closed it; not for a transport that gave up by itself (R4): that is silence.
  void StreamClosed(const std::string& worker, uint64_t session, int64_t now_ms);
  // A heartbeat reply with permits was sent.
  void PermitSent(const std::string& worker, int64_t now_ms);
  // LEFT or forgotten.
  void Remove(const std::string& worker);

  // Events that are due, in a fixed order: WorkerHeard, WorkerSuspect, WorkerLost. Each is given
  // once.
  std::vector<Event> Poll(int64_t now_ms);
  // When Poll has something next at the earliest; INT64_MAX: only after a message.
  int64_t NextMs() const;

  // L9 holds back LOST now: alarm CONTROL_PLANE_PARTITION.
  bool mass_silence() const { return mass_hold_until_ms_ > last_poll_ms_; }
  // ms since the last message, -1 if unknown.
  int64_t AgeMs(const std::string& worker, int64_t now_ms) const;

 private:
  struct Entry {
    uint64_t session = 0;
    int64_t heard_ms = 0;
    int64_t closed_ms = -1;  // stream closed since; -1 open
    int64_t permit_sent_ms = 0;
    bool suspect = false;
    int64_t silent_ms = 0;    // when it became SUSPECT
    bool by_closing = false;  // SUSPECT by a closed stream: no silence in the sense of L9
    bool lost = false;
    bool heard_again = false;
  };
  // Workers are asked for by what they wait for, at every event: with thousands of them nothing but
  // their own entries may be looked at. A deadline of all of a group is in the group's rule.
  enum Group { kLive, kSilent, kClosed, kSilentHeard, kClosedHeard, kLost, kGroupCount };
  static Group GroupOf(const Entry& entry);
  int64_t KeyOf(const Entry& entry) const;
  // Every change of an entry that is in the table stands between these.
  void Take(const Entry& entry);
  void Put(const Entry& entry);

  int64_t SuspectMs(const Entry& entry) const;
  int64_t ExpiredMs(const Entry& entry) const;
  // When the first of the group is LOST whose permit expires at `expired_ms`.
  int64_t LostMs(Group group, int64_t expired_ms) const;
  int64_t FirstLostMs(Group group) const;
  // The three parts of Poll.
  void TakeBack(int64_t now_ms, std::vector<Event>* events);
  void Suspect(int64_t now_ms, std::vector<Event>* events);
  void GiveUp(int64_t now_ms, std::vector<Event>* events);
  void JudgeMass(int64_t now_ms);
  void Returned(int64_t now_ms);

  LeaseOptions options_;
  std::map<std::string, Entry> entries_;
  // Of each group: SuspectMs of the live ones, ExpiredMs of the suspect ones.
  std::array<std::multiset<int64_t>, kGroupCount> groups_;
  std::deque<int64_t> silences_;  // times at which workers fell silent
  int64_t no_lost_before_ms_;
  int64_t mass_start_ms_ = -1;  // of the mass silence; -1: none
  int64_t mass_return_ms_ = 0;  // when one of them came back last
  int64_t mass_hold_until_ms_ = 0;
  int64_t last_poll_ms_;
};

}  // namespace heddle::state
