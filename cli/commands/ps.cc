// ps: the jobs. status: the cluster.
#include "base/clock/clock.h"
#include "cli/commands/client.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"
#include "cli/output/table.h"

namespace heddle::cli {
namespace {

struct PsState {
  bool all = false;
};

StatusOr<v1::ListReply> ListAll(Client& client, bool all) {
  v1::ListReply result;
  v1::ListRequest request;
  request.set_all(all);
  do {
    ASSIGN_OR_RETURN(v1::ListReply page, client.List(request));
    result.MergeFrom(page);
    request.set_page_token(page.next_page_token());
  } while (!request.page_token().empty());
  result.clear_next_page_token();
  return result;
}

std::vector<std::string> JobRow(const v1::Job& job, int64_t now_ms, bool wide) {
  const int64_t since = job.finished_at() > 0 ? job.finished_at() : job.submitted_at();
  std::vector<std::string> row = {
      job.id(),
      Printable(job.name()),
      StateText(job),
      job.kind() == "command" ? "-" : Str(job.step(), "/", job.max_steps()),
      job.step() > 0 ? FormatFixed(job.loss(), 4) : "-",
      job.step() > 0 ? FormatFixed(job.tokens_per_second(), 0) : "-",
      Str(job.restarts()),
      FormatAge(now_ms - since)};
  if (wide) {
    row.insert(row.end(), {Str(job.ranks()), Str(job.priority()), job.account(),
                           FormatTime(job.submitted_at()), Printable(job.reason())});
  }
  return row;
}

StatusOr<int> Ps(const PsState& state, const CommandContext& context) {
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  ASSIGN_OR_RETURN(const v1::ListReply reply, ListAll(*client, state.all));
  if (context.json()) {
    // What only `describe` fills in would look like jobs without attempts.
    PrintJson(reply, {"attempts", "checkpoints", "events", "lineage", "next_page_token"});
    return 0;
  }
  const bool wide = context.output == OutputFormat::kWide;
  std::vector<std::string> header = {"ID",   "NAME",  "STATE",    "STEP",
                                     "LOSS", "TOK/S", "RESTARTS", "AGE"};
  if (wide) {
    header.insert(header.end(), {"RANKS", "PRIORITY", "ACCOUNT", "SUBMITTED", "REASON"});
  }
  const int64_t now_ms = SystemClock().NowWallMs();
  std::vector<std::vector<std::string>> rows;
  for (const v1::Job& job : reply.jobs()) {
    rows.push_back(JobRow(job, now_ms, wide));
  }
  PrintText(FormatTable(header, rows));
  return 0;
}

StatusOr<int> ShowStatus(const CommandContext& context) {
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  ASSIGN_OR_RETURN(const v1::StatusReply reply, client->ClusterStatus());
  if (context.json()) {
    PrintJson(reply);
    return 0;
  }
  const v1::StatusReply::JobCounts& jobs = reply.jobs();
  const v1::StatusReply::NodeCounts& nodes = reply.nodes();
  PrintText(FormatTable(
      {"CLUSTER", reply.cluster_id()},
      {{"term", Str(reply.term())},
       {"role", reply.role()},
       {"version", reply.version()},
       {"up", FormatAge(reply.uptime_seconds() * 1000)},
       {"jobs", Str(jobs.active() + jobs.stopping(), " active, ", jobs.queued() + jobs.backoff(),
                    " queued, ", jobs.held() + jobs.waiting() + jobs.paused(), " held, ",
                    jobs.done(), " done")},
       {"nodes", Str(nodes.connected(), " connected, ", nodes.suspect(), " suspect, ", nodes.lost(),
                     " lost")},
       {"commits",
        Str(reply.store().commits(), ", p99 ", FormatFixed(reply.store().commit_p99_ms(), 1), " ms",
            reply.store().read_only() ? ", READ_ONLY: disk nearly full" : "")},
       {"checkpoints", reply.checkpoint_root()}}));
  return 0;
}

}  // namespace

std::vector<Verb> ListVerbs() {
  return {MakeVerb<PsState>({"ps"}, "jobs that are not done (-a: all)",
                            [](Verb* verb, PsState* state) {
                              verb->options = {{"-a,--all", "done jobs too", &state->all}};
                              verb->run = [state](const CommandContext& context) {
                                return Ps(*state, context);
                              };
                            }),
          MakeVerb<PsState>({"status"}, "the cluster",
                            [](Verb* verb, PsState*) { verb->run = ShowStatus; })};
}

}  // namespace heddle::cli
