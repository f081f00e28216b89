// Every rank holds everything; gradients are summed once, after the last micro-batch.
#include <algorithm>
#include <utility>

#include "model/parameter_store.h"
#include "worker/shard/mesh.h"

namespace heddle::shard {

namespace {

class Replicated : public Parameters {
 public:
  Replicated(std::unique_ptr<model::ParameterStore> store, const Options& options, Units units,
             int first_unit)
      : store_(std::move(store)),
        layout_(store_->plan(), options.rank, options.world),
        dense_(units == Units::kDense),
        first_unit_(first_unit) {}

  model::ModelMemory memory() override { return model::MemoryOf(*store_); }
  const model::ModelPlan& plan() const override { return store_->plan(); }
  std::span<float> buffers() override { return store_->buffers(); }

  Status ForEachHeld(Touch /*touch*/, const std::function<Status(const Held&)>& visit) override {
    Held all;
    all.range = {0, store_->plan().flat_elements};
    all.replica = layout_.rank();
    all.replicas = layout_.world();
    all.master = store_->master();
    all.gradient = store_->gradients();
    all.compute_bf16 = store_->compute_bf16();
    return visit(all);
  }
  int64_t owned_elements() const override { return store_->plan().flat_elements; }
  int64_t gathered_bytes() const override { return 0; }

  void Connect(comm::Communicator* group) override { group_ = group; }
  void BeginStep() override { store_->ZeroGradients(); }
  model::UnitHooks Hooks(Visit) override { return {}; }
  Status FinishGradients() override;
  Status ForEachMeasured(const std::function<void(const Measured&)>& visit) override {
    for (int u = 0; u < layout_.units(); ++u) {
      const FlatRange mine = layout_.Owned(u);
      visit({.begin = mine.begin,
             .elements = mine.size(),
             .gradient = store_->gradients().subspan(static_cast<size_t>(mine.begin),
                                                     static_cast<size_t>(mine.size()))});
    }
    return OkStatus();
  }
  Status RefreshComputeWeights() override {
    store_->RefreshComputeWeights();
    return OkStatus();
  }
  void Updated() override {}

 private:
  std::unique_ptr<model::ParameterStore> store_;
  const Layout layout_;
  const bool dense_;
  const int first_unit_;
  comm::Communicator* group_ = nullptr;
};

// Experts layer by layer: a report names the one that hangs. What is dense is one sum.
Status Replicated::FinishGradients() {
  if (dense_) return group_->AllReduceSum(store_->gradients(), comm::kNoUnit);
  const model::ModelPlan& plan = store_->plan();
  for (size_t u = 0; u < plan.units.size(); ++u) {
    const std::span<float> gradients = store_->gradients().subspan(
        static_cast<size_t>(plan.units[u].offset), static_cast<size_t>(plan.units[u].elements));
    RETURN_IF_ERROR(group_->AllReduceSum(gradients, first_unit_ + plan.expert_layers[u]));
  }
  return OkStatus();
}

}  // namespace

StatusOr<std::unique_ptr<Parameters>> MakeReplicated(model::ModelPlan plan, const Options& options,
                                                     Units units, int first_unit) {
  ASSIGN_OR_RETURN(std::unique_ptr<model::ParameterStore> store,
                   model::ParameterStore::Create(std::move(plan), options.precision));
  return std::make_unique<Replicated>(std::move(store), options, units, first_unit);
}

}  // namespace heddle::shard
