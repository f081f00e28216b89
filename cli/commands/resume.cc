// resume: goes on with a paused, failed or finished job from its newest good checkpoint.
#include "cli/commands/client.h"
#include "cli/commands/follow.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"

namespace heddle::cli {
namespace {

struct ResumeState {
  std::string job;
  std::vector<std::string> overrides;
  std::string request_id;
  bool follow = false;
};

StatusOr<int> Resume(const ResumeState& state, const CommandContext& context) {
  v1::ResumeRequest request;
  request.set_job(state.job);
  for (const std::string& text : state.overrides) {
    request.add_overrides(text);
  }
  request.set_request_id(state.request_id.empty() ? NewRequestId() : state.request_id);
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  ASSIGN_OR_RETURN(v1::Job job, client->Resume(request));
  if (state.follow) {
    ASSIGN_OR_RETURN(job, FollowJob(context, job.id()));
    return JobExitStatus(job);
  }
  if (context.json()) {
    PrintJson(job);
  } else {
    PrintText(Str(job.id(), " ", StateText(job), "\n"));
  }
  return 0;
}

}  // namespace

std::vector<Verb> ResumeVerbs() {
  return {MakeVerb<ResumeState>(
      {"resume"}, "go on from the newest good checkpoint", [](Verb* verb, ResumeState* state) {
        verb->options = {
            {"job", "job id", &state->job, true},
            {"overrides", "training.max_steps=N, schedule.*, logging.*", &state->overrides},
            {"--follow", "show steps until it is done", &state->follow},
            {"--request-id", "repeats with one id act once", &state->request_id}};
        verb->run = [state](const CommandContext& context) { return Resume(*state, context); };
      })};
}

}  // namespace heddle::cli
