// doctor: what is wrong with a job, with evidence and the next step; where its ranks stand.
#include "cli/commands/client.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"
#include "cli/output/table.h"

namespace heddle::cli {
namespace {

struct DoctorState {
  std::string job;
};

std::string FindingText(const v1::Finding& finding) {
  std::string where;
  if (finding.has_attempt()) where += Str("attempt ", finding.attempt());
  if (finding.has_rank()) where += Str(where.empty() ? "" : ", ", "rank ", finding.rank());
  if (!finding.node().empty()) where += Str(where.empty() ? "" : ", ", Printable(finding.node()));
  if (finding.step() > 0) where += Str(where.empty() ? "" : ", ", "step ", finding.step());
  std::string text = Str(finding.kind(), where.empty() ? "" : Str(" (", where, ")"), " ",
                         FormatTime(finding.at()), "\n  ", Printable(finding.text()), "\n");
  for (const std::string& evidence : finding.evidence()) {
    // Stacks have lines of their own.
    std::string lines = Printable(evidence, /*lines=*/true);
    for (size_t at = lines.find('\n'); at != std::string::npos; at = lines.find('\n', at + 1)) {
      lines.insert(at + 1, "      ");
    }
    text += Str("    ", lines, "\n");
  }
  if (!finding.advice().empty()) text += Str("  next: ", Printable(finding.advice()), "\n");
  return text;
}

std::string RankTable(const v1::DoctorReply& reply) {
  std::vector<std::vector<std::string>> rows;
  for (const v1::RankStatus& rank : reply.ranks()) {
    rows.push_back({Str(rank.rank()), rank.node(), Str(rank.step()), rank.phase(),
                    FormatAge(rank.phase_age_ms()), Printable(rank.operation()),
                    rank.waiting() ? "yes" : "no", rank.process_state()});
  }
  return FormatTable({"RANK", "NODE", "STEP", "PHASE", "FOR", "OPERATION", "WAITS", "PROCESS"},
                     rows);
}

StatusOr<int> Diagnose(const std::string& job, const CommandContext& context) {
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  ASSIGN_OR_RETURN(const v1::DoctorReply reply, client->Doctor(job));
  if (context.json()) {
    PrintJson(reply);
    return 0;
  }
  PrintText(Str(reply.id(), " ", reply.state(), ": ", Printable(reply.summary()), "\n"));
  for (const v1::Finding& finding : reply.findings()) PrintText("\n" + FindingText(finding));
  if (reply.ranks_size() > 0) PrintText("\n" + RankTable(reply));
  return 0;
}

}  // namespace

std::vector<Verb> DoctorVerbs() {
  return {MakeVerb<DoctorState>(
      {"doctor"}, "what is wrong with a job: hang, straggler, memory, numbers; and its ranks",
      [](Verb* verb, DoctorState* state) {
        verb->options = {{"job", "job id or an unambiguous prefix", &state->job, true}};
        verb->run = [state](const CommandContext& context) {
          return Diagnose(state->job, context);
        };
      })};
}

}  // namespace heddle::cli
