// The step loop (architecture W13): batch, forward, backward, reduce, agree, update, report, save.
// Each step's decisions come from one sum over all ranks, so that all ranks do the same in the same
// step. Exact: with equal world size, threads and library, a resumed run has the bits of an
// undisturbed one (training-runtime.md P1).
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/clock/clock.h"
#include "base/status/status.h"
#include "data/stream/prefetcher.h"
#include "heddle/v1/control.pb.h"
#include "model/language_model.h"
#include "worker/comm/communicator.h"
#include "worker/trainer/agreement.h"
#include "worker/trainer/checkpointer.h"
#include "worker/trainer/data_source.h"
#include "worker/trainer/exit_code.h"
#include "worker/trainer/rank_control.h"
#include "worker/trainer/run_plan.h"
#include "worker/trainer/run_state.h"

namespace heddle::trainer {

// Borrowed; all outlive the loop.
struct LoopParts {
  const heddle::v1::RankSpec* spec = nullptr;
  const RunPlan* plan = nullptr;
  const RunData* data = nullptr;
  comm::Communicator* group = nullptr;
  RankControl* control = nullptr;
  model::LanguageModel* model = nullptr;
  RunState* state = nullptr;
  Checkpointer* checkpointer = nullptr;
  const Clock* clock = nullptr;
};

// How a rank ended without an error of the machinery.
struct LoopEnd {
  ExitCode code = ExitCode::kDone;
  std::string category;  // control-plane 4.6, for codes other than 0
  std::string detail;
  // Of kRollBack: the last step before the first bad one, and the global sequences that were read
  // from there to here.
  int64_t rollback_to_step = 0;
  stream::Window skip;
};

class TrainLoop {
 public:
  explicit TrainLoop(const LoopParts& parts);
  // Runs to max_steps or until the ranks agree to leave. UNAVAILABLE: a collective failed, the
  // group is dead. Other errors: as ForwardBackward and the data's.
  StatusOr<LoopEnd> Run();

 private:
  struct StepTimes {
    int64_t begin = 0;
    double data = 0;
    double communication = 0;
  };

  // One step, in the order of the calls in Step().
  StatusOr<bool> Step();
  layers::StepInfo DescribeStep() const;
  // The next update is one of those that train indexers first.
  bool Warmup() const { return parts_.state->counters().step < parts_.plan->indexer_warmup_steps; }
  // ... and nothing else.
  bool Frozen() const { return Warmup() && parts_.plan->freeze_during_warmup; }
  Status ForwardBackward(Agreement* agreement);
  // `first`: number of the first sequence of `batches`.
  Status Pass(const std::vector<stream::PackedBatch>& batches, int64_t first, bool last,
              layers::StepInfo* info, Agreement* agreement);
  model::UnitHooks Noted(model::UnitHooks hooks);
  Status MeasureGradients(Agreement* agreement);
  void FillRequests(Agreement* agreement);
  StepVerdict Judge(const Agreement& sums);
  Status Update(const Agreement& sums, const StepVerdict& verdict);
  heddle::v1::MetricPoint Describe(const Agreement& sums, const StepVerdict& verdict) const;
  Status Evaluate(heddle::v1::MetricPoint* point);
  void Report(const heddle::v1::MetricPoint& point);
  Status SaveIfDue(const Agreement& sums, const StepVerdict& verdict);
  // false: end_ says why the ranks end here.
  StatusOr<bool> CheckNumbers(const Agreement& sums, const StepVerdict& verdict);
  // "loss or gradient is not finite, first in TENSOR, on rank 1, sequences 8 to 9", as far as it is
  // known.
  StatusOr<std::string> DescribeNonFinite();
  LoopEnd RollBack(const StepVerdict& verdict, const std::string& what) const;
  // Global sequences from those of `steps` steps ago to the last one that was read.
  stream::Window ReadLately(int64_t steps) const;

  bool SaveIsDue();
  Status Stage();
  // Agreement rounds outside a step until no rank has a save in flight.
  Status Settle();
  // The last, synchronous save. FAILED_PRECONDITION when it was not committed.
  Status SaveAndWait();
  StatusOr<LoopEnd> LeaveAfterSave(ExitCode code);
  StatusOr<stream::PackedBatch> NextBatch(int64_t micro_batch);
  Status StartData();
  void TuneTimeout(double step_seconds);
  double SecondsSince(int64_t begin) const;
  int rank() const { return parts_.group->rank(); }
  int world() const { return parts_.group->world_size(); }

  const LoopParts parts_;
  std::unique_ptr<stream::Prefetcher> prefetcher_;
  StepTimes times_;
  // Of this rank's passes of the step the first whose loss is not finite, as numbers of sequences.
  stream::Window nonfinite_loss_;
  double norm_ = 0;
  double learning_rate_ = 0;
  bool stop_after_save_ = false;
  bool stop_now_ = false;
  bool save_owed_ = false;  // rank 0: due, but not started yet
  int64_t last_save_at_ = 0;
  double slowest_recent_step_ = 0;
  LoopEnd end_;
};

}  // namespace heddle::trainer
