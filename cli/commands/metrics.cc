// metrics: the series of a job, one point a step.
#include <algorithm>
#include <utility>

#include "cli/commands/client.h"
#include "cli/commands/print.h"
#include "cli/commands/stream.h"
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
  // A coordinator that restarts later is waited for, one that was never there is an error.
  RETURN_IF_ERROR(client->Get(state.job).status());
  v1::MetricsRequest request;
  request.set_job(state.job);
  request.set_from_step(static_cast<uint64_t>(std::max<int64_t>(state.from, 0)));
  request.set_follow(state.follow);
  // Points come in this order; a stream that begins again sends all of them.
  std::pair<uint32_t, uint64_t> last = {0, 0};
  bool any = false;
  const auto show = [&](const v1::MetricPoint& point) {
    if (const std::pair now(point.attempt(), point.step()); !any || now > last) {
      last = now;
      any = true;
      context.json() ? PrintJson(point) : PrintText(StepLine(point));
      return true;
    }
    return false;
  };
  const auto stream = [&](bool* alive) {
    return client->Metrics(request, [&](const v1::MetricPoint& point) {
      *alive = show(point) || *alive;
      return true;
    });
  };
  bool alive = false;
  RETURN_IF_ERROR(state.follow ? FollowStream(stream) : stream(&alive));
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
