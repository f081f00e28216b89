#include "worker/shim/outbox.h"

#include <utility>

namespace heddle::shim {
namespace {

constexpr size_t kProgressFramesMax = 1024;
constexpr size_t kProgressBytesMax = size_t{4} << 20;

}  // namespace

void Outbox::Add(const control::Frame& frame) {
  const control::FrameType type = frame.header.type;
  if (control::IsSticky(type)) {
    for (auto it = entries_.begin(); it != entries_.end(); ++it) {
      if (it->type == type && it->rank == frame.header.rank) {
        Erase(it);
        break;
      }
    }
  }
  Entry entry = {control::EncodeFrame(frame), type, frame.header.rank};
  if (control::IsReliable(type)) {
    ++kept_;
    kept_bytes_ += entry.bytes.size();
  } else if (type == control::FrameType::kProgress) {
    ++progress_;
    progress_bytes_ += entry.bytes.size();
  }
  const auto added = entries_.insert(entries_.end(), std::move(entry));
  if (next_ == entries_.end()) next_ = added;
  while (progress_ > kProgressFramesMax || progress_bytes_ > kProgressBytesMax) {
    DropOldestProgress();
  }
}

void Outbox::Erase(Entries::iterator entry) {
  if (next_ == entry) ++next_;
  if (entry->number != 0) sent_.erase(entry->number);
  if (control::IsReliable(entry->type)) {
    --kept_;
    kept_bytes_ -= entry->bytes.size();
  } else if (entry->type == control::FrameType::kProgress) {
    --progress_;
    progress_bytes_ -= entry->bytes.size();
  }
  entries_.erase(entry);
}

void Outbox::DropOldestProgress() {
  for (auto it = entries_.begin(); it != entries_.end(); ++it) {
    if (it->type != control::FrameType::kProgress) continue;
    if (!it->sent) ++progress_dropped_;
    Erase(it);
    return;
  }
}

void Outbox::Attach() {
  Detach();
  next_ = entries_.begin();
}

void Outbox::Detach() {
  sent_.clear();
  last_number_ = 0;
  for (auto it = entries_.begin(); it != entries_.end();) {
    const auto entry = it++;
    entry->number = 0;
    // An end of file is news for one daemon only: the exit that follows is kept.
    if (entry->type == control::FrameType::kRankEof) Erase(entry);
  }
  next_ = entries_.begin();
}

std::string Outbox::Next() {
  if (next_ == entries_.end()) return "";
  const auto entry = next_++;
  entry->sent = true;
  std::string bytes = entry->bytes;
  if (control::IsReliable(entry->type)) {
    entry->number = ++last_number_;
    sent_[entry->number] = entry;
  } else if (entry->type != control::FrameType::kProgress) {
    Erase(entry);
  }
  return bytes;
}

void Outbox::Acknowledge(uint64_t number) {
  const auto found = sent_.find(number);
  if (found == sent_.end() || control::IsSticky(found->second->type)) return;
  Erase(found->second);
}

std::string Outbox::Replay() const {
  std::string bytes;
  for (const Entry& entry : entries_) {
    if (control::IsReliable(entry.type)) bytes += entry.bytes;
  }
  return bytes;
}

}  // namespace heddle::shim
