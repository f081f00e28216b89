// describe: one job with attempts, checkpoints and its last events. why: why it waits.
#include "cli/commands/client.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"
#include "cli/output/table.h"

namespace heddle::cli {
namespace {

struct JobArgument {
  std::string job;
};

constexpr int kEventsShown = 20;

std::string Attempts(const v1::Job& job) {
  std::vector<std::vector<std::string>> rows;
  for (const v1::Attempt& attempt : job.attempts()) {
    std::string workers;
    for (const std::string& worker : attempt.workers()) {
      workers += workers.empty() ? worker : "," + worker;
    }
    std::string cause = "-";
    if (attempt.has_cause()) {
      cause = Str(attempt.cause().code(), " ", Printable(attempt.cause().detail()));
      if (!attempt.cause().advice().empty()) {
        cause += Str(" (", attempt.cause().advice(), ")");
      }
    }
    rows.push_back({Str(attempt.number()), Str(attempt.fence()), attempt.state(),
                    attempt.outcome().empty() ? "-" : attempt.outcome(), Str(attempt.last_step()),
                    workers, cause});
  }
  return FormatTable({"ATTEMPT", "FENCE", "STATE", "OUTCOME", "STEP", "WORKERS", "CAUSE"}, rows);
}

// One line for each rank whose log is not whole.
std::string LogLosses(const v1::Job& job) {
  std::string text;
  for (const v1::Attempt& attempt : job.attempts()) {
    for (const v1::LogLoss& loss : attempt.log_losses()) {
      text += Str("log of rank ", loss.rank(), ", attempt ", attempt.number(), ": at least ",
                  loss.over_limit() + loss.lost(), " bytes are missing (", loss.over_limit(),
                  " beyond the limit of a job's logs, ", loss.lost(), " lost on the worker)\n");
    }
  }
  return text.empty() ? text : "\n" + text;
}

StatusOr<int> Describe(const JobArgument& argument, const CommandContext& context) {
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  ASSIGN_OR_RETURN(const v1::Job job, client->Get(argument.job));
  if (context.json()) {
    PrintJson(job);
    return 0;
  }
  PrintText(FormatTable({"JOB", job.id()},
                        {{"name", Printable(job.name())},
                         {"state", StateText(job)},
                         {"reason", job.reason().empty() ? "-" : Printable(job.reason())},
                         {"step", Str(job.step(), " of ", job.max_steps())},
                         {"loss", job.step() > 0 ? FormatFixed(job.loss(), 4) : "-"},
                         {"ranks", Str(job.ranks())},
                         {"restarts", Str(job.restarts())},
                         {"submitted", FormatTime(job.submitted_at())},
                         {"started", FormatTime(job.started_at())},
                         {"finished", FormatTime(job.finished_at())}}));
  PrintText("\n" + Attempts(job));
  PrintText(LogLosses(job));
  std::vector<std::vector<std::string>> rows;
  for (const v1::Checkpoint& checkpoint : job.checkpoints()) {
    rows.push_back({checkpoint.id(), checkpoint.state(), Str(checkpoint.bytes()),
                    FormatTime(checkpoint.created_at())});
  }
  PrintText("\n" + FormatTable({"CHECKPOINT", "STATE", "BYTES", "CREATED"}, rows) + "\n");
  for (int i = std::max(0, job.events_size() - kEventsShown); i < job.events_size(); ++i) {
    PrintText(EventLine(job.events(i)));
  }
  return 0;
}

StatusOr<int> Why(const JobArgument& argument, const CommandContext& context) {
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  ASSIGN_OR_RETURN(const v1::WhyReply why, client->Why(argument.job));
  if (context.json()) {
    PrintJson(why);
    return 0;
  }
  PrintText(Str(why.id(), " ", why.state(), why.reason().empty() ? "" : " " + why.reason(), ": ",
                Printable(why.text()), "\n"));
  for (const v1::WhyReply::Funnel& step : why.funnel()) {
    PrintText(Str("  ", step.nodes(), " nodes: ", step.constraint(), "\n"));
  }
  for (const std::string& job : why.blocking()) {
    PrintText(Str("  behind ", job, "\n"));
  }
  if (why.has_eta_ms()) {
    PrintText(Str("  expected to start ", FormatTime(why.eta_ms()), "\n"));
  }
  if (!why.advice().empty()) {
    PrintText(Str("  ", why.advice(), "\n"));
  }
  return 0;
}

}  // namespace

std::vector<Verb> DescribeVerbs() {
  const auto make = [](const char* name, const char* doc, auto function) {
    return MakeVerb<JobArgument>({name}, doc, [function](Verb* verb, JobArgument* argument) {
      verb->options = {{"job", "job id or an unambiguous prefix", &argument->job, true}};
      verb->run = [argument, function](const CommandContext& context) {
        return function(*argument, context);
      };
    });
  };
  return {make("describe", "one job: attempts, checkpoints, last events", Describe),
          make("why", "why a job waits and when it starts", Why)};
}

}  // namespace heddle::cli
