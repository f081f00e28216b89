// metrics: the series of a job, one point a step.
#include "cli/commands/client.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"

namespace heddle::cli {
namespace {

struct MetricsState {
  std::string job;
  int64_t from = 0;
  bool follow = false;
};

StatusOr<int> Metrics(const MetricsState& state, const CommandContext& context) {
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  v1::MetricsRequest request;
  request.set_job(state.job);
  request.set_from_step(static_cast<uint64_t>(std::max<int64_t>(state.from, 0)));
  request.set_follow(state.follow);
  RETURN_IF_ERROR(client->Metrics(request, [&](const v1::MetricPoint& point) {
    if (context.json()) {
      PrintJson(point);
    } else {
      PrintText(StepLine(point));
    }
    return true;
  }));
  return 0;
}

}  // namespace

std::vector<Verb> MetricVerbs() {
  return {MakeVerb<MetricsState>(
      {"metrics"}, "the per-step series of a job", [](Verb* verb, MetricsState* state) {
        verb->options = {{"job", "job id", &state->job, true},
                         {"--from", "first step", &state->from},
                         {"-f,--follow", "go on with new steps", &state->follow}};
        verb->run = [state](const CommandContext& context) { return Metrics(*state, context); };
      })};
}

}  // namespace heddle::cli
