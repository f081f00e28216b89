// What is wrong with a job and what to do about it (training-runtime.md 21): the stored findings of
// its attempts, the causes of their ends, why it waits, and where the ranks stand now. Reads only.
#pragma once

#include "coordinator/rpc/core.h"
#include "heddle/v1/jobs.pb.h"
#include "heddle/v1/records.pb.h"

namespace heddle::rpc {

// Findings the gravest first; `summary` says so plainly when nothing is wrong. State thread.
v1::DoctorReply DoctorView(Core& core, const v1::JobRecord& job);

}  // namespace heddle::rpc
