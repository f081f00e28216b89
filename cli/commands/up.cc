// up: a cluster on this machine. down: ends it through a checkpoint.
#include <filesystem>
#include <limits>

#include "base/settings/json.h"
#include "cli/commands/context.h"
#include "cli/commands/local_cluster.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"

namespace heddle::cli {
namespace {

constexpr int64_t kNotGiven = std::numeric_limits<int64_t>::min();

struct UpState {
  int64_t workers = kNotGiven;
  std::string state;
};

constexpr int64_t kWorkersMax = 64;

StatusOr<int> Up(const UpState& state, const CommandContext& context) {
  const bool given = state.workers != kNotGiven;
  if (given && (state.workers < 1 || state.workers > kWorkersMax)) {
    return InvalidArgument(Str("--workers ", state.workers, ": must be 1 .. ", kWorkersMax));
  }
  const std::string folder =
      std::filesystem::absolute(state.state.empty() ? Str(context.home, "/local") : state.state)
          .lexically_normal()
          .string();
  // `down` finds a cluster by the context alone: the former one must not get lost.
  if (const StatusOr<LocalContext> former = ReadContext(context.home);
      former.ok() && !former->state.empty() && former->state != folder &&
      !FindDaemons("heddle-coordinator", former->state).empty()) {
    return FailedPrecondition(Str("a local cluster runs in ", former->state,
                                  ": end it with `heddle down`, or set another HEDDLE_HOME"));
  }
  const LocalClusterOptions options{
      .state = folder, .program_dir = context.program_dir, .workers = given ? state.workers : 0};
  ASSIGN_OR_RETURN(const RunningCluster cluster, StartLocalCluster(options));
  RETURN_IF_ERROR(
      WriteContext(context.home, {.coordinator = cluster.coordinator, .state = folder}));
  if (context.json()) {
    PrintText(Str("{\"coordinator\":", settings::JsonQuote(cluster.coordinator), ",\"state\":",
                  settings::JsonQuote(folder), ",\"workers\":", cluster.workers, "}\n"));
  } else {
    PrintText(Str("coordinator at ", cluster.coordinator, ", ", cluster.workers,
                  cluster.workers == 1 ? " worker" : " workers", ", state in ", folder, "\n"));
  }
  return 0;
}

StatusOr<int> Down(const CommandContext& context) {
  const StatusOr<LocalContext> local = ReadContext(context.home);
  if (!local.ok()) {
    return local.status();
  }
  if (local->state.empty()) {
    return FailedPrecondition("the context names no local cluster");
  }
  RETURN_IF_ERROR(StopLocalCluster({.state = local->state, .program_dir = context.program_dir}));
  PrintText(context.json() ? Str("{\"state\":", settings::JsonQuote(local->state), "}\n")
                           : Str("stopped; state stays in ", local->state, "\n"));
  return 0;
}

}  // namespace

std::vector<Verb> ClusterVerbs() {
  return {MakeVerb<UpState>(
              {"up"}, "start or re-attach a local cluster",
              [](Verb* verb, UpState* state) {
                verb->options = {{"--workers", "number of workers (default 2, or those that run)",
                                  &state->workers},
                                 {"--state", "folder (default ~/.heddle/local)", &state->state}};
                verb->run = [state](const CommandContext& context) { return Up(*state, context); };
              }),
          MakeVerb<UpState>({"down"}, "stop the local cluster through a checkpoint",
                            [](Verb* verb, UpState*) { verb->run = Down; })};
}

}  // namespace heddle::cli
