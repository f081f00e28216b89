// A model's parameters as one rank of a data-parallel run keeps them (training-runtime.md section
// 5): all of them, or a slice of every unit with the rest gathered when it is needed. The step loop
// works with this interface and does not know which. All ranks call the same functions in the same
// order, as often: a rank without a micro-batch visits the units with an empty one. One thread.
//
//   parameters->Connect(group);
//   BeginStep();
//   for (micro-batch) model->ForwardBackward(batch, info, parameters->Hooks({.last = ...}));
//   FinishGradients();  ForEachMeasured, ForEachHeld: clip, update what is held;  Updated();
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "model/language_model.h"
#include "model/optim/gradient_norm.h"
#include "model/store_views.h"
#include "worker/comm/communicator.h"
#include "worker/offload/home.h"
#include "worker/offload/resident_set.h"
#include "worker/shard/layout.h"

namespace heddle::shard {

// What each rank keeps only a part of.
enum class Mode {
  kNone,
  kOptimizer,  // masters and moments (ZeRO-1)
  kFull        // the weights that the model computes with as well (ZeRO-3)
};

// When gradients of the micro-batches of a step are summed over ranks. The bits of the sums depend
// on it.
enum class Accumulation {
  kSyncEach,   // each micro-batch; no rank holds whole gradients
  kSyncLast,   // once, after the last; every rank holds its own sums until then
  kLayerMajor  // once per unit: all micro-batches pass a unit before the next one
};

// Experts in a bounded memory, the rest elsewhere (training-runtime.md section 12).
struct Offload {
  bool enabled = false;
  int64_t budget_bytes = 0;  // 0: all of them
  std::string spill_dir;     // empty: host memory
  // An expert without a token in a step is left out of its update: nothing of it moves, and nothing
  // decays, which is another optimizer than that of experts in memory (12.3).
  bool skip_untouched = false;
  // What stands between the resident set and the home of its blocks, given that home; none:
  // nothing. For tests, which look at transfers or hold them up.
  std::function<std::unique_ptr<offload::Home>(std::unique_ptr<offload::Home>)> around_home;
};

struct Options {
  Mode mode = Mode::kNone;
  Accumulation accumulation = Accumulation::kSyncLast;
  model::Precision precision = model::Precision::kBf16;
  comm::Wire wire = comm::Wire::kFp32;
  int rank = 0;
  int world = 1;
  // Experts have a mesh of their own (10.1). Divides `world`: rank r holds the experts of
  // model::ExpertsOfRank(config, r, expert_degree), as do all ranks that are equal to it modulo
  // this; their gradients are summed over those ranks alone, and mode and slices count in them.
  int expert_degree = 1;
  // Of the optimizer, whose moments lie beside offloaded experts.
  int moments = 2;
  int moment_bytes = 4;
  Offload offload;
};

// A pass over the units.
struct Visit {
  bool train = true;  // else a forward only
  bool last = true;   // of the step's passes: gradients are complete after it
};

// What ForEachHeld is for. Only what it names is there of offloaded experts.
enum class Touch {
  kResident,        // anything, but offloaded experts are left out
  kReadState,       // masters and moments
  kWriteState,      // the same, all of them; moments of offloaded experts are 0 before
  kReadGradients,   // sums over ranks
  kWriteGradients,  // the same
  kUpdate           // everything; gradients are read, offloaded compute weights all written anew
};

// A piece of the flat layout that this rank updates, with its memory. `owned_offset` is the place
// of `range.begin` in arrays of owned_elements(). `replicas` ranks hold the same piece; this one is
// number `replica` of them: they share the writing of checkpoints.
struct Held {
  FlatRange range;
  int64_t owned_offset = 0;
  int replica = 0;
  int replicas = 1;
  // Offloaded: moments lie here instead of at owned_offset, of options.moment_bytes an element.
  bool offloaded = false;
  std::byte* moments[2] = {};
  std::span<float> master;
  std::span<float> gradient;
  std::span<uint16_t> compute_bf16;  // empty in fp32
};

// Reduced gradients of [begin, begin + elements) of the flat layout, or, of an offloaded expert,
// what was measured of them when they were complete: they need not come back for it.
struct Measured {
  int64_t begin = 0;
  int64_t elements = 0;
  std::span<const float> gradient;            // empty: see stats
  std::optional<optim::GradientStats> stats;  // of all of it at once
  optim::GradientStats Stats() const {
    return stats.has_value() ? *stats : optim::MeasureGradients(gradient);
  }
};

class Parameters {
 public:
  virtual ~Parameters() = default;

  // For LanguageModel::Create; its hooks must be used for every pass.
  virtual model::ModelMemory memory() = 0;
  virtual const model::ModelPlan& plan() const = 0;
  virtual std::span<float> buffers() = 0;  // of the layers: equal on all ranks

  // In the order of their ranges; together all that this rank updates. Spans are valid within the
  // call. A failure of `visit` ends it.
  virtual Status ForEachHeld(Touch touch, const std::function<Status(const Held&)>& visit) = 0;
  // Length of the arrays that run beside the masters: moments, but of offloaded experts.
  virtual int64_t owned_elements() const = 0;
  // Memory of units that were whole for a while, at its peak so far.
  virtual int64_t gathered_bytes() const = 0;
  // Before the first pass. Borrowed.
  virtual void Connect(comm::Communicator* group) = 0;
  // Gradients become zero.
  virtual void BeginStep() = 0;
  // UNAVAILABLE from a hook: a collective failed.
  virtual model::UnitHooks Hooks(Visit visit) = 0;
  // The gradients that are held are sums over all ranks and micro-batches from here on.
  virtual Status FinishGradients() = 0;
  // Of the reduced gradients those that this rank measures, unit by unit: each element is one
  // rank's. The same in every mode, so that the norm has the same bits. Spans are valid within the
  // call.
  virtual Status ForEachMeasured(const std::function<void(const Measured&)>& visit) = 0;
  // Masters changed otherwise than by the optimizer, which writes Held::compute_bf16 itself: loaded
  // or initialised.
  virtual Status RefreshComputeWeights() = 0;
  // Gradients of offloaded experts become zero.
  virtual Status DropOffloadedGradients() { return OkStatus(); }
  // Elements of the flat layout from here on are those of offloaded experts.
  virtual int64_t offloaded_from() const { return plan().flat_elements; }
  // Replaces some of their masters (part 0) or moments (1, 2) from element `first` of the flat
  // layout on; RefreshComputeWeights is due. REQUIRES: within one tensor.
  virtual Status WriteState(int64_t /*first*/, int /*part*/, std::span<const std::byte> /*bytes*/) {
    return Internal("nothing is offloaded");
  }
  // Weights that other ranks have gathered are stale from here on.
  virtual void Updated() = 0;
  // Not OK once offloaded experts are lost: their disk failed, or returned other bytes. It is no
  // fault of what they were loaded from or saved to.
  virtual Status Healthy() { return OkStatus(); }
  // Of the resident set of offloaded experts, since the last call; nothing without offloading.
  virtual std::optional<offload::ResidentSetStats> TakeOffloadStats() { return std::nullopt; }
};

// By options.mode, both meshes. `plan` is this rank's: with its experts alone.
// RESOURCE_EXHAUSTED if the memory cannot be had.
StatusOr<std::unique_ptr<Parameters>> MakeParameters(model::ModelPlan plan, const Options& options);

// Fills masters with their initial values, a pure function of (seed, tensor name, element), and
// buffers with zeros.
Status InitParameters(uint64_t seed, Parameters* parameters);

}  // namespace heddle::shard
