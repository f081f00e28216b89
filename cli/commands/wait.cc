// wait: until a job runs or is done.
#include "cli/commands/client.h"
#include "cli/commands/follow.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"

namespace heddle::cli {
namespace {

struct WaitState {
  std::string job;
  std::string target = "done";
};

StatusOr<int> Wait(const WaitState& state, const CommandContext& context) {
  if (state.target != "done" && state.target != "running") {
    return InvalidArgument(Str("--for ", state.target, ": must be running or done"));
  }
  // --timeout bounds the whole wait here, not the single calls.
  CommandContext calls = context;
  calls.timeout_ms = 0;
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(calls));
  // A coordinator that restarts is waited for, one that was never there is an error.
  RETURN_IF_ERROR(client->Get(state.job).status());
  const bool running = state.target == "running";
  ASSIGN_OR_RETURN(const v1::Job job,
                   WaitFor(*client, state.job, context.timeout_ms, [running](const v1::Job& now) {
                     return now.state() == "DONE" || (running && now.phase() == "RUNNING");
                   }));
  if (context.json()) {
    PrintJson(job);
  } else {
    PrintText(Str(job.id(), " ", StateText(job), "\n"));
  }
  return job.state() == "DONE" ? JobExitStatus(job) : 0;
}

}  // namespace

std::vector<Verb> WaitVerbs() {
  return {MakeVerb<WaitState>(
      {"wait"}, "until a job runs or is done", [](Verb* verb, WaitState* state) {
        verb->options = {{"job", "job id", &state->job, true},
                         {"--for", "running or done (default)", &state->target}};
        verb->run = [state](const CommandContext& context) { return Wait(*state, context); };
      })};
}

}  // namespace heddle::cli
