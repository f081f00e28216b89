// What a configuration would need and where it would run: the answer to Jobs.Plan.
#pragma once

#include "heddle/v1/jobs.pb.h"

namespace heddle::rpc {

class Core;

// Fills `reply` for a configuration that Submit would accept but for its memory. On the state
// thread; changes nothing.
void PlanJob(const Core& core, const heddle::v1::RunConfig& config, heddle::v1::PlanReply* reply);

}  // namespace heddle::rpc
