// Every rank keeps a slice of every unit. A unit's weights are gathered before the model visits it,
// the next unit's while it computes; its gradients are scattered after its backward, at most
// kReducesInFlight at a time (training-runtime.md 5.5, 5.6). Collectives start in the order of the
// visits, which is the same on all ranks: no two ranks can wait for each other.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <deque>
#include <new>
#include <utility>

#include "kernels/pointwise/params.h"
#include "worker/shard/mesh.h"
#include "worker/shard/unit_tensors.h"

namespace heddle::shard {

namespace {

constexpr size_t kReducesInFlight = 2;
constexpr int64_t kParallelElements = 64 * 1024;

class Sharded : public Parameters {
 public:
  Sharded(model::ModelPlan plan, const Options& options, Units units, int first_unit);
  // Memory of what is held whole from the start.
  Status Hold();

  model::ModelMemory memory() override;
  const model::ModelPlan& plan() const override { return plan_; }
  std::span<float> buffers() override { return buffers_; }
  Status ForEachHeld(Touch /*touch*/, const std::function<Status(const Held&)>& visit) override;
  int64_t owned_elements() const override { return layout_.owned_elements(); }
  int64_t gathered_bytes() const override;
  void Connect(comm::Communicator* group) override { group_ = group; }
  void BeginStep() override;
  model::UnitHooks Hooks(Visit visit) override;
  Status FinishGradients() override;
  Status ForEachMeasured(const std::function<void(const Measured&)>& visit) override;
  Status RefreshComputeWeights() override;
  void Updated() override;

 private:
  enum class Weights { kAbsent, kGathering, kPresent };
  struct Unit {
    Weights weights = Weights::kAbsent;
    std::unique_ptr<comm::Pending> gather;
    bool reduced = false;  // its slice has a sum of this step already
  };
  struct Reduce {
    int unit = 0;
    std::unique_ptr<comm::Pending> pending;
    std::vector<float> sum;  // empty: straight into gradient_
  };

  int last() const { return layout_.units() - 1; }
  // -1: none of the units is one.
  int head() const { return dense_ ? last() : -1; }
  int ReportedUnit(int unit) const {
    return dense_ ? unit : first_unit_ + plan_.expert_layers[static_cast<size_t>(unit)];
  }
  bool wide() const { return options_.precision != model::Precision::kBf16; }
  bool TransientWeights() const { return options_.mode == Mode::kFull; }
  // Whole gradients stay from one micro-batch to the next.
  bool WholeGradients() const { return options_.accumulation == Accumulation::kSyncLast; }
  std::span<float> OwnedGradient(int unit);
  std::span<const std::byte> OwnedWeights(int unit) const;

  Status StartGather(int unit);
  // The unit's weights are there; `next` is on its way. -1: none.
  Status Need(int unit, int next);
  void Drop(int unit);
  // The unit's gradients are there, zero unless this pass added to them already.
  Status NeedGradient(int unit);
  Status StartReduce(int unit);
  Status FinishOldestReduce();

  Status BeforeForward(Visit visit, int unit);
  Status AfterForward(Visit visit, int unit);
  Status BeforeBackward(int unit);
  Status AfterBackward(Visit visit, int unit);

  const model::ModelPlan plan_;
  const Options options_;
  const Layout layout_;
  const bool dense_;
  const int first_unit_;
  const bool tied_;  // the head reads the embedding
  comm::Communicator* group_ = nullptr;

  std::vector<float> buffers_;
  std::vector<float> master_;      // [owned]
  std::vector<uint16_t> compute_;  // [owned], bf16 only
  std::vector<float> gradient_;    // [owned] sums over ranks
  UnitTensors weights_;
  UnitTensors gradients_;
  std::vector<Unit> units_;
  std::deque<Reduce> reduces_;
  std::vector<std::vector<float>> spare_sums_;
};

Sharded::Sharded(model::ModelPlan plan, const Options& options, Units units, int first_unit)
    : plan_(std::move(plan)),
      options_(options),
      layout_(plan_, options.rank, options.world),
      dense_(units == Units::kDense),
      first_unit_(first_unit),
      tied_(dense_ && plan_.Find("lm_head.weight") == nullptr),
      weights_(layout_, model::ComputeType(options.precision)),
      gradients_(layout_, at::kFloat),
      units_(plan_.units.size()) {
  const size_t owned = static_cast<size_t>(layout_.owned_elements());
  buffers_.assign(static_cast<size_t>(plan_.buffer_elements), 0.0f);
  master_.assign(owned, 0.0f);
  if (!wide()) compute_.assign(owned, 0);
  gradient_.assign(owned, 0.0f);
}

Status Sharded::Hold() {
  for (int u = 0; u < layout_.units(); ++u) {
    if (!TransientWeights()) RETURN_IF_ERROR(weights_.Acquire(u));
    if (WholeGradients()) RETURN_IF_ERROR(gradients_.Acquire(u));
  }
  return OkStatus();
}

model::ModelMemory Sharded::memory() {
  model::ModelMemory memory;
  memory.plan = &plan_;
  memory.precision = options_.precision;
  memory.weights = weights_.tensors();
  memory.gradients = gradients_.tensors();
  memory.buffers = buffers_;
  return memory;
}

Status Sharded::ForEachHeld(Touch /*touch*/, const std::function<Status(const Held&)>& visit) {
  for (int u = 0; u < layout_.units(); ++u) {
    Held held;
    held.range = layout_.Owned(u);
    if (held.range.size() == 0) continue;
    held.owned_offset = layout_.unit(u).owned_offset;
    const size_t offset = static_cast<size_t>(held.owned_offset);
    const size_t size = static_cast<size_t>(held.range.size());
    held.master = std::span<float>(master_).subspan(offset, size);
    held.gradient = std::span<float>(gradient_).subspan(offset, size);
    if (!wide()) held.compute_bf16 = std::span<uint16_t>(compute_).subspan(offset, size);
    RETURN_IF_ERROR(visit(held));
  }
  return OkStatus();
}

int64_t Sharded::gathered_bytes() const {
  size_t bytes = TransientWeights() ? weights_.peak_bytes() : 0;
  if (!WholeGradients()) bytes += gradients_.peak_bytes();
  return static_cast<int64_t>(bytes);
}

Status Sharded::ForEachMeasured(const std::function<void(const Measured&)>& visit) {
  for (int u = 0; u < layout_.units(); ++u) {
    const FlatRange mine = layout_.Owned(u);
    visit({.begin = mine.begin,
           .elements = mine.size(),
           .gradient = OwnedGradient(u).first(static_cast<size_t>(mine.size()))});
  }
  return OkStatus();
}

void Sharded::BeginStep() {
  for (Unit& unit : units_) unit.reduced = false;
  std::fill(gradient_.begin(), gradient_.end(), 0.0f);
  if (!WholeGradients()) return;
  for (int u = 0; u < layout_.units(); ++u) {
    std::memset(gradients_.data(u), 0, gradients_.bytes(u));
  }
}

std::span<float> Sharded::OwnedGradient(int unit) {
  const UnitSlices& slices = layout_.unit(unit);
  return std::span<float>(gradient_).subspan(static_cast<size_t>(slices.owned_offset),
                                             static_cast<size_t>(slices.slice));
}

std::span<const std::byte> Sharded::OwnedWeights(int unit) const {
  const UnitSlices& slices = layout_.unit(unit);
  const size_t offset = static_cast<size_t>(slices.owned_offset);
  const size_t size = static_cast<size_t>(slices.slice);
  return wide() ? std::as_bytes(std::span<const float>(master_).subspan(offset, size))
                : std::as_bytes(std::span<const uint16_t>(compute_).subspan(offset, size));
}

Status Sharded::StartGather(int index) {
  Unit& unit = units_[static_cast<size_t>(index)];
  if (unit.weights != Weights::kAbsent) return OkStatus();
  if (!weights_.Has(index)) RETURN_IF_ERROR(weights_.Acquire(index));
  ASSIGN_OR_RETURN(
      unit.gather,
      group_->StartAllGather(OwnedWeights(index), {weights_.data(index), weights_.bytes(index)},
                             ReportedUnit(index)));
  unit.weights = Weights::kGathering;
  return OkStatus();
}

Status Sharded::Need(int index, int next) {
  RETURN_IF_ERROR(StartGather(index));
  Unit& unit = units_[static_cast<size_t>(index)];
  if (unit.weights == Weights::kGathering) {
    RETURN_IF_ERROR(unit.gather->Wait());
    unit.gather.reset();
    unit.weights = Weights::kPresent;
  }
  return next < 0 ? OkStatus() : StartGather(next);
}

void Sharded::Drop(int index) {
  Unit& unit = units_[static_cast<size_t>(index)];
  if (!TransientWeights() || unit.weights != Weights::kPresent) return;
  weights_.Release(index);
  unit.weights = Weights::kAbsent;
}

Status Sharded::NeedGradient(int unit) {
  if (WholeGradients()) return OkStatus();
  const auto is_of_unit = [unit](const Reduce& reduce) { return reduce.unit == unit; };
  while (std::any_of(reduces_.begin(), reduces_.end(), is_of_unit)) {
    RETURN_IF_ERROR(FinishOldestReduce());  // of the pass before
  }
  if (gradients_.Has(unit)) return OkStatus();
  RETURN_IF_ERROR(gradients_.Acquire(unit));
  std::memset(gradients_.data(unit), 0, gradients_.bytes(unit));
  return OkStatus();
}

Status Sharded::StartReduce(int index) {
  while (reduces_.size() >= kReducesInFlight) RETURN_IF_ERROR(FinishOldestReduce());
  Unit& unit = units_[static_cast<size_t>(index)];
  Reduce reduce;
  reduce.unit = index;
  std::span<float> sum = OwnedGradient(index);
  if (unit.reduced) {
    if (!spare_sums_.empty()) {
      reduce.sum = std::move(spare_sums_.back());
      spare_sums_.pop_back();
    }
    reduce.sum.resize(sum.size());
    sum = reduce.sum;
  }
  unit.reduced = true;
  const std::span<const float> all(reinterpret_cast<const float*>(gradients_.data(index)),
                                   gradients_.bytes(index) / sizeof(float));
  ASSIGN_OR_RETURN(reduce.pending,
                   group_->StartReduceScatterSum(all, sum, options_.wire, ReportedUnit(index)));
  reduces_.push_back(std::move(reduce));
  return OkStatus();
}

Status Sharded::FinishOldestReduce() {
  Reduce reduce = std::move(reduces_.front());
  reduces_.pop_front();
  RETURN_IF_ERROR(reduce.pending->Wait());
  if (!reduce.sum.empty()) {
    const std::span<float> to = OwnedGradient(reduce.unit);
    for (size_t i = 0; i < to.size(); ++i) to[i] += reduce.sum[i];
    spare_sums_.push_back(std::move(reduce.sum));
  }
  if (!WholeGradients()) gradients_.Release(reduce.unit);
  return OkStatus();
}

Status Sharded::FinishGradients() {
  while (!reduces_.empty()) RETURN_IF_ERROR(FinishOldestReduce());
  return OkStatus();
}

Status Sharded::BeforeForward(Visit visit, int unit) {
  if (visit.train && unit == head()) {
    // The head's backward runs within its forward.
    RETURN_IF_ERROR(NeedGradient(unit));
    if (tied_) RETURN_IF_ERROR(NeedGradient(0));
  }
  // After the head comes the last block's backward, and that block is still there.
  return Need(unit, unit < last() ? unit + 1 : -1);
}

Status Sharded::AfterForward(Visit visit, int unit) {
  // Its backward comes next.
  const bool stays = visit.train && unit == (dense_ ? head() - 1 : last());
  if (unit == head()) {
    Drop(unit);
    if (tied_) Drop(0);
  } else if (!stays && !(unit == 0 && tied_)) {
    Drop(unit);
  }
  return OkStatus();
}

Status Sharded::BeforeBackward(int unit) {
  RETURN_IF_ERROR(NeedGradient(unit));
  // Neither the embedding's backward nor the head's, which is done, reads weights.
  const int first = dense_ ? 1 : 0;
  return unit < first || unit == head() ? OkStatus() : Need(unit, unit > first ? unit - 1 : -1);
}

Status Sharded::AfterBackward(Visit visit, int unit) {
  if (unit != 0 || !dense_) Drop(unit);
  return WholeGradients() && !visit.last ? OkStatus() : StartReduce(unit);
}

model::UnitHooks Sharded::Hooks(Visit visit) {
  model::UnitHooks hooks;
  hooks.before_forward = [this, visit](int unit) { return BeforeForward(visit, unit); };
  hooks.after_forward = [this, visit](int unit) { return AfterForward(visit, unit); };
  hooks.before_backward = [this](int unit) { return BeforeBackward(unit); };
  hooks.after_backward = [this, visit](int unit) { return AfterBackward(visit, unit); };
  return hooks;
}

Status Sharded::RefreshComputeWeights() {
  if (!wide()) {
    const kernels::pointwise::Table& kernels =
        kernels::pointwise::Kernels(kernels::pointwise::Element::kBFloat16);
    at::parallel_for(0, static_cast<int64_t>(master_.size()), kParallelElements,
                     [&](int64_t begin, int64_t end) {
                       kernels.convert({master_.data(), compute_.data()}, {begin, end});
                     });
  }
  Updated();
  return OkStatus();
}

void Sharded::Updated() {
  for (Unit& unit : units_) {
    HEDDLE_CHECK(unit.weights != Weights::kGathering);
    if (!TransientWeights()) unit.weights = Weights::kAbsent;
  }
}

}  // namespace

StatusOr<std::unique_ptr<Parameters>> MakeSharded(model::ModelPlan plan, const Options& options,
                                                  Units units, int first_unit) {
  const int64_t elements = plan.flat_elements;
  try {
    auto sharded = std::make_unique<Sharded>(std::move(plan), options, units, first_unit);
    RETURN_IF_ERROR(sharded->Hold());
    return sharded;
  } catch (const std::bad_alloc&) {
    return ResourceExhausted(Str("no memory for this rank's part of ", elements, " parameters"));
  }
}

}  // namespace heddle::shard
