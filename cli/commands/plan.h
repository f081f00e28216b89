// Configurations as jobs have them, and a plan on the screen: shared by `plan` and `submit`.
#pragma once

#include <string>
#include <vector>

#include "base/settings/settings.h"
#include "base/status/status.h"
#include "heddle/v1/jobs.pb.h"

namespace heddle::cli {

struct CommandContext;

// One job for each point of a sweep: paths absolute, since workers run in other folders, and named
// after the file where nothing else names them. Errors of settings::LoadSweep.
StatusOr<std::vector<settings::ResolvedConfig>> ResolveJobs(
    const std::string& file, const std::vector<std::string>& overrides);
// To standard error.
void Warn(const settings::ResolvedConfig& config);

// Returns the exit status: 1 where the run does not fit.
int PrintPlan(const v1::PlanReply& plan, const CommandContext& context);

}  // namespace heddle::cli
