// doctor: what is wrong with a job, with evidence and the next step; where its ranks stand.
#include <algorithm>
#include <cstdio>

#include "cli/commands/client.h"
#include "cli/commands/host_figures.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"
#include "cli/output/table.h"

namespace heddle::cli {
namespace {

struct DoctorState {
  std::string job;
};

// A disk this much slower than measured is said to be.
constexpr double kSlowDisk = 2;
// Steps of a finding of slow offloading (coordinator/rpc/slow_offload.h).
constexpr uint64_t kSteps = 20;

// Bytes and busy seconds of those steps; reads and writes may overlap, so the time is the least
// that the disk took.
struct DiskUse {
  double read = 0;
  double written = 0;
  double seconds = 0;
};

StatusOr<DiskUse> DiskUseOf(Client* client, const std::string& job, const v1::Finding& finding) {
  v1::MetricsRequest request;
  request.set_job(job);
  request.set_from_step(finding.step() - std::min(finding.step(), kSteps - 1));
  DiskUse disk;
  RETURN_IF_ERROR(client->Metrics(request, [&](const v1::MetricPoint& point) {
    const v1::OffloadUse& use = point.offload();
    if (point.attempt() != finding.attempt() || point.step() > finding.step()) return true;
    disk.read += static_cast<double>(use.bytes_read());
    disk.written += static_cast<double>(use.bytes_written());
    disk.seconds += std::max(use.read_seconds(), use.write_seconds());
    return true;
  }));
  return disk;
}

// Only this host knows what `heddle bench-host` measured here: nothing is said of other nodes.
Status CompareWithBench(Client* client, const CommandContext& context, const std::string& job,
                        v1::Finding* finding) {
  const StatusOr<KeptFigures> kept = ReadHostFigures(context.home);
  if (kept.status().code() == StatusCode::kNotFound) return OkStatus();
  RETURN_IF_ERROR(kept.status());
  const double read = kept->rates.disk_read_bytes;
  const double write = kept->rates.disk_write_bytes;
  if (read <= 0 || write <= 0) return OkStatus();
  ASSIGN_OR_RETURN(const v1::Node node, client->GetNode(finding->node()));
  if (node.host() != kept->host) return OkStatus();
  ASSIGN_OR_RETURN(const DiskUse disk, DiskUseOf(client, job, *finding));
  const double measured = disk.read / read + disk.written / write;
  if (measured <= 0 || disk.seconds < kSlowDisk * measured) return OkStatus();
  char text[160];
  std::snprintf(text, sizeof(text),
                "the disk took %.1f times as long as it would at the %.2f GB/s read and %.2f GB/s "
                "written that heddle bench-host measured in ",
                disk.seconds / measured, read / 1e9, write / 1e9);
  finding->add_evidence(
      Str(text, kept->disk_dir, ": it is slower than measured, or others use it"));
  return OkStatus();
}

void CompareWithBench(Client* client, const CommandContext& context, v1::DoctorReply* reply) {
  for (v1::Finding& finding : *reply->mutable_findings()) {
    if (finding.kind() != "SLOW_OFFLOAD") continue;
    // The diagnosis stands without the comparison.
    const Status compared = CompareWithBench(client, context, reply->id(), &finding);
    if (compared.ok()) continue;
    fprintf(stderr, "heddle: warning: the disk is not compared with what was measured: %s\n",
            Printable(std::string(compared.message())).c_str());
  }
}

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
  ASSIGN_OR_RETURN(v1::DoctorReply reply, client->Doctor(job));
  CompareWithBench(client.get(), context, &reply);
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
      {"doctor"},
      "what is wrong with a job: hang, straggler, memory, numbers, slow data or offloading; and "
      "its ranks",
      [](Verb* verb, DoctorState* state) {
        verb->options = {{"job", "job id or an unambiguous prefix", &state->job, true}};
        verb->run = [state](const CommandContext& context) {
          return Diagnose(state->job, context);
        };
      })};
}

}  // namespace heddle::cli
