// The experts of one rank in a resident set (training-runtime.md section 12): every expert is a
// slot with its compute weights, its gradient and its masters and moments. The model asks for
// weights and gradients expert by expert while it visits a layer; norm, update and checkpoints go
// through all of them in order. Values are those of experts that are always in memory, bit for bit:
// only where bytes lie differs.
#include <ATen/Parallel.h>

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/log/log.h"
#include "base/numa/numa.h"
#include "kernels/pointwise/params.h"
#include "worker/offload/spill_file.h"
#include "worker/shard/mesh.h"
#include "worker/shard/unit_tensors.h"

namespace heddle::shard {

namespace {

using offload::Access;
using offload::ExpectedUse;
using offload::Kind;

std::vector<int64_t> ElementsOf(const model::ModelPlan& plan) {
  std::vector<int64_t> elements;
  for (const model::UnitSpec& unit : plan.units) elements.push_back(unit.elements);
  return elements;
}

class OffloadedExperts : public Parameters, public layers::ExpertMemory {
 public:
  OffloadedExperts(model::ModelPlan plan, const Options& options,
                   std::unique_ptr<offload::ResidentSet> set, int64_t window_bytes)
      : plan_(std::move(plan)),
        options_(options),
        set_(std::move(set)),
        window_bytes_(window_bytes),
        weights_(Unplaced(ElementsOf(plan_), model::ComputeType(options.precision))),
        gradients_(Unplaced(ElementsOf(plan_), at::kFloat)),
        has_gradient_(plan_.units.size(), false),
        measured_(plan_.units.size()) {}

  // ---- Parameters ----
  model::ModelMemory memory() override {
    model::ModelMemory memory;
    memory.plan = &plan_;
    memory.precision = options_.precision;
    memory.weights = weights_;
    memory.gradients = gradients_;
    memory.experts.memory = this;
    return memory;
  }
  const model::ModelPlan& plan() const override { return plan_; }
  std::span<float> buffers() override { return {}; }
  Status ForEachHeld(Touch touch, const std::function<Status(const Held&)>& visit) override;
  int64_t owned_elements() const override { return 0; }
  int64_t gathered_bytes() const override { return 0; }
  void Connect(comm::Communicator* /*group*/) override {}
  void BeginStep() override;
  model::UnitHooks Hooks(Visit visit) override;
  Status FinishGradients() override { return failed_; }
  Status ForEachMeasured(const std::function<void(const Measured&)>& visit) override;
  Status RefreshComputeWeights() override;
  int64_t offloaded_from() const override { return 0; }
  Status WriteState(int64_t first, int part, std::span<const std::byte> bytes) override;
  Status DropOffloadedGradients() override;
  void Updated() override {}
  Status Healthy() override {
    RETURN_IF_ERROR(failed_);
    return set_->Expect({});  // as every call of a set that failed
  }
  std::optional<offload::ResidentSetStats> TakeOffloadStats() override { return set_->TakeStats(); }

  // ---- layers::ExpertMemory ----
  StatusOr<std::vector<int>> Begin(int layer, std::span<const int> experts, Use use) override;
  StatusOr<size_t> Next() override;
  Status End() override;

 private:
  // A layer's turn in a pass.
  struct Turn {
    int layer = 0;  // index into expert_layers
    Use use = Use::kForward;
  };

  bool narrow() const { return options_.precision == model::Precision::kBf16; }
  uint32_t SlotOf(int layer, int expert) const {
    return static_cast<uint32_t>(layer * plan_.experts.count + expert);
  }
  int64_t Elements(uint32_t slot) const { return plan_.units[slot].elements; }
  void AddUses(uint32_t slot, Use use, std::vector<ExpectedUse>* uses) const;
  // Everything that comes after this turn, as far as it can matter.
  void AddLaterTurns(Turn now, std::vector<ExpectedUse>* uses);
  Status PinFor(uint32_t slot, Use use);
  // PinFor would not wait.
  bool IsHere(uint32_t slot);
  void AddUses(Touch touch, std::span<const uint32_t> slots, std::vector<ExpectedUse>* uses) const;
  // What a touch is about.
  std::vector<uint32_t> SlotsOf(Touch touch) const;
  void AddUpdate(std::vector<ExpectedUse>* uses) const;
  void AddPass(std::vector<ExpectedUse>* uses) const;
  Status DropGradient(uint32_t slot);
  // Blocks that a touch needs of every slot.
  std::vector<ExpectedUse> UsesOf(Touch touch, uint32_t slot) const;
  StatusOr<Held> PinHeld(Touch touch, uint32_t slot);
  std::span<float> Floats(std::byte* data, uint32_t slot) const {
    return {reinterpret_cast<float*>(data), static_cast<size_t>(Elements(slot))};
  }
  // Of the state block of a slot: masters (bf16 training only), then the moments.
  int64_t PartOffset(uint32_t slot, int part) const {
    const int64_t masters = narrow() ? 4 * Elements(slot) : 0;
    return part == 0 ? 0 : masters + (part - 1) * options_.moment_bytes * Elements(slot);
  }

  const model::ModelPlan plan_;  // of the experts alone, one unit each
  const Options options_;
  const std::unique_ptr<offload::ResidentSet> set_;
  const int64_t window_bytes_;  // that one Next() pins at most, but for one expert
  const std::vector<at::Tensor> weights_;
  const std::vector<at::Tensor> gradients_;
  std::vector<bool> has_gradient_;  // of this step, by slot
  // Of gradients that were complete when they left; by slot.
  std::vector<std::optional<optim::GradientStats>> measured_;
  Status failed_;  // of a call that could not say so

  Visit visit_;
  std::vector<Turn> turns_;  // of the pass under way
  size_t turn_ = 0;
  Use use_ = Use::kForward;
  std::vector<uint32_t> order_;  // slots of the layer under way
  size_t done_ = 0;
  size_t there_ = 0;
};

// Gradients become zero: nothing is read or written for it.
void OffloadedExperts::BeginStep() {
  const Status dropped = DropOffloadedGradients();
  if (failed_.ok()) failed_ = dropped;
}

Status OffloadedExperts::DropOffloadedGradients() {
  for (uint32_t slot = 0; slot < has_gradient_.size(); ++slot) {
    RETURN_IF_ERROR(DropGradient(slot));
  }
  return OkStatus();
}

// What is visited is known: forward layer by layer, backward the same way back.
model::UnitHooks OffloadedExperts::Hooks(Visit visit) {
  visit_ = visit;
  turns_.clear();
  turn_ = 0;
  const int layers = static_cast<int>(plan_.expert_layers.size());
  for (int l = 0; l < layers; ++l) turns_.push_back({l, Use::kForward});
  for (int l = layers; visit.train && l > 0; --l) turns_.push_back({l - 1, Use::kBackward});
  return {};
}

void OffloadedExperts::AddUses(uint32_t slot, Use use, std::vector<ExpectedUse>* uses) const {
  uses->push_back({{slot, Kind::kWeights}, Access::kRead});
  if (use == Use::kBackward) uses->push_back({{slot, Kind::kGradient}, Access::kUpdate});
}

void OffloadedExperts::AddLaterTurns(Turn now, std::vector<ExpectedUse>* uses) {
  // A layer may be visited more than once a turn: several micro-batches, recomputation.
  for (size_t t = turn_; t < turns_.size(); ++t) {
    if (turns_[t].layer == now.layer && turns_[t].use == now.use) turn_ = t;
  }
  for (size_t t = turn_ + 1; t < turns_.size(); ++t) {
    for (int expert = 0; expert < plan_.experts.count; ++expert) {
      AddUses(SlotOf(turns_[t].layer, expert), turns_[t].use, uses);
    }
  }
  if (!visit_.train) return;
  if (visit_.last) AddUpdate(uses);
  AddPass(uses);
}

StatusOr<std::vector<int>> OffloadedExperts::Begin(int layer, std::span<const int> experts,
                                                   Use use) {
  RETURN_IF_ERROR(failed_);
  const auto found = std::find(plan_.expert_layers.begin(), plan_.expert_layers.end(), layer);
  HEDDLE_CHECK(found != plan_.expert_layers.end());
  const int index = static_cast<int>(found - plan_.expert_layers.begin());
  use_ = use;
  order_.clear();
  done_ = there_ = 0;
  std::vector<int> order(experts.begin(), experts.end());
  std::stable_partition(order.begin(), order.end(), [&](int expert) {
    return set_->IsHere(SlotOf(index, expert), Kind::kWeights, Access::kRead);
  });
  std::vector<ExpectedUse> uses;
  for (const int expert : order) {
    order_.push_back(SlotOf(index, expert));
    AddUses(order_.back(), use, &uses);
  }
  AddLaterTurns({index, use}, &uses);
  RETURN_IF_ERROR(set_->Expect(uses));
  return order;
}

Status OffloadedExperts::PinFor(uint32_t slot, Use use) {
  ASSIGN_OR_RETURN(std::byte* const weights, set_->Pin(slot, Kind::kWeights, Access::kRead));
  MoveTo(weights_[slot], weights);
  if (use == Use::kForward) return OkStatus();
  ASSIGN_OR_RETURN(std::byte* const gradient, set_->Pin(slot, Kind::kGradient, Access::kUpdate));
  MoveTo(gradients_[slot], gradient);
  has_gradient_[slot] = true;
  measured_[slot].reset();
  return OkStatus();
}

bool OffloadedExperts::IsHere(uint32_t slot) {
  return set_->IsHere(slot, Kind::kWeights, Access::kRead) &&
         (use_ == Use::kForward || set_->IsHere(slot, Kind::kGradient, Access::kUpdate));
}

StatusOr<size_t> OffloadedExperts::Next() {
  const int64_t element = narrow() ? 2 : 4;
  const int64_t per_element = use_ == Use::kForward ? element : element + 4;
  int64_t bytes = 0;
  while (done_ + there_ < order_.size()) {
    const uint32_t slot = order_[done_ + there_];
    bytes += per_element * Elements(slot);
    // The first is waited for; more of them only if they are there already.
    if (there_ > 0 && (bytes > window_bytes_ || !IsHere(slot))) break;
    RETURN_IF_ERROR(PinFor(slot, use_));
    ++there_;
  }
  return there_;
}

Status OffloadedExperts::End() {
  Status status;
  const auto note = [&](const Status& next) {
    if (status.ok()) status = next;
  };
  for (; there_ > 0; --there_, ++done_) {
    const uint32_t slot = order_[done_];
    MoveTo(weights_[slot], nullptr);
    note(set_->Unpin(slot, Kind::kWeights));
    if (use_ == Use::kForward) continue;
    // No later pass adds to it. Where this one does, the expert is here again before the norm is.
    if (visit_.last) {
      const at::Tensor& gradient = gradients_[slot];
      measured_[slot] = optim::MeasureGradients(
          {gradient.const_data_ptr<float>(), static_cast<size_t>(gradient.numel())});
    }
    MoveTo(gradients_[slot], nullptr);
    note(set_->Unpin(slot, Kind::kGradient));
  }
  return status;
}

std::vector<ExpectedUse> OffloadedExperts::UsesOf(Touch touch, uint32_t slot) const {
  const ExpectedUse read_gradient = {{slot, Kind::kGradient}, Access::kRead};
  // In fp32 the weights are the masters.
  const auto state = [&](Access access, std::vector<ExpectedUse>* uses) {
    uses->push_back({{slot, Kind::kState}, access});
    if (!narrow()) uses->push_back({{slot, Kind::kWeights}, access});
  };
  std::vector<ExpectedUse> uses;
  switch (touch) {
    case Touch::kResident:
      break;
    case Touch::kReadState:
      state(Access::kRead, &uses);
      break;
    case Touch::kWriteState:
      state(Access::kOverwrite, &uses);
      break;
    case Touch::kReadGradients:
      uses.push_back(read_gradient);
      break;
    case Touch::kWriteGradients:
      uses.push_back({{slot, Kind::kGradient}, Access::kUpdate});
      break;
    case Touch::kUpdate:
      uses.push_back(read_gradient);
      state(Access::kUpdate, &uses);
      if (narrow()) uses.push_back({{slot, Kind::kWeights}, Access::kOverwrite});
      break;
  }
  return uses;
}

StatusOr<Held> OffloadedExperts::PinHeld(Touch touch, uint32_t slot) {
  Held held;
  const model::UnitSpec& unit = plan_.units[slot];
  held.range = {unit.offset, unit.offset + unit.elements};
  held.offloaded = true;
  for (const ExpectedUse& use : UsesOf(touch, slot)) {
    ASSIGN_OR_RETURN(std::byte* const data, set_->Pin(slot, use.block.kind, use.access));
    switch (use.block.kind) {
      case Kind::kGradient:
        held.gradient = Floats(data, slot);
        break;
      case Kind::kWeights:
        if (narrow()) {
          held.compute_bf16 = {reinterpret_cast<uint16_t*>(data),
                               static_cast<size_t>(Elements(slot))};
        } else {
          held.master = Floats(data, slot);
          if (touch == Touch::kWriteState) std::fill(held.master.begin(), held.master.end(), 0.0f);
        }
        break;
      case Kind::kState:
        if (touch == Touch::kWriteState) {
          const int64_t bytes = PartOffset(slot, options_.moments + 1);
          std::memset(data, 0, static_cast<size_t>(bytes));
        }
        if (narrow()) held.master = Floats(data, slot);
        for (int m = 0; m < options_.moments; ++m) {
          held.moments[m] = data + PartOffset(slot, m + 1);
        }
        break;
    }
  }
  return held;
}

void OffloadedExperts::AddUses(Touch touch, std::span<const uint32_t> slots,
                               std::vector<ExpectedUse>* uses) const {
  for (const uint32_t slot : slots) {
    const std::vector<ExpectedUse> of_slot = UsesOf(touch, slot);
    uses->insert(uses->end(), of_slot.begin(), of_slot.end());
  }
}

std::vector<uint32_t> OffloadedExperts::SlotsOf(Touch touch) const {
  // A gradient that is not there is zero and stays so.
  const bool with_gradient = touch == Touch::kWriteGradients || touch == Touch::kReadGradients ||
                             (touch == Touch::kUpdate && options_.offload.skip_untouched);
  std::vector<uint32_t> slots;
  for (uint32_t slot = 0; slot < plan_.units.size(); ++slot) {
    if (!with_gradient || has_gradient_[slot]) slots.push_back(slot);
  }
  return slots;
}

void OffloadedExperts::AddUpdate(std::vector<ExpectedUse>* uses) const {
  AddUses(Touch::kUpdate, SlotsOf(Touch::kUpdate), uses);
}

void OffloadedExperts::AddPass(std::vector<ExpectedUse>* uses) const {
  const auto slots = static_cast<uint32_t>(plan_.units.size());
  for (uint32_t slot = 0; slot < slots; ++slot) AddUses(slot, Use::kForward, uses);
  for (size_t layer = plan_.expert_layers.size(); layer-- > 0;) {
    const uint32_t first = SlotOf(static_cast<int>(layer), 0);
    const auto count = static_cast<uint32_t>(plan_.experts.count);
    for (uint32_t slot = first; slot < first + count; ++slot) {
      AddUses(slot, Use::kBackward, uses);
    }
  }
}

Status OffloadedExperts::DropGradient(uint32_t slot) {
  if (!has_gradient_[slot]) return OkStatus();
  has_gradient_[slot] = false;
  measured_[slot].reset();
  return set_->Discard(slot, Kind::kGradient);
}

Status OffloadedExperts::ForEachHeld(Touch touch, const std::function<Status(const Held&)>& visit) {
  RETURN_IF_ERROR(failed_);
  if (touch == Touch::kResident) return OkStatus();
  const std::vector<uint32_t> slots = SlotsOf(touch);
  std::vector<ExpectedUse> uses;
  AddUses(touch, slots, &uses);
  if (touch == Touch::kUpdate) {
    // Comes next; and the states of the update after it, of which the first are kept then. Without
    // the gradients between them their memory would be taken by states that must leave again.
    AddPass(&uses);
    AddUses(Touch::kReadState, slots, &uses);
  }
  RETURN_IF_ERROR(set_->Expect(uses));
  for (const uint32_t slot : slots) {
    if (touch == Touch::kWriteGradients) measured_[slot].reset();
    ASSIGN_OR_RETURN(const Held held, PinHeld(touch, slot));
    const Status visited = visit(held);
    for (const ExpectedUse& use : UsesOf(touch, slot)) {
      RETURN_IF_ERROR(set_->Unpin(slot, use.block.kind));
    }
    RETURN_IF_ERROR(visited);
    // Used: it need not go home.
    if (touch == Touch::kUpdate) RETURN_IF_ERROR(DropGradient(slot));
  }
  return OkStatus();
}

// Experts without a gradient add nothing to a norm.
Status OffloadedExperts::ForEachMeasured(const std::function<void(const Measured&)>& visit) {
  RETURN_IF_ERROR(failed_);
  const auto is_read = [this](uint32_t slot) { return has_gradient_[slot] && !measured_[slot]; };
  std::vector<ExpectedUse> uses;
  for (uint32_t slot = 0; slot < plan_.units.size(); ++slot) {
    if (is_read(slot)) uses.push_back({{slot, Kind::kGradient}, Access::kRead});
  }
  AddUpdate(&uses);  // comes next
  RETURN_IF_ERROR(set_->Expect(uses));
  for (uint32_t slot = 0; slot < plan_.units.size(); ++slot) {
    Measured slice = {plan_.units[slot].offset, Elements(slot), {}, measured_[slot]};
    if (measured_[slot]) visit(slice);
    if (!is_read(slot)) continue;
    ASSIGN_OR_RETURN(std::byte* const data, set_->Pin(slot, Kind::kGradient, Access::kRead));
    slice.gradient = Floats(data, slot);
    visit(slice);
    RETURN_IF_ERROR(set_->Unpin(slot, Kind::kGradient));
  }
  return OkStatus();
}

Status OffloadedExperts::RefreshComputeWeights() {
  RETURN_IF_ERROR(failed_);
  if (!narrow()) return OkStatus();
  std::vector<ExpectedUse> uses;
  for (uint32_t slot = 0; slot < plan_.units.size(); ++slot) {
    uses.push_back({{slot, Kind::kState}, Access::kRead});
    uses.push_back({{slot, Kind::kWeights}, Access::kOverwrite});
  }
  RETURN_IF_ERROR(set_->Expect(uses));
  const kernels::pointwise::Table& kernels =
      kernels::pointwise::Kernels(kernels::pointwise::Element::kBFloat16);
  for (uint32_t slot = 0; slot < plan_.units.size(); ++slot) {
    ASSIGN_OR_RETURN(const std::byte* const state, set_->Pin(slot, Kind::kState, Access::kRead));
    ASSIGN_OR_RETURN(std::byte* const weights, set_->Pin(slot, Kind::kWeights, Access::kOverwrite));
    kernels.convert({state, weights}, {0, Elements(slot)});
    RETURN_IF_ERROR(set_->Unpin(slot, Kind::kState));
    RETURN_IF_ERROR(set_->Unpin(slot, Kind::kWeights));
  }
  return OkStatus();
}

Status OffloadedExperts::WriteState(int64_t first, int part, std::span<const std::byte> bytes) {
  const auto after =
      std::upper_bound(plan_.units.begin(), plan_.units.end(), first,
                       [](int64_t at, const model::UnitSpec& unit) { return at < unit.offset; });
  const auto slot = static_cast<uint32_t>(after - plan_.units.begin() - 1);
  const int64_t within = first - plan_.units[slot].offset;
  const bool master = part == 0;
  const Kind kind = master && !narrow() ? Kind::kWeights : Kind::kState;
  const int64_t element = master ? 4 : options_.moment_bytes;
  const int64_t offset = (kind == Kind::kWeights ? 0 : PartOffset(slot, part)) + element * within;
  ASSIGN_OR_RETURN(std::byte* const data, set_->Pin(slot, kind, Access::kUpdate));
  std::memcpy(data + offset, bytes.data(), bytes.size());
  return set_->Unpin(slot, kind);
}

// Each expert a unit, as in the whole plan.
model::ModelPlan ExpertUnits(const model::ModelPlan& plan) {
  model::ModelPlan experts = model::ExpertPart(plan);
  const auto first = plan.units.begin() + plan.dense_units;
  const int64_t base = first->offset;
  experts.units.assign(first, plan.units.end());
  for (model::UnitSpec& unit : experts.units) {
    unit.offset -= base;
    unit.first_tensor -= first->first_tensor;
  }
  for (size_t u = 0; u < experts.units.size(); ++u) {
    const model::UnitSpec& unit = experts.units[u];
    for (int i = 0; i < unit.tensor_count; ++i) {
      experts.tensors[static_cast<size_t>(unit.first_tensor) + static_cast<size_t>(i)].unit =
          static_cast<int>(u);
    }
  }
  return experts;
}

}  // namespace

StatusOr<std::unique_ptr<Parameters>> MakeOffloaded(const model::ModelPlan& plan,
                                                    const Options& options) {
  if (options.world != 1) {
    return InvalidArgument(
        Str("memory.expert_offloading: ", options.world,
            " ranks would hold the same experts; set parallel.expert to parallel.ranks"));
  }
  model::ModelPlan experts = ExpertUnits(plan);
  const bool narrow = options.precision == model::Precision::kBf16;
  std::vector<offload::SlotBytes> slots;
  int64_t all = 0;
  int64_t together = 0;  // of one expert at its update
  for (const model::UnitSpec& unit : experts.units) {
    const int64_t masters = narrow ? 4 * unit.elements : 0;
    slots.push_back({(narrow ? 2 : 4) * unit.elements, 4 * unit.elements,
                     masters + options.moments * options.moment_bytes * unit.elements});
    int64_t of_slot = 0;
    for (const int64_t bytes : slots.back()) of_slot += offload::BlockMemoryBytes(bytes);
    all += of_slot;
    together = std::max(together, of_slot);
  }
  ASSIGN_OR_RETURN(const offload::BlockTable table, offload::BlockTable::Make(slots));
  offload::ResidentSetOptions set;
  set.budget_bytes = options.offload.budget_bytes > 0 ? options.offload.budget_bytes : all;
  set.min_pinned_bytes = together;
  if (set.budget_bytes < std::min(all, 2 * together)) {
    return InvalidArgument(
        Str("memory.expert_offloading.resident_mb: ", set.budget_bytes >> 20,
            " MiB are less than two experts with their gradients and optimizer state (",
            (2 * together + (1 << 20) - 1) >> 20, " MiB): raise it to that"));
  }
  set.memory_nodes = numa::OwnNodes();
  ASSIGN_OR_RETURN(std::unique_ptr<offload::Home> home,
                   offload::MakeHome(options.offload.spill_dir, table, offload::DiskMethod::kAuto,
                                     set.memory_nodes));
  if (options.offload.around_home) home = options.offload.around_home(std::move(home));
  ASSIGN_OR_RETURN(std::unique_ptr<offload::ResidentSet> resident,
                   offload::ResidentSet::Create(table, set, std::move(home)));
  HEDDLE_INFO(
      "experts are offloaded", {"experts", experts.units.size()}, {"bytes", all},
      {"set", resident->Describe()},
      {"untouched", options.offload.skip_untouched
                        ? "skipped, which is another optimizer than that of experts in memory"
                        : "updated"});
  // Half of the set is being computed with, the other half on its way.
  return std::make_unique<OffloadedExperts>(std::move(experts), options, std::move(resident),
                                            set.budget_bytes / 2);
}

}  // namespace heddle::shard
