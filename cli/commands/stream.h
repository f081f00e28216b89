// Streams that outlive a restart of the coordinator: begun again where they broke.
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <utility>

#include "base/status/status.h"
#include "heddle/v1/jobs.pb.h"

namespace heddle::cli {

// Calls `stream` until it returns anything but UNAVAILABLE, as `wait` does without a limit: the job
// goes on meanwhile. A line on stderr tells, once, that nobody answers; `stream` sets `*alive`
// when something new came, so that the next break is told again.
Status FollowStream(const std::function<Status(bool* alive)>& stream);

// Which lines of logs were shown already: a stream that begins again sends all of them.
class ShownLines {
 public:
  // Whether `line` is new; then it counts as shown.
  bool Add(const v1::LogLine& line);
  bool empty() const { return next_.empty() && lost_.empty(); }

 private:
  using Log = std::pair<uint32_t, uint32_t>;  // attempt, rank
  std::map<Log, uint64_t> next_;              // offset
  std::map<Log, uint64_t> lost_;              // bytes that were told to be missing
};

}  // namespace heddle::cli
