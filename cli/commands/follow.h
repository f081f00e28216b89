// Waiting for a job: the loop behind wait, submit --wait, submit --follow and run.
#pragma once

#include <functional>
#include <string>

#include "base/status/status.h"
#include "heddle/v1/jobs.pb.h"

namespace heddle::cli {

class Client;
struct CommandContext;

// Returns the first state of the job for which `reached` holds. Goes on through restarts of the
// coordinator. DEADLINE_EXCEEDED after `timeout_ms` (0 = none), NOT_FOUND without such a job.
StatusOr<v1::Job> WaitFor(Client& client, const std::string& job, int64_t timeout_ms,
                          const std::function<bool(const v1::Job&)>& reached);

// Prints steps and events of the job until it is done; returns its last state. While it is queued,
// stderr tells why. `alone`: no other machine can join this cluster, so a job that can never fit is
// RESOURCE_EXHAUSTED instead of waited for.
StatusOr<v1::Job> FollowJob(const CommandContext& context, const std::string& job,
                            bool alone = false);

}  // namespace heddle::cli
