// cancel, pause, preempt (stop a job), hold and release (keep a queued job from starting).
#include "base/units/units.h"
#include "cli/commands/client.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"

namespace heddle::cli {
namespace {

struct StopState {
  std::string job;
  std::string grace;
  std::string reason;
  std::string request_id;
};

int PrintJob(const v1::Job& job, const CommandContext& context) {
  if (context.json()) {
    PrintJson(job);
  } else {
    PrintText(Str(job.id(), " ", StateText(job), "\n"));
  }
  return 0;
}

std::string RequestId(const StopState& state) {
  return state.request_id.empty() ? NewRequestId() : state.request_id;
}

StatusOr<int> Stop(v1::StopVerb what, const StopState& state, const CommandContext& context) {
  v1::StopRequest request;
  request.set_job(state.job);
  request.set_verb(what);
  request.set_reason(state.reason);
  request.set_request_id(RequestId(state));
  if (!state.grace.empty()) {
    ASSIGN_OR_RETURN(const std::chrono::nanoseconds grace, ParseDuration(state.grace));
    request.set_grace_ms(std::chrono::duration_cast<std::chrono::milliseconds>(grace).count());
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  ASSIGN_OR_RETURN(const v1::Job job, client->Stop(request));
  return PrintJob(job, context);
}

StatusOr<int> Hold(const StopState& state, const CommandContext& context) {
  v1::HoldRequest request;
  request.set_job(state.job);
  request.set_request_id(RequestId(state));
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  ASSIGN_OR_RETURN(const v1::Job job, client->Hold(request));
  return PrintJob(job, context);
}

StatusOr<int> Release(const StopState& state, const CommandContext& context) {
  v1::ReleaseRequest request;
  request.set_job(state.job);
  request.set_request_id(RequestId(state));
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  ASSIGN_OR_RETURN(const v1::Job job, client->Release(request));
  return PrintJob(job, context);
}

template <typename Function>
Verb MakeStop(const char* name, const char* doc, bool graceful, Function function) {
  return MakeVerb<StopState>({name}, doc, [=](Verb* verb, StopState* state) {
    verb->options = {{"job", "job id", &state->job, true},
                     {"--request-id", "repeats with one id act once", &state->request_id}};
    if (graceful) {
      verb->options.push_back({"--grace", "time to save and leave, such as 30s", &state->grace});
      verb->options.push_back({"--reason", "kept in the events", &state->reason});
    }
    verb->run = [=](const CommandContext& context) { return function(*state, context); };
  });
}

}  // namespace

std::vector<Verb> StopVerbs() {
  const auto stop = [](v1::StopVerb what) {
    return [what](const StopState& state, const CommandContext& context) {
      return Stop(what, state, context);
    };
  };
  return {MakeStop("cancel", "end a job", true, stop(v1::STOP_VERB_CANCEL)),
          MakeStop("pause", "save and stop; `resume` goes on", true, stop(v1::STOP_VERB_PAUSE)),
          MakeStop("preempt", "save, stop and queue again", true, stop(v1::STOP_VERB_PREEMPT)),
          MakeStop("hold", "keep a queued job from starting", false, Hold),
          MakeStop("release", "end a hold", false, Release)};
}

}  // namespace heddle::cli
