#include "coordinator/rpc/plan.h"

#include <algorithm>

#include "base/units/units.h"
#include "coordinator/rpc/core.h"
#include "coordinator/schedule/schedule.h"
#include "model/training_plan.h"

namespace heddle::rpc {
namespace {

void SetPlacement(const schedule::Plan& plan, v1::PlanReply::Placement* placement) {
  if (const auto* placed = std::get_if<schedule::Placement>(&plan)) {
    placement->set_starts_now(true);
    std::string where;
    for (const state::event::PlacedTask& task : placed->tasks) {
      placement->add_nodes(task.worker);
      where += Str(where.empty() ? "" : ", ", task.ranks, " on ", task.worker);
    }
    placement->set_text(Str("starts at once; ranks: ", where));
    return;
  }
  const auto& reason = std::get<schedule::WaitReason>(plan);
  placement->set_starts_now(false);
  placement->set_text(Str(reason.code, ": ", reason.text));
  for (const auto& [constraint, nodes] : reason.funnel) {
    v1::WhyReply::Funnel* step = placement->add_funnel();
    step->set_constraint(constraint);
    step->set_nodes(nodes);
  }
}

// A node holds what is reserved; of a reservation that is ours a part is not the rank's own.
void LimitToNodes(const schedule::Snapshot& snapshot, const v1::RunConfig& config,
                  v1::PlanReply* reply) {
  uint64_t largest = 0;
  for (const schedule::NodeView& node : snapshot.nodes) largest = std::max(largest, node.memory);
  if (largest == 0) {
    reply->add_warnings("no node is connected: nothing is known about memory and placement");
    return;
  }
  const uint64_t reserved = reply->memory().reserved_per_rank();
  if (reserved <= largest) return;
  const uint64_t beside = reserved - std::min(reserved, reply->memory().bytes_per_rank());
  model::LimitMemory(config, static_cast<int64_t>(largest - std::min(largest, beside)), reply);
  reply->add_warnings(Str("no node has the ", ApproximateBytes(static_cast<int64_t>(reserved)),
                          " reserved for a rank; the largest has ",
                          ApproximateBytes(static_cast<int64_t>(largest))));
}

}  // namespace

void PlanJob(const Core& core, const v1::RunConfig& config, v1::PlanReply* reply) {
  v1::RunConfig& planned = *reply->mutable_config();
  planned = config;
  if (config.kind() == v1::RunConfig::KIND_TRAIN) {
    model::FillPlan(config, {}, reply);
    planned.mutable_parallel()->set_memory_per_rank(
        static_cast<int64_t>(reply->memory().reserved_per_rank()));
    LimitToNodes(schedule::MakeSnapshot(core.state(), core.Now()), config, reply);
  }
  SetPlacement(schedule::PlanConfig(core.state(), planned, core.Now()), reply->mutable_placement());
}

}  // namespace heddle::rpc
