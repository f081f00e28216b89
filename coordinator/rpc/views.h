// Records as users see them: the messages of jobs.proto made from the state. Pure.
#pragma once

#include <string>

#include "base/status/status.h"
#include "coordinator/rpc/core.h"
#include "heddle/v1/jobs.pb.h"
#include "heddle/v1/records.pb.h"

namespace heddle::rpc {

v1::Event EventView(const v1::EventRecord& record);
v1::Attempt AttemptView(const state::State& state, const v1::AttemptRecord& record);
v1::Checkpoint CheckpointView(const v1::CheckpointRecord& record);
v1::Node NodeView(const Core& core, const state::NodeEntry& entry);

// The fields of `ps`.
v1::Job JobView(Core& core, const v1::JobRecord& record);
// The same with attempts, checkpoints and lineage; events are added by the caller.
v1::Job JobDetailView(Core& core, const v1::JobRecord& record);

// Id or unambiguous prefix. NOT_FOUND; INVALID_ARGUMENT lists what an ambiguous prefix matches.
StatusOr<JobId> FindJob(const state::State& state, const std::string& text);
// JOB@STEP or JOB@latest -> the record (the higher fence of two with one step). NOT_FOUND.
StatusOr<const v1::CheckpointRecord*> FindCheckpoint(const state::State& state,
                                                     const std::string& text);

}  // namespace heddle::rpc
