// Everything that a step changes: master weights, moments, buffers, counters, data position. What a
// checkpoint holds is exactly this, so that a run goes on bit for bit (training-runtime.md
// P1, 14.1).
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "checkpoint/tensor_io/load.h"
#include "checkpoint/tensor_io/save.h"
#include "data/stream/skip_windows.h"
#include "heddle/v1/checkpoints.pb.h"
#include "model/model_plan.h"
#include "model/optim/moments.h"
#include "model/optim/optimizer.h"
#include "worker/shard/parameters.h"
#include "worker/trainer/numeric_policy.h"
#include "worker/trainer/run_plan.h"

namespace heddle::trainer {

struct Counters {
  int64_t step = 0;            // steps done, skipped updates included
  int64_t updates = 0;         // of them, those that changed the weights
  int64_t frozen_updates = 0;  // of these, those that changed indexers alone
  int64_t data_position = 0;   // next sequence, counted without the skipped windows
  int64_t tokens = 0;          // read by the job
};

class RunState {
 public:
  // Initial weights: those of plan.init_from, else a pure function of the seed. RESOURCE_EXHAUSTED
  // without memory; errors of hf::ReadWeightRanges: of the weights that this rank holds.
  static StatusOr<std::unique_ptr<RunState>> Create(const heddle::v1::ModelConfig& model,
                                                    const RunPlan& plan, int rank, int world);

  shard::Parameters* parameters() { return parameters_.get(); }
  // The plan of the model with the experts of all ranks.
  const model::ModelPlan& whole() const { return whole_; }
  Counters& counters() { return counters_; }
  const Counters& counters() const { return counters_; }
  NumericPolicy& numeric() { return numeric_; }
  // What rollbacks left out of the data, merged. Empty after Create() and Reset().
  std::vector<stream::Window>& skipped() { return skipped_; }
  const std::vector<stream::Window>& skipped() const { return skipped_; }

  // The optimizer's view of everything this rank updates, piece by piece, each with its place in
  // the layout of whole(); spans are valid within the call. `frozen`: only indexers move, so
  // offloaded experts are left where they are.
  Status ForEachShard(bool frozen, const std::function<void(const optim::Shard&)>& visit);
  // `warmup`: the step trains indexers first (attention-and-moe.md 6.3); with a frozen model
  // nothing else changes.
  const std::vector<optim::GroupRange>& groups(bool warmup) const {
    return warmup ? warmup_groups_ : groups_;
  }
  // Frozen weights have no gradient: it would count in the norm that clips the others. Of the
  // reduced gradients.
  Status DropFrozenGradients();
  // Place in the flat layout of whole() of the first gradient that this rank holds and that is not
  // finite; -1 without one.
  StatusOr<int64_t> FirstNonFiniteGradient();

  // As a checkpoint lists them.
  const std::vector<heddle::v1::TensorInfo>& tensors() const { return tensors_; }
  // What this rank writes of a checkpoint, pointing into the live buffers: what it alone holds, and
  // its share of what several ranks hold. Once for each offloaded expert, whose pointers are valid
  // within the call, and last for all the rest.
  using VisitRanges =
      std::function<Status(const std::vector<checkpoint::LocalRange>&, bool offloaded)>;
  Status ForEachRanges(const VisitRanges& visit);
  // Copies them; offloaded experts into a file of the spill folder.
  Status CopyTo(checkpoint::Snapshot* snapshot);

  // Loads weights and moments; counters are the caller's. Moments stored in bf16 are widened, which
  // is exact; stored in fp32 they are refused where this run keeps bf16: FAILED_PRECONDITION. Other
  // errors as checkpoint::LoadRanges. After an error Reset() is due.
  Status Load(const heddle::v1::CheckpointRecord& record, const std::string& root);
  // Back to initial weights and zero moments.
  Status Reset();

 private:
  RunState() = default;

  uint64_t seed_ = 0;
  std::string init_from_;
  std::string spill_dir_;
  std::unique_ptr<shard::Parameters> parameters_;
  optim::MomentArrays moments_;  // [parameters_->owned_elements()]
  std::vector<optim::GroupRange> groups_;
  std::vector<optim::GroupRange> warmup_groups_;
  std::vector<heddle::v1::TensorInfo> tensors_;
  Status ReadInitialWeights();
  // Part of a class of a tensor that this rank holds.
  struct Piece {
    size_t tensor = 0;  // in tensors_
    int tensor_class = 0;
    int64_t first = 0;  // element of the tensor
    int64_t count = 0;
    void* data = nullptr;
    int replica = 0;
    int replicas = 1;
  };
  // Calls visit with the pieces of each offloaded expert, and last with all others and the buffers.
  // Pointers of the former are valid within the call.
  using VisitPieces = std::function<Status(const std::vector<Piece>&, bool offloaded)>;
  Status ForEachPieces(shard::Touch touch, const VisitPieces& visit);
  void* MomentAt(const shard::Held& held, bool second, int64_t within);
  // Elements of this rank's flat layout from `begin` on, up to the next run, lie in that of whole()
  // `shift` later.
  struct Run {
    int64_t begin = 0;
    int64_t shift = 0;
  };
  void FindRuns();
  // The part of `held` that starts at element `begin` of this rank's layout, `count` long.
  optim::Shard ShardOf(const shard::Held& held, const Run& run, int64_t begin, size_t count);
  std::vector<checkpoint::LocalRange> RangesOf(const std::vector<Piece>& pieces) const;
  void AddUnheld(std::vector<Piece>* pieces) const;
  checkpoint::WantedRange WantedOf(const Piece& piece, heddle::v1::ElementType stored);
  void AddPieces(const shard::Held& held, std::vector<Piece>* pieces);
  // Type of the checkpoint's moments, or why this run cannot take them.
  StatusOr<heddle::v1::ElementType> StoredMoments(const heddle::v1::CheckpointRecord& record) const;

  int rank_ = 0;
  int world_ = 1;
  model::ModelPlan whole_;  // the model with the experts of all ranks
  // In the order of tensors_: of the whole model, and of this rank's part; null: others hold it.
  std::vector<const model::TensorSpec*> specs_;
  std::vector<const model::TensorSpec*> local_;
  std::vector<size_t> by_offset_;  // parameters of this rank, as places in local_
  std::vector<Run> runs_;          // in order of begin, the first at 0
  Counters counters_;
  NumericPolicy numeric_;
  std::vector<stream::Window> skipped_;
};

}  // namespace heddle::trainer
