// A plan on the screen and as JSON, with what the figures of this host say of time and disk. Those
// are not the coordinator's: hosts that ask may differ from hosts that run.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <iterator>
#include <nlohmann/json.hpp>
#include <set>

#include "base/settings/json.h"
#include "base/units/units.h"
#include "cli/commands/plan.h"
#include "cli/commands/print.h"
#include "cli/commands/verb.h"
#include "cli/output/table.h"
#include "model/training_plan.h"

namespace heddle::cli {
namespace {

using Json = nlohmann::ordered_json;

// Fields whose 0 would pass for a figure.
std::set<std::string> Unknown(const v1::PlanReply& plan) {
  std::set<std::string> names;
  const auto leave_out = [&names](bool known, std::initializer_list<const char*> fields) {
    if (!known) names.insert(fields.begin(), fields.end());
  };
  leave_out(plan.throughput().has_tokens_per_second(),
            {"tokens_per_second", "step_seconds", "communication_seconds", "bound"});
  leave_out(plan.throughput().has_matmul_flops(), {"matmul_flops"});
  leave_out(plan.storage().has_save_interval_steps(), {"save_interval_steps"});
  leave_out(plan.storage().has_save_interval_seconds(), {"save_interval_seconds"});
  leave_out(plan.has_placement(), {"placement"});
  leave_out(plan.memory().has_fits(), {"fits"});
  return names;
}

std::string Bytes(uint64_t bytes) { return ApproximateBytes(static_cast<int64_t>(bytes)); }

void PrintMemory(const v1::PlanReply& plan, const std::vector<model::Tier>& tiers) {
  const v1::PlanReply::Memory& memory = plan.memory();
  std::vector<std::vector<std::string>> rows;
  for (const v1::MemoryUse& use : memory.categories()) {
    rows.push_back({use.name(), Bytes(use.planned())});
  }
  rows.push_back({"a rank takes", Bytes(memory.bytes_per_rank())});
  rows.push_back({"reserved for it", Bytes(memory.reserved_per_rank())});
  PrintText(FormatTable({"MEMORY PER RANK", ""}, rows));
  if (tiers.size() > 1) {
    rows.clear();
    for (const model::Tier& tier : tiers) rows.push_back({tier.name, ApproximateBytes(tier.bytes)});
    PrintText(FormatTable({"TIER PER RANK", ""}, rows));
  }
  if (memory.fits() || !memory.has_fits()) return;
  PrintText("it does not fit\n");
  for (const std::string& change : memory.changes()) {
    PrintText(Str("  fits with ", change, "\n"));
  }
  if (memory.changes().empty()) PrintText("  no setting of this version makes it fit\n");
}

std::string Seconds(double seconds) { return FormatFixed(seconds, 3); }

void PrintThroughput(const v1::PlanReply::Throughput& throughput, const model::StepEstimate& step) {
  const bool known = throughput.has_tokens_per_second();
  std::vector<std::vector<std::string>> rows = {
      {"tokens per second", known ? FormatFixed(throughput.tokens_per_second(), 0) : "not known"},
      {"seconds per step", known ? Seconds(throughput.step_seconds()) : "not known"},
      {"bound by", known ? throughput.bound() : "not known"}};
  const auto add = [&rows](const char* name, double value, int digits) {
    if (value > 0) rows.push_back({name, FormatFixed(value, digits)});
  };
  if (known) {
    add("  computing", step.compute_seconds, 3);
    add("  communicating", step.communication_seconds, 3);
    add("  optimizer", step.optimizer_seconds, 3);
    add("  disk", step.disk_seconds, 3);
    add("  not hidden", step.exposed_seconds, 3);
    add("tokens of a micro-batch", step.micro_batch_tokens, 0);
    add("  that hide the collectives", step.tokens_that_hide_collectives, 0);
    add("tokens per expert", step.tokens_per_expert, 0);
    add("  that hide the disk", step.tokens_that_hide_disk, 0);
  }
  rows.push_back({"FLOP per token", FormatFixed(throughput.flops_per_token(), 0)});
  rows.push_back({"accumulation", throughput.accumulation()});
  PrintText(FormatTable({"THROUGHPUT", ""}, rows));
}

void PrintStorage(const v1::PlanReply::Storage& storage, const model::StorageEstimate& estimate) {
  std::vector<std::vector<std::string>> rows = {{"a checkpoint", Bytes(storage.checkpoint_bytes())},
                                                {"kept in the end", Bytes(storage.kept_bytes())}};
  if (storage.has_save_interval_steps()) {
    rows.push_back({"saved every", Str(storage.save_interval_steps(), " steps")});
  } else if (storage.has_save_interval_seconds()) {
    rows.push_back({"saved every", Str(FormatFixed(storage.save_interval_seconds(), 0), " s")});
  }
  if (estimate.spill_bytes > 0) {
    rows.push_back({"spilled experts", ApproximateBytes(estimate.spill_bytes)});
  }
  const double terabytes = estimate.spill_tb_per_day + estimate.checkpoint_tb_per_day;
  if (terabytes > 0) rows.push_back({"written a day", Str(FormatFixed(terabytes, 2), " TB")});
  PrintText(FormatTable({"STORAGE", ""}, rows));
}

void PrintPlacement(const v1::PlanReply::Placement& placement) {
  PrintText(Str("PLACEMENT  ", Printable(placement.text()), "\n"));
  for (const v1::WhyReply::Funnel& step : placement.funnel()) {
    PrintText(Str("  ", step.nodes(), " nodes: ", step.constraint(), "\n"));
  }
}

// What no message of the contract has: parts of the time, tiers, the disk's wear.
struct Details {
  bool known = false;  // a training run
  std::vector<model::Tier> tiers;
  model::StepEstimate step;
  model::StorageEstimate storage;
};

// Warnings that figures of this host make or make void.
bool OfFigures(const std::string& warning) {
  for (const char* start : {"tokens per second", "spilled experts write", "checkpoints write"}) {
    if (warning.rfind(start, 0) == 0) return true;
  }
  return false;
}

Details Complete(const PlanFigures& figures, v1::PlanReply* plan) {
  Details details;
  const v1::RunConfig& config = plan->config();
  if (config.kind() != v1::RunConfig::KIND_TRAIN || !model::PlanModel(config.model()).ok()) {
    return details;
  }
  details.known = true;
  const model::HostFigures& host = figures.host.rates;
  details.tiers = model::TiersOf(config);
  details.step = model::EstimateStep(config, host);
  details.storage = model::EstimateStorage(config, details.step, figures.mean_time_to_failure);
  v1::PlanReply mine;
  model::FillPlan(config, host, &mine, figures.mean_time_to_failure);
  *plan->mutable_throughput() = mine.throughput();
  *plan->mutable_storage() = mine.storage();
  auto& warnings = *plan->mutable_warnings();
  warnings.erase(std::remove_if(warnings.begin(), warnings.end(), OfFigures), warnings.end());
  for (const std::string& warning : mine.warnings()) {
    if (OfFigures(warning)) plan->add_warnings(warning);
  }
  return details;
}

// Known numbers only: a 0 would pass for one.
void AddNumbers(std::initializer_list<std::pair<const char*, double>> numbers, Json* to) {
  for (const auto& [name, value] : numbers) {
    if (value > 0) (*to)[name] = value;
  }
}

void AddDetails(const Details& details, const PlanFigures& figures, Json* json) {
  for (const model::Tier& tier : details.tiers) {
    (*json)["memory"]["tiers"].push_back({{"name", tier.name}, {"bytes", tier.bytes}});
  }
  const model::StepEstimate& step = details.step;
  Json& throughput = (*json)["throughput"];
  AddNumbers({{"communication_bytes", step.communication_bytes},
              {"disk_read_bytes", step.disk_read_bytes},
              {"disk_written_bytes", step.disk_written_bytes},
              {"micro_batch_tokens", step.micro_batch_tokens},
              {"tokens_per_expert", step.tokens_per_expert},
              {"tokens_that_hide_collectives", step.tokens_that_hide_collectives},
              {"tokens_that_hide_disk", step.tokens_that_hide_disk}},
             &throughput);
  if (step.missing.empty()) {
    throughput["compute_seconds"] = step.compute_seconds;
    throughput["optimizer_seconds"] = step.optimizer_seconds;
    throughput["disk_seconds"] = step.disk_seconds;
    throughput["exposed_seconds"] = step.exposed_seconds;
  }
  Json& storage = (*json)["storage"];
  storage["spill_bytes"] = details.storage.spill_bytes;
  storage["mean_time_to_failure_seconds"] = figures.mean_time_to_failure;
  if (step.step_seconds > 0) {
    storage["spill_tb_per_day"] = details.storage.spill_tb_per_day;
    storage["checkpoint_tb_per_day"] = details.storage.checkpoint_tb_per_day;
  }
  const KeptFigures& host = figures.host;
  if (host.host.empty()) return;
  (*json)["host"] = {{"host", host.host},
                     {"cpu", host.cpu},
                     {"threads", host.rates.threads},
                     {"measured_at", host.measured_at}};
}

void WarnOfOtherHost(const PlanFigures& figures) {
  char name[256] = {};
  if (figures.host.host.empty() || gethostname(name, sizeof(name) - 1) != 0) return;
  if (figures.host.host == name) return;
  fprintf(stderr, "heddle: warning: the figures of heddle bench-host are those of %s\n",
          Printable(figures.host.host).c_str());
}

}  // namespace

StatusOr<PlanFigures> FiguresOfHost(const CommandContext& context) {
  PlanFigures figures;
  const StatusOr<KeptFigures> kept = ReadHostFigures(context.home);
  if (kept.status().code() == StatusCode::kNotFound) return figures;
  RETURN_IF_ERROR(kept);
  figures.host = *kept;
  WarnOfOtherHost(figures);
  return figures;
}

int PrintPlan(v1::PlanReply plan, const PlanFigures& figures, const CommandContext& context) {
  const Details details = Complete(figures, &plan);
  const bool refused = plan.memory().has_fits() && !plan.memory().fits();
  if (context.json()) {
    Json json = Json::parse(settings::ToJson(plan, {.print_unset = true, .omit = Unknown(plan)}));
    if (details.known) AddDetails(details, figures, &json);
    PrintText(json.dump() + "\n");
    return refused ? 1 : 0;
  }
  for (const std::string& warning : plan.warnings()) {
    fprintf(stderr, "heddle: warning: %s\n", warning.c_str());
  }
  PrintText(Str(Printable(plan.config().name()), ": ", plan.parameters(), " parameters, ",
                plan.config().parallel().ranks().max(), " ranks\n"));
  if (plan.has_memory()) PrintMemory(plan, details.tiers);
  if (plan.has_throughput()) PrintThroughput(plan.throughput(), details.step);
  if (plan.has_storage()) PrintStorage(plan.storage(), details.storage);
  if (plan.has_placement()) PrintPlacement(plan.placement());
  return refused ? 1 : 0;
}

}  // namespace heddle::cli
