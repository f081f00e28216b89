// logs: what the ranks of a job printed.
#include "cli/commands/client.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"

namespace heddle::cli {
namespace {

struct LogsState {
  std::string job;
  int64_t rank = -1;
  int64_t attempt = 0;
  int64_t tail = -1;
  bool follow = false;
};

StatusOr<int> Logs(const LogsState& state, const CommandContext& context) {
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
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
  const bool prefix = state.rank < 0;
  RETURN_IF_ERROR(client->Logs(request, [&](const v1::LogLine& line) {
    PrintText(LogText(line, context.json(), prefix));
    return true;
  }));
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
