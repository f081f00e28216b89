// plan: what a configuration would need of memory, time, disk and nodes, before anything runs.
#include "cli/commands/plan.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <utility>

#include "base/units/units.h"
#include "cli/commands/client.h"
#include "cli/commands/context.h"
#include "cli/commands/verbs.h"
#include "model/training_plan.h"

namespace heddle::cli {
namespace {

struct PlanState {
  std::string config;
  std::vector<std::string> overrides;
  double matmul_tflops = 0;
  double link_gbs = 0;
  std::string mttf;
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
  // A reservation that is too small is so anywhere; whether a node has it is not known.
  if (plan.memory().fits()) plan.mutable_memory()->clear_fits();
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

// What was measured, and over it what the user says.
StatusOr<PlanFigures> FiguresOf(const PlanState& state, const CommandContext& context) {
  for (const double figure : {state.matmul_tflops, state.link_gbs}) {
    if (!std::isfinite(figure) || figure < 0) {
      return InvalidArgument(
          Str("--matmul-tflops, --link-gbs: must be numbers of at least 0, not ", figure));
    }
  }
  ASSIGN_OR_RETURN(PlanFigures figures, FiguresOfHost(context));
  figures.host.rates.matmul_flops = state.matmul_tflops * 1e12;
  figures.host.rates.link_bytes = state.link_gbs * 1e9;
  if (!state.mttf.empty()) {
    const StatusOr<std::chrono::nanoseconds> mttf = ParseDuration(state.mttf);
    if (!mttf.ok() || mttf->count() <= 0) {
      return InvalidArgument(Str("--mttf ", state.mttf, ": must be a duration like 8h or 2d"));
    }
    figures.mean_time_to_failure = std::chrono::duration<double>(*mttf).count();
  }
  return figures;
}

StatusOr<int> Plan(const PlanState& state, const CommandContext& context) {
  ASSIGN_OR_RETURN(const PlanFigures figures, FiguresOf(state, context));
  ASSIGN_OR_RETURN(const std::vector<settings::ResolvedConfig> configs,
                   ResolveJobs(state.config, state.overrides));
  int worst = 0;
  for (const settings::ResolvedConfig& config : configs) {
    Warn(config);
    ASSIGN_OR_RETURN(v1::PlanReply plan, Ask(config.config, context));
    worst = std::max(worst, PrintPlan(std::move(plan), figures, context));
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

std::vector<Verb> PlanVerbs() {
  return {MakeVerb<PlanState>(
      {"plan"}, "what a run would need: memory, time, disk, nodes; changes nothing",
      [](Verb* verb, PlanState* state) {
        verb->options = {
            {"config", "configuration file", &state->config, true},
            {"overrides", "key=value, +key=value, ~key, group=option", &state->overrides},
            {"--matmul-tflops", "TFLOP/s that a rank sustains in training", &state->matmul_tflops},
            {"--link-gbs", "GB/s between ranks, one direction", &state->link_gbs},
            {"--mttf", "mean time between failures, for the checkpoint interval; default 7h54m",
             &state->mttf}};
        verb->run = [state](const CommandContext& context) { return Plan(*state, context); };
      })};
}

}  // namespace heddle::cli
