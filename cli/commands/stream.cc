#include "cli/commands/stream.h"

#include <chrono>
#include <cstdio>
#include <thread>

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
  uint64_t& next = next_[{line.attempt(), line.rank()}];
  if (line.offset() + line.data().size() <= next) {
    return false;
  }
  next = line.offset() + line.data().size();
  return true;
}

}  // namespace heddle::cli
