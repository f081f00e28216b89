// Everything but the experts over all ranks, experts over the ranks that have the same ones.
#include <algorithm>
#include <map>
#include <utility>

#include "worker/comm/subset.h"
#include "worker/shard/expert_exchange.h"
#include "worker/shard/mesh.h"

namespace heddle::shard {

namespace {

// Tensors of the units [first, last) of `plan` out of those of a half of it, whose units start at
// `base` of the flat layout and may be wider.
void AddUnits(const model::ModelPlan& plan, size_t first, size_t last, int64_t base,
              const model::ModelPlan& half, const std::vector<at::Tensor>& from,
              std::vector<at::Tensor>* to) {
  size_t wide = 0;
  for (size_t u = first; u < last; ++u) {
    const model::UnitSpec& unit = plan.units[u];
    int64_t begin = unit.offset - base;
    if (from.size() > 1 || half.units.size() == 1) {
      while (half.units[wide].offset + half.units[wide].elements <= begin) ++wide;
      begin -= half.units[wide].offset;
    }
    to->push_back(from[from.size() > 1 ? wide : 0].narrow(0, begin, unit.elements));
  }
}

class JoinedMeshes : public Parameters {
 public:
  JoinedMeshes(model::ModelPlan plan, const Options& options, std::unique_ptr<Parameters> dense,
               std::unique_ptr<Parameters> experts)
      : plan_(std::move(plan)),
        options_(options),
        first_expert_(static_cast<size_t>(plan_.dense_units)),
        base_(plan_.units[first_expert_].offset),
        dense_(std::move(dense)),
        experts_(std::move(experts)),
        exchange_(options.expert_degree, plan_.dense_units) {
    for (size_t i = 0; i < plan_.expert_layers.size(); ++i) {
      expert_unit_.emplace(plan_.expert_layers[i] + 1, static_cast<int>(i));
    }
  }

  model::ModelMemory memory() override;
  const model::ModelPlan& plan() const override { return plan_; }
  std::span<float> buffers() override { return dense_->buffers(); }
  Status ForEachHeld(Touch touch, const std::function<Status(const Held&)>& visit) override;
  int64_t owned_elements() const override {
    return dense_->owned_elements() + experts_->owned_elements();
  }
  int64_t gathered_bytes() const override {
    return dense_->gathered_bytes() + experts_->gathered_bytes();
  }
  void Connect(comm::Communicator* group) override;
  void BeginStep() override {
    dense_->BeginStep();
    experts_->BeginStep();
  }
  model::UnitHooks Hooks(Visit visit) override;
  Status FinishGradients() override {
    RETURN_IF_ERROR(dense_->FinishGradients());
    return experts_->FinishGradients();
  }
  Status ForEachMeasured(const std::function<void(const Measured&)>& visit) override;
  Status RefreshComputeWeights() override {
    RETURN_IF_ERROR(dense_->RefreshComputeWeights());
    return experts_->RefreshComputeWeights();
  }
  int64_t offloaded_from() const override { return base_ + experts_->offloaded_from(); }
  Status WriteState(int64_t first, int part, std::span<const std::byte> bytes) override {
    return experts_->WriteState(first - base_, part, bytes);
  }
  Status DropOffloadedGradients() override { return experts_->DropOffloadedGradients(); }
  Status Healthy() override { return experts_->Healthy(); }
  std::optional<offload::ResidentSetStats> TakeOffloadStats() override {
    return experts_->TakeOffloadStats();
  }
  void Updated() override {
    dense_->Updated();
    experts_->Updated();
  }

 private:
  using Hook = std::function<Status(int)>;
  // First one, then the other, for the block of a layer with experts.
  Hook Both(Hook dense, Hook experts) const;

  const model::ModelPlan plan_;
  const Options options_;
  const size_t first_expert_;  // unit of the plan
  const int64_t base_;         // of the experts in the flat layout
  const std::unique_ptr<Parameters> dense_;
  const std::unique_ptr<Parameters> experts_;
  std::map<int, int> expert_unit_;  // of the unit of a block
  ExpertExchange exchange_;
  std::unique_ptr<comm::Communicator> own_group_;
};

model::ModelMemory JoinedMeshes::memory() {
  const model::ModelMemory dense = dense_->memory();
  const model::ModelMemory experts = experts_->memory();
  model::ModelMemory memory = dense;
  memory.plan = &plan_;
  memory.weights.clear();
  memory.gradients.clear();
  const size_t end = plan_.units.size();
  AddUnits(plan_, 0, first_expert_, 0, *dense.plan, dense.weights, &memory.weights);
  AddUnits(plan_, first_expert_, end, base_, *experts.plan, experts.weights, &memory.weights);
  AddUnits(plan_, 0, first_expert_, 0, *dense.plan, dense.gradients, &memory.gradients);
  AddUnits(plan_, first_expert_, end, base_, *experts.plan, experts.gradients, &memory.gradients);
  memory.experts = experts.experts;
  if (options_.expert_degree > 1) memory.experts.exchange = &exchange_;
  return memory;
}

Status JoinedMeshes::ForEachHeld(Touch touch, const std::function<Status(const Held&)>& visit) {
  RETURN_IF_ERROR(dense_->ForEachHeld(touch, visit));
  return experts_->ForEachHeld(touch, [&](const Held& held) {
    Held placed = held;
    placed.range.begin += base_;
    placed.range.end += base_;
    placed.owned_offset += dense_->owned_elements();
    return visit(placed);
  });
}

// Expert by expert, so that the norm does not depend on how layers are cut into slices.
Status JoinedMeshes::ForEachMeasured(const std::function<void(const Measured&)>& visit) {
  RETURN_IF_ERROR(dense_->ForEachMeasured(visit));
  size_t unit = first_expert_;
  return experts_->ForEachMeasured([&](const Measured& slice) {
    int64_t begin = slice.begin + base_;
    const int64_t end = begin + slice.elements;
    if (slice.stats.has_value())
      return visit({.begin = begin, .elements = slice.elements, .stats = slice.stats});
    std::span<const float> rest = slice.gradient;
    while (begin < end) {
      while (plan_.units[unit].offset + plan_.units[unit].elements <= begin) ++unit;
      const int64_t next = std::min(end, plan_.units[unit].offset + plan_.units[unit].elements);
      const auto count = static_cast<size_t>(next - begin);
      visit({.begin = begin, .elements = next - begin, .gradient = rest.first(count)});
      rest = rest.subspan(count);
      begin = next;
    }
  });
}

void JoinedMeshes::Connect(comm::Communicator* group) {
  dense_->Connect(group);
  const int degree = options_.expert_degree;
  if (degree == 1) {
    experts_->Connect(group);
    return;
  }
  std::vector<int> members;
  for (int r = options_.rank % degree; r < options_.world; r += degree) members.push_back(r);
  own_group_ = members.size() == 1 ? comm::MakeSolo() : comm::MakeSubset(group, members);
  experts_->Connect(own_group_.get());
  std::vector<int> sharing;
  const int first = options_.rank / degree * degree;
  for (int r = first; r < first + degree; ++r) sharing.push_back(r);
  exchange_.Connect(comm::MakeSubset(group, sharing));
}

JoinedMeshes::Hook JoinedMeshes::Both(Hook dense, Hook experts) const {
  if (!experts) return dense;
  return [this, dense = std::move(dense), experts = std::move(experts)](int unit) {
    if (dense) RETURN_IF_ERROR(dense(unit));
    const auto found = expert_unit_.find(unit);
    return found == expert_unit_.end() ? OkStatus() : experts(found->second);
  };
}

model::UnitHooks JoinedMeshes::Hooks(Visit visit) {
  const model::UnitHooks dense = dense_->Hooks(visit);
  const model::UnitHooks experts = experts_->Hooks(visit);
  return {.before_forward = Both(dense.before_forward, experts.before_forward),
          .after_forward = Both(dense.after_forward, experts.after_forward),
          .before_backward = Both(dense.before_backward, experts.before_backward),
          .after_backward = Both(dense.after_backward, experts.after_backward)};
}

}  // namespace

std::unique_ptr<Parameters> JoinMeshes(model::ModelPlan plan, const Options& options,
                                       std::unique_ptr<Parameters> dense,
                                       std::unique_ptr<Parameters> experts) {
  return std::make_unique<JoinedMeshes>(std::move(plan), options, std::move(dense),
                                        std::move(experts));
}

}  // namespace heddle::shard
