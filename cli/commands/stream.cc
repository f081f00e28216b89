#include "cli/commands/stream.h"

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <thread>
#include <utility>

namespace heddle::cli {

Status FollowStream(const std::function<Status(bool* alive)>& stream) {
  bool told = false;
  while (true) {
    bool alive = false;
    Status status = stream(&alive);
    if (status.ok() || status.code() != StatusCode::kUnavailable) {
      return status;
    }
    if (alive || !told) {
      fprintf(stderr, "heddle: %s; trying again\n", Message(status).c_str());
      told = true;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
}

bool ShownLines::Add(const v1::LogLine& line) {
  const Log log = {line.attempt(), line.rank()};
  if (line.lost() > 0) {  // no place of its own in the log
    uint64_t& told = lost_[log];
    return std::exchange(told, std::max(told, line.lost())) < line.lost();
  }
  uint64_t& next = next_[log];
  if (line.offset() + line.data().size() <= next) {
    return false;
  }
  next = line.offset() + line.data().size();
  return true;
}

}  // namespace heddle::cli
