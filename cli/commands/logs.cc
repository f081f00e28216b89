// logs: what the ranks of a job printed.
#include <algorithm>
#include <cstdio>
#include <limits>

#include "cli/commands/client.h"
#include "cli/commands/print.h"
#include "cli/commands/stream.h"
#include "cli/commands/verbs.h"

namespace heddle::cli {
namespace {

constexpr uint32_t kRanksAllShipped = 64;                      // control-plane X8
constexpr int64_t kAll = std::numeric_limits<int64_t>::min();  // not asked for

struct LogsState {
  std::string job;
  int64_t rank = kAll;
  int64_t attempt = kAll;
  int64_t tail = kAll;
  bool follow = false;
};

v1::LogsRequest Request(const LogsState& state) {
  v1::LogsRequest request;
  request.set_job(state.job);
  if (state.rank >= 0) {
    request.set_rank(static_cast<int32_t>(state.rank));
  }
  if (state.attempt > 0) {
    request.set_attempt(static_cast<uint32_t>(state.attempt));
  }
  if (state.tail >= 0) {
    request.set_tail(state.tail);
  }
  request.set_follow(state.follow);
  return request;
}

Status CheckNumbers(const LogsState& state) {
  const struct {
    const char* name;
    int64_t value;
    int64_t least;
  } numbers[] = {
      {"--rank", state.rank, 0}, {"--attempt", state.attempt, 1}, {"--tail", state.tail, 0}};
  for (const auto& [name, value, least] : numbers) {
    if (value != kAll && (value < least || value > std::numeric_limits<int32_t>::max())) {
      return InvalidArgument(
          Str(name, " ", value, ": must be ", least, " .. ", std::numeric_limits<int32_t>::max()));
    }
  }
  return OkStatus();
}

Status CheckRank(const LogsState& state, const v1::Job& job) {
  if (state.rank < 0 || static_cast<uint64_t>(state.rank) < job.ranks()) {
    return OkStatus();
  }
  return NotFound(Str("job ", job.id(), " has no rank ", state.rank, ": it has ", job.ranks(),
                      ", counted from 0"));
}

// No lines of an attempt that does not exist would look like a silent one. One that is followed may
// still come.
Status CheckAttempt(const LogsState& state, const v1::Job& job) {
  int64_t newest = 0;
  for (const v1::Attempt& attempt : job.attempts()) {
    newest = std::max<int64_t>(newest, attempt.number());
  }
  if (state.follow || state.attempt <= newest) {
    return OkStatus();
  }
  return NotFound(Str("job ", job.id(), " has no attempt ", state.attempt, ": ",
                      newest == 0 ? std::string("none has begun") : Str("the newest is ", newest)));
}

// Silence of a rank whose log stays on its node would look like that of one that prints nothing.
void WarnOfUnshipped(const LogsState& state, const v1::Job& job) {
  if (state.rank > 0 && job.ranks() > kRanksAllShipped) {
    fprintf(stderr,
            "heddle: logs: no log of rank %lld: a job of more than %u ranks sends those of rank 0 "
            "and of ranks that failed\n",
            static_cast<long long>(state.rank), kRanksAllShipped);
  }
}

StatusOr<int> Logs(const LogsState& state, const CommandContext& context) {
  RETURN_IF_ERROR(CheckNumbers(state));
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  // A coordinator that restarts later is waited for, one that was never there is an error.
  ASSIGN_OR_RETURN(const v1::Job job, client->Get(state.job));
  RETURN_IF_ERROR(CheckRank(state, job));
  v1::LogsRequest request = Request(state);
  const bool prefix = state.rank < 0;
  ShownLines shown;
  const auto stream = [&](bool* alive) {
    Status status = client->Logs(request, [&](const v1::LogLine& line) {
      if (shown.Add(line)) {
        *alive = true;
        PrintText(LogText(line, context.json(), prefix));
      }
      return true;
    });
    if (!shown.empty()) {
      request.clear_tail();  // more than the tail may have come while nobody answered
    }
    return status;
  };
  bool alive = false;
  RETURN_IF_ERROR(state.follow ? FollowStream(stream) : stream(&alive));
  if (shown.empty()) {
    RETURN_IF_ERROR(CheckAttempt(state, job));
    WarnOfUnshipped(state, job);
  }
  return 0;
}

}  // namespace

std::vector<Verb> LogVerbs() {
  return {MakeVerb<LogsState>(
      {"logs"}, "what the ranks of a job printed", [](Verb* verb, LogsState* state) {
        verb->options = {{"job", "job id", &state->job, true},
                         {"--rank", "only this rank", &state->rank},
                         {"--attempt", "only this attempt (default: the newest)", &state->attempt},
                         {"--tail", "only the last N lines", &state->tail},
                         {"-f,--follow", "go on with new lines", &state->follow}};
        verb->run = [state](const CommandContext& context) { return Logs(*state, context); };
      })};
}

}  // namespace heddle::cli
