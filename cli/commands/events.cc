// events: the event log of the cluster or of one job.
#include <algorithm>
#include <chrono>
#include <thread>

#include "cli/commands/client.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"

namespace heddle::cli {
namespace {

struct EventsState {
  std::string job;
  bool follow = false;
  int64_t from = 1;
};

// The stream goes on at the sequence number after the last one seen, so a restart of the
// coordinator neither repeats nor loses an event.
StatusOr<int> Events(const EventsState& state, const CommandContext& context) {
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  v1::WatchRequest request;
  request.set_job(state.job);
  request.set_no_follow(!state.follow);
  uint64_t next = static_cast<uint64_t>(std::max<int64_t>(state.from, 1));
  const auto show = [&](const v1::WatchFrame& frame) {
    if (frame.kind() == v1::WatchFrame::KIND_RESYNC) {
      next = std::max<uint64_t>(next, frame.seq());
      return false;
    }
    if (frame.kind() == v1::WatchFrame::KIND_EVENT) {
      next = frame.event().seq() + 1;
      if (context.json()) {
        PrintJson(frame.event());
      } else {
        PrintText(EventLine(frame.event()));
      }
    }
    return true;
  };
  while (true) {
    request.set_from_seq(next);
    const Status status = client->Watch(request, show);
    if (!status.ok() && (!state.follow || status.code() != StatusCode::kUnavailable)) {
      return status;
    }
    if (!state.follow) {
      return 0;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
  }
}

}  // namespace

std::vector<Verb> EventVerbs() {
  return {MakeVerb<EventsState>(
      {"events"}, "the event log (-f: follow)", [](Verb* verb, EventsState* state) {
        verb->options = {{"job", "only of this job", &state->job},
                         {"-f,--follow", "go on with new events", &state->follow},
                         {"--from", "first sequence number", &state->from}};
        verb->run = [state](const CommandContext& context) { return Events(*state, context); };
      })};
}

}  // namespace heddle::cli
