// plan: what a configuration would need of memory, time, disk and nodes, before anything runs.
#include "cli/commands/plan.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <set>

#include "base/units/units.h"
#include "cli/commands/client.h"
#include "cli/commands/context.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"
#include "cli/output/table.h"
#include "model/training_plan.h"

namespace heddle::cli {
namespace {

struct PlanState {
  std::string config;
  std::vector<std::string> overrides;
  double matmul_tflops = 0;
  double link_gbs = 0;
};

void MakeAbsolute(std::string* path) {
  if (!path->empty()) {
    *path = std::filesystem::absolute(*path).lexically_normal().string();
  }
}

void MakePathsAbsolute(v1::RunConfig* config) {
  v1::DataConfig* data = config->mutable_data();
  if (data->has_path()) {
    MakeAbsolute(data->mutable_path());
  }
  if (data->has_eval_path()) {
    MakeAbsolute(data->mutable_eval_path());
  }
  for (auto& part : *data->mutable_mixture()) {
    MakeAbsolute(part.mutable_path());
  }
  if (config->checkpoint().has_init_from()) {
    MakeAbsolute(config->mutable_checkpoint()->mutable_init_from());
  }
}

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

void PrintMemory(const v1::PlanReply& plan) {
  const v1::PlanReply::Memory& memory = plan.memory();
  std::vector<std::vector<std::string>> rows;
  for (const v1::MemoryUse& use : memory.categories()) {
    rows.push_back({use.name(), Bytes(use.planned())});
  }
  rows.push_back({"a rank takes", Bytes(memory.bytes_per_rank())});
  rows.push_back({"reserved for it", Bytes(memory.reserved_per_rank())});
  PrintText(FormatTable({"MEMORY PER RANK", ""}, rows));
  if (memory.fits() || !memory.has_fits()) return;
  PrintText("it does not fit\n");
  for (const std::string& change : memory.changes()) {
    PrintText(Str("  fits with ", change, "\n"));
  }
  if (memory.changes().empty()) PrintText("  no setting of this version makes it fit\n");
}

void PrintThroughput(const v1::PlanReply::Throughput& throughput) {
  const bool known = throughput.has_tokens_per_second();
  PrintText(FormatTable(
      {"THROUGHPUT", ""},
      {{"tokens per second", known ? FormatFixed(throughput.tokens_per_second(), 0) : "not known"},
       {"seconds per step", known ? FormatFixed(throughput.step_seconds(), 3) : "not known"},
       {"bound by", known ? throughput.bound() : "not known"},
       {"FLOP per token", FormatFixed(throughput.flops_per_token(), 0)},
       {"accumulation", throughput.accumulation()}}));
}

void PrintStorage(const v1::PlanReply::Storage& storage) {
  std::vector<std::vector<std::string>> rows = {{"a checkpoint", Bytes(storage.checkpoint_bytes())},
                                                {"kept in the end", Bytes(storage.kept_bytes())}};
  if (storage.has_save_interval_steps()) {
    rows.push_back({"saved every", Str(storage.save_interval_steps(), " steps")});
  } else if (storage.has_save_interval_seconds()) {
    rows.push_back({"saved every", Str(FormatFixed(storage.save_interval_seconds(), 0), " s")});
  }
  PrintText(FormatTable({"STORAGE", ""}, rows));
}

void PrintPlacement(const v1::PlanReply::Placement& placement) {
  PrintText(Str("PLACEMENT  ", Printable(placement.text()), "\n"));
  for (const v1::WhyReply::Funnel& step : placement.funnel()) {
    PrintText(Str("  ", step.nodes(), " nodes: ", step.constraint(), "\n"));
  }
}

// Figures that only the user knows: the rest of the plan is the coordinator's, or ours without one.
void AddThroughput(const v1::RunConfig& config, const model::HostFigures& host,
                   v1::PlanReply* plan) {
  if (config.kind() != v1::RunConfig::KIND_TRAIN || host.matmul_flops <= 0) return;
  v1::PlanReply mine;
  model::FillPlan(config, host, &mine);
  *plan->mutable_throughput() = mine.throughput();
  *plan->mutable_storage() = mine.storage();
  auto& warnings = *plan->mutable_warnings();
  warnings.erase(std::remove_if(warnings.begin(), warnings.end(),
                                [](const std::string& warning) {
                                  return warning.rfind("tokens per second", 0) == 0;
                                }),
                 warnings.end());
  for (const std::string& warning : mine.warnings()) {
    if (warning.rfind("tokens per second", 0) == 0) plan->add_warnings(warning);
  }
}

// Where there is no coordinator to ask: all but the placement.
StatusOr<v1::PlanReply> PlanAlone(const v1::RunConfig& config, const Status& why) {
  v1::PlanReply plan;
  *plan.mutable_config() = config;
  if (config.kind() == v1::RunConfig::KIND_TRAIN) {
    RETURN_IF_ERROR(model::PlanModel(config.model()).status());
    model::FillPlan(config, {}, &plan);
    plan.mutable_config()->mutable_parallel()->set_memory_per_rank(
        static_cast<int64_t>(plan.memory().reserved_per_rank()));
  }
  if (plan.has_memory()) plan.mutable_memory()->clear_fits();
  plan.add_warnings(Str("without a coordinator nothing is known about nodes: ", Message(why)));
  return plan;
}

StatusOr<v1::PlanReply> Ask(const v1::RunConfig& config, const CommandContext& context) {
  v1::SubmitRequest request;
  *request.mutable_config() = config;
  StatusOr<std::unique_ptr<Client>> client = Client::Open(context);
  const StatusOr<v1::PlanReply> reply =
      client.ok() ? (*client)->Plan(request) : StatusOr<v1::PlanReply>(client.status());
  // Who named a cluster wants to hear that it is away.
  const bool away = reply.status().code() == StatusCode::kUnavailable;
  return away && !CoordinatorNamed(context) ? PlanAlone(config, reply.status()) : reply;
}

StatusOr<int> Plan(const PlanState& state, const CommandContext& context) {
  for (const double figure : {state.matmul_tflops, state.link_gbs}) {
    if (!std::isfinite(figure) || figure < 0) {
      return InvalidArgument(
          Str("--matmul-tflops, --link-gbs: must be numbers of at least 0, not ", figure));
    }
  }
  const model::HostFigures host{.matmul_flops = state.matmul_tflops * 1e12,
                                .link_bytes = state.link_gbs * 1e9};
  ASSIGN_OR_RETURN(const std::vector<settings::ResolvedConfig> configs,
                   ResolveJobs(state.config, state.overrides));
  int worst = 0;
  for (const settings::ResolvedConfig& config : configs) {
    Warn(config);
    ASSIGN_OR_RETURN(v1::PlanReply plan, Ask(config.config, context));
    AddThroughput(config.config, host, &plan);
    worst = std::max(worst, PrintPlan(plan, context));
  }
  return worst;
}

}  // namespace

StatusOr<std::vector<settings::ResolvedConfig>> ResolveJobs(
    const std::string& file, const std::vector<std::string>& overrides) {
  settings::LoadOptions options;
  options.search_path = settings::DefaultSearchPath();
  options.environment = EnvironmentMap();
  ASSIGN_OR_RETURN(std::vector<settings::ResolvedConfig> configs,
                   settings::LoadSweep(file, overrides, options));
  for (settings::ResolvedConfig& config : configs) {
    MakePathsAbsolute(&config.config);
    if (!config.config.has_name() || config.config.name().empty()) {
      config.config.set_name(std::filesystem::path(file).stem().string());
    }
  }
  return configs;
}

void Warn(const settings::ResolvedConfig& config) {
  for (const std::string& warning : config.warnings) {
    fprintf(stderr, "heddle: warning: %s\n", warning.c_str());
  }
}

int PrintPlan(const v1::PlanReply& plan, const CommandContext& context) {
  const bool refused = plan.memory().has_fits() && !plan.memory().fits();
  if (context.json()) {
    PrintJson(plan, Unknown(plan));
    return refused ? 1 : 0;
  }
  for (const std::string& warning : plan.warnings()) {
    fprintf(stderr, "heddle: warning: %s\n", warning.c_str());
  }
  PrintText(Str(Printable(plan.config().name()), ": ", plan.parameters(), " parameters, ",
                plan.config().parallel().ranks().max(), " ranks\n"));
  if (plan.has_memory()) PrintMemory(plan);
  if (plan.has_throughput()) PrintThroughput(plan.throughput());
  if (plan.has_storage()) PrintStorage(plan.storage());
  if (plan.has_placement()) PrintPlacement(plan.placement());
  return refused ? 1 : 0;
}

std::vector<Verb> PlanVerbs() {
  return {MakeVerb<PlanState>(
      {"plan"}, "what a run would need: memory, time, disk, nodes; changes nothing",
      [](Verb* verb, PlanState* state) {
        verb->options = {
            {"config", "configuration file", &state->config, true},
            {"overrides", "key=value, +key=value, ~key, group=option", &state->overrides},
            {"--matmul-tflops", "TFLOP/s that a rank sustains in training", &state->matmul_tflops},
            {"--link-gbs", "GB/s between ranks, one direction", &state->link_gbs}};
        verb->run = [state](const CommandContext& context) { return Plan(*state, context); };
      })};
}

}  // namespace heddle::cli
