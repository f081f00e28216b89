// Configurations as jobs have them, and a plan on the screen: shared by `plan` and `submit`.
#pragma once

#include <string>
#include <vector>

#include "base/settings/settings.h"
#include "base/status/status.h"
#include "cli/commands/host_figures.h"
#include "heddle/v1/jobs.pb.h"
#include "model/training_plan.h"

namespace heddle::cli {

struct CommandContext;

// One job for each point of a sweep: paths absolute, since workers run in other folders, and named
// after the file where nothing else names them. Errors of settings::LoadSweep.
StatusOr<std::vector<settings::ResolvedConfig>> ResolveJobs(
    const std::string& file, const std::vector<std::string>& overrides);
// To standard error.
void Warn(const settings::ResolvedConfig& config);

// What a plan reckons with.
struct PlanFigures {
  KeptFigures host;  // with what the user said of it
  double mean_time_to_failure = model::kMeanTimeToFailureSeconds;
};
// What `heddle bench-host` kept; nothing where it never ran. DATA_LOSS of ReadHostFigures.
StatusOr<PlanFigures> FiguresOfHost(const CommandContext& context);

// Completes the reply with what these figures say of time and disk, and shows it. Returns the exit
// status: 1 where the run does not fit.
int PrintPlan(v1::PlanReply plan, const PlanFigures& figures, const CommandContext& context);

}  // namespace heddle::cli
