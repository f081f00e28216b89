// submit: hands a resolved configuration to the coordinator. run: submit and follow, on a temporary
// local cluster when there is no other.
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>

#include "base/settings/settings.h"
#include "cli/commands/client.h"
#include "cli/commands/context.h"
#include "cli/commands/follow.h"
#include "cli/commands/interrupt.h"
#include "cli/commands/local_cluster.h"
#include "cli/commands/plan.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"

namespace heddle::cli {
namespace {

struct SubmitState {
  std::string config;
  std::vector<std::string> overrides;
  std::vector<std::string> after;
  std::string request_id;
  std::string resume_from;
  bool wait = false;
  bool follow = false;
  bool hold = false;
  bool dry_run = false;
  bool alone = false;  // the cluster is this command's own and ends with it
};

StatusOr<std::vector<settings::ResolvedConfig>> Resolve(const SubmitState& state) {
  return ResolveJobs(state.config, state.overrides);
}

v1::SubmitRequest RequestOf(const SubmitState& state, const v1::RunConfig& config) {
  v1::SubmitRequest request;
  *request.mutable_config() = config;
  request.set_resume_from(state.resume_from);
  for (const std::string& after : state.after) {
    request.add_after(after);
  }
  return request;
}

// What would be submitted, as `plan` shows it.
StatusOr<int> DryRun(const SubmitState& state, const CommandContext& context) {
  ASSIGN_OR_RETURN(const std::vector<settings::ResolvedConfig> configs, Resolve(state));
  ASSIGN_OR_RETURN(const PlanFigures figures, FiguresOfHost(context));
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  int worst = 0;
  for (const settings::ResolvedConfig& config : configs) {
    Warn(config);
    ASSIGN_OR_RETURN(v1::PlanReply plan, client->Plan(RequestOf(state, config.config)));
    worst = std::max(worst, PrintPlan(std::move(plan), figures, context));
  }
  return worst;
}

StatusOr<std::vector<std::string>> SubmitAll(const SubmitState& state,
                                             const CommandContext& context) {
  ASSIGN_OR_RETURN(const std::vector<settings::ResolvedConfig> configs, Resolve(state));
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  const std::string request_id = state.request_id.empty() ? NewRequestId() : state.request_id;
  std::vector<std::string> ids;
  for (size_t i = 0; i < configs.size(); ++i) {
    Warn(configs[i]);
    v1::SubmitRequest request = RequestOf(state, configs[i].config);
    if (configs.size() > 1) {
      request.mutable_config()->set_name(Str(configs[i].config.name(), "-", i));
    }
    request.set_request_id(configs.size() == 1 ? request_id : Str(request_id, ".", i));
    request.set_hold(state.hold);
    ASSIGN_OR_RETURN(const v1::SubmitReply reply, client->Submit(request));
    ids.push_back(reply.id());
  }
  return ids;
}

void PrintId(const std::string& id, const CommandContext& context) {
  v1::SubmitReply reply;
  reply.set_id(id);
  if (context.json()) {
    PrintJson(reply);
  } else {
    PrintText(id + "\n");
  }
}

StatusOr<int> Submit(const SubmitState& state, const CommandContext& context) {
  if (state.dry_run) {
    return DryRun(state, context);
  }
  ASSIGN_OR_RETURN(const std::vector<std::string> ids, SubmitAll(state, context));
  int worst = 0;
  for (const std::string& id : ids) {
    PrintId(id, context);
    if (state.follow) {
      ASSIGN_OR_RETURN(const v1::Job job, FollowJob(context, id, state.alone));
      worst = std::max(worst, JobExitStatus(job));
    }
  }
  if (state.wait && !state.follow) {
    ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
    for (const std::string& id : ids) {
      ASSIGN_OR_RETURN(const v1::Job job,
                       WaitFor(*client, id, context.timeout_ms,
                               [](const v1::Job& now) { return now.state() == "DONE"; }));
      worst = std::max(worst, JobExitStatus(job));
    }
  }
  return worst;
}

Status Reach(const CommandContext& context) {
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  return client->ClusterStatus().status();
}

// The cluster is gone with the command, what it made is not.
std::string Kept(const std::string& folder) {
  return Str("checkpoints and logs are kept in ", folder, "; to use them: heddle up --state ",
             folder, "\n");
}

// In a temporary folder; ends with the job.
StatusOr<int> RunTemporary(SubmitState state, const CommandContext& context) {
  state.alone = true;
  char folder[] = "/tmp/heddle-run-XXXXXX";
  if (mkdtemp(folder) == nullptr) {
    return FromErrno("cannot make", folder);
  }
  const LocalClusterOptions options{
      .state = folder, .program_dir = context.program_dir, .workers = 1};
  // Nobody would find this cluster later: it ends with the command, however that ends.
  const OnInterrupt stop([&] { (void)StopLocalCluster(options); });
  const StatusOr<RunningCluster> cluster = StartLocalCluster(options);
  StatusOr<int> result = 0;
  if (!cluster.ok()) {
    result = cluster.status();
  } else {
    CommandContext temporary = context;
    temporary.coordinator = cluster->coordinator;
    result = Submit(state, temporary);
  }
  const Status stopped = StopLocalCluster(options);
  if (!result.ok() || *result != 0) {
    fprintf(stderr, "heddle: %s", Kept(folder).c_str());
    return result;
  }
  RETURN_IF_ERROR(stopped);
  if (!context.json()) {
    PrintText(Kept(folder));
  }
  return result;
}

// The cluster that the user named, or that of `heddle up` if it answers, else a temporary one.
StatusOr<int> Run(SubmitState state, const CommandContext& context) {
  state.follow = true;
  RETURN_IF_ERROR(Resolve(state).status());  // before a cluster is started for a bad config
  const Status reached = Reach(context);
  if (reached.ok()) {
    return Submit(state, context);
  }
  // Who named a cluster means it: a run elsewhere would only look like success.
  if (CoordinatorNamed(context)) {
    return reached;
  }
  if (ReadContext(context.home).status().code() != StatusCode::kNotFound) {
    fprintf(stderr,
            "heddle: the cluster of `heddle up` cannot be used (%s); starting a temporary one\n",
            Message(reached).c_str());
  }
  return RunTemporary(std::move(state), context);
}

void AddOptions(Verb* verb, SubmitState* state, bool submit) {
  verb->options = {{"config", "configuration file", &state->config, true},
                   {"overrides", "key=value, +key=value, ~key, group=option", &state->overrides}};
  if (!submit) {
    return;
  }
  const std::vector<Option> more = {
      {"--wait", "until it is done", &state->wait},
      {"--follow", "show steps until it is done", &state->follow},
      {"--hold", "do not start before `release`", &state->hold},
      {"--after", "[ok:|any:|failed:]JOB, may be repeated", &state->after},
      {"--dry-run", "check and plan, submit nothing", &state->dry_run},
      {"--request-id", "submits with one id make one job", &state->request_id},
      {"--resume-from", "start from checkpoint JOB@STEP", &state->resume_from}};
  verb->options.insert(verb->options.end(), more.begin(), more.end());
}

}  // namespace

std::vector<Verb> SubmitVerbs() {
  return {MakeVerb<SubmitState>({"submit"}, "queue a job; prints its id",
                                [](Verb* verb, SubmitState* state) {
                                  AddOptions(verb, state, true);
                                  verb->run = [state](const CommandContext& context) {
                                    return Submit(*state, context);
                                  };
                                }),
          MakeVerb<SubmitState>({"run"}, "submit and follow; a temporary cluster if there is none",
                                [](Verb* verb, SubmitState* state) {
                                  AddOptions(verb, state, false);
                                  verb->run = [state](const CommandContext& context) {
                                    return Run(*state, context);
                                  };
                                })};
}

}  // namespace heddle::cli
