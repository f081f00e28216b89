#include "worker/trainer/train_loop.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <thread>
#include <utility>

#include "base/log/log.h"
#include "model/cost_formulas.h"
#include "model/optim/gradient_norm.h"
#include "model/optim/optimizer.h"
#include "model/optim/schedule.h"
#include "model/training_plan.h"
#include "worker/trainer/restore.h"

namespace heddle::trainer {

namespace {

// `save_interval: auto` saves no more often.
constexpr double kAutoSaveSecondsMin = 60;
constexpr std::chrono::milliseconds kStepTimeoutMin{120'000};

double MeanLoss(const Agreement& sums) {
  return sums[Slot::kLoss] / std::max(sums[Slot::kValidTokens], 1.0);
}

std::string Sequences(const stream::Window& window) {
  return Str("sequences ", window.first, " to ", window.first + window.count - 1);
}

}  // namespace

TrainLoop::TrainLoop(const LoopParts& parts) : parts_(parts) {}

StatusOr<LoopEnd> TrainLoop::Run() {
  RETURN_IF_ERROR(StartData());
  last_save_at_ = parts_.clock->NowSteady();
  while (parts_.state->counters().step < parts_.plan->max_steps) {
    ASSIGN_OR_RETURN(const bool go_on, Step());
    if (!go_on) {
      return end_;
    }
    if (stop_now_) {
      return LoopEnd{.code = ExitCode::kStopped, .category = "", .detail = "left without saving"};
    }
    if (stop_after_save_) {
      return LeaveAfterSave(ExitCode::kStopped);
    }
  }
  return LeaveAfterSave(ExitCode::kDone);
}

// false: the ranks agreed to end here; end_ says why.
StatusOr<bool> TrainLoop::Step() {
  times_ = {.begin = parts_.clock->NowSteady()};
  Agreement agreement;
  RETURN_IF_ERROR(ForwardBackward(&agreement));

  parts_.control->NoteProgress(static_cast<uint64_t>(parts_.state->counters().step),
                               Phase::kReduce);
  const int64_t reduce_begin = parts_.clock->NowSteady();
  RETURN_IF_ERROR(parts_.state->parameters()->FinishGradients());
  if (Frozen()) {
    RETURN_IF_ERROR(parts_.state->DropFrozenGradients());
  }
  if (!parts_.model->statistics().empty()) {
    RETURN_IF_ERROR(parts_.group->AllReduceSum(parts_.model->statistics()));
  }
  RETURN_IF_ERROR(MeasureGradients(&agreement));
  FillRequests(&agreement);
  RETURN_IF_ERROR(agreement.Reach(parts_.group));
  times_.communication = SecondsSince(reduce_begin);

  // From here on `agreement` holds the sums: every rank decides alike.
  if (agreement.Any(Slot::kFenced)) {
    end_ = {.code = ExitCode::kFenced, .category = "", .detail = "a newer attempt exists"};
    return false;
  }
  parts_.checkpointer->Apply(agreement);
  const StepVerdict verdict = Judge(agreement);
  RETURN_IF_ERROR(Update(agreement, verdict));
  ASSIGN_OR_RETURN(const bool good, CheckNumbers(agreement, verdict));
  if (!good) {
    return false;
  }
  heddle::v1::MetricPoint point = Describe(agreement, verdict);
  RETURN_IF_ERROR(Evaluate(&point));
  Report(point);
  stop_now_ = agreement.Any(Slot::kStopNow);
  stop_after_save_ = agreement.Any(Slot::kStopAfterSave);
  RETURN_IF_ERROR(SaveIfDue(agreement, verdict));
  TuneTimeout(SecondsSince(times_.begin));
  return true;
}

// Gradients of this rank's micro-batches, already divided by the step's global number of valid
// tokens: ranks hold different numbers of them (7.2). All ranks make the same number of passes.
Status TrainLoop::ForwardBackward(Agreement* agreement) {
  const Counters& counters = parts_.state->counters();
  const RunPlan& plan = *parts_.plan;
  layers::StepInfo info = DescribeStep();
  const stream::MicroBatchRange mine =
      stream::RankMicroBatches(plan.global_batch / plan.micro_batch, rank(), world());

  nonfinite_loss_ = {};
  parts_.state->parameters()->BeginStep();
  std::fill(parts_.model->statistics().begin(), parts_.model->statistics().end(), 0.0);
  const int64_t total = plan.global_batch / plan.micro_batch;
  const int64_t most = (total + world() - 1) / world();  // of any rank
  const int64_t at_once = plan.shard.accumulation == shard::Accumulation::kLayerMajor ? most : 1;
  for (int64_t pass = 0; pass < most; pass += at_once) {
    parts_.control->NoteProgress(static_cast<uint64_t>(counters.step), Phase::kData);
    const int64_t begin = parts_.clock->NowSteady();
    std::vector<stream::PackedBatch> batches;
    for (int64_t m = pass; m < std::min(pass + at_once, mine.end - mine.begin); ++m) {
      StatusOr<stream::PackedBatch> read = NextBatch(m);
      RETURN_IF_ERROR(MarkBadData(read.status()));
      batches.push_back(*std::move(read));
    }
    // Nothing to add, but units are visited, and experts exchange rows once for every micro-batch.
    const int64_t lanes = plan.shard.expert_degree > 1 ? std::min(at_once, most - pass) : 1;
    while (static_cast<int64_t>(batches.size()) < lanes) batches.emplace_back();
    times_.data += SecondsSince(begin);

    parts_.control->NoteProgress(static_cast<uint64_t>(counters.step), Phase::kForward);
    const int64_t first = counters.data_position + (mine.begin + pass) * plan.micro_batch;
    RETURN_IF_ERROR(Pass(batches, first, pass + at_once >= most, &info, agreement));
  }
  return OkStatus();
}

// The hooks, which also say in the rank's page where the pass is: a fault report names it.
model::UnitHooks TrainLoop::Noted(model::UnitHooks hooks) {
  const auto call = [](const std::function<Status(int)>& hook, int unit) {
    return hook ? hook(unit) : OkStatus();
  };
  RankControl* const control = parts_.control;
  const auto step = static_cast<uint64_t>(parts_.state->counters().step);
  const int head = parts_.state->parameters()->plan().dense_units - 1;
  model::UnitHooks noted = hooks;
  noted.before_forward = [=, forward = hooks.before_forward](int unit) {
    control->NoteUnit(unit);
    return call(forward, unit);
  };
  noted.before_backward = [=, backward = hooks.before_backward](int unit) {
    if (unit == head) control->NoteProgress(step, Phase::kBackward);
    control->NoteUnit(unit);
    return call(backward, unit);
  };
  return noted;
}

// One pass over the model's units with these micro-batches.
Status TrainLoop::Pass(const std::vector<stream::PackedBatch>& batches, int64_t first, bool last,
                       layers::StepInfo* info, Agreement* agreement) {
  std::vector<model::PackedBatch> views;
  for (const stream::PackedBatch& batch : batches) views.push_back(ViewOf(batch));
  ASSIGN_OR_RETURN(
      const model::LossSum loss,
      parts_.model->ForwardBackward(
          views, *info, Noted(parts_.state->parameters()->Hooks({.train = true, .last = last}))));
  parts_.control->NoteUnit(-1);
  for (const stream::PackedBatch& batch : batches) {
    info->first_token += static_cast<int64_t>(batch.tokens.size());
    (*agreement)[Slot::kTokens] += static_cast<double>(batch.tokens.size());
    (*agreement)[Slot::kHashLow] += static_cast<double>(batch.hash_low);
    (*agreement)[Slot::kHashHigh] += static_cast<double>(batch.hash_high);
  }
  (*agreement)[Slot::kLoss] += loss.loss;
  (*agreement)[Slot::kValidTokens] += static_cast<double>(loss.tokens);
  (*agreement)[Slot::kIndexerLoss] += loss.layers.indexer;
  (*agreement)[Slot::kBalanceLoss] += loss.layers.balance;
  (*agreement)[Slot::kRouterLoss] += loss.layers.router_z;
  (*agreement)[Slot::kDropped] += static_cast<double>(loss.counts.dropped);
  (*agreement)[Slot::kNanRows] += static_cast<double>(loss.counts.nan_rows);
  if (!std::isfinite(loss.loss) || !std::isfinite(loss.layers.Total())) {
    (*agreement)[Slot::kNonFinite] += 1;
    if (nonfinite_loss_.count == 0) {
      nonfinite_loss_ = {first, static_cast<int64_t>(batches.size()) * parts_.plan->micro_batch};
    }
  }
  return OkStatus();
}

// What holds for all micro-batches of the step; first_token is that of this rank's first one.
layers::StepInfo TrainLoop::DescribeStep() const {
  const Counters& counters = parts_.state->counters();
  const RunPlan& plan = *parts_.plan;
  const stream::SequenceSource& source = *parts_.data->train;
  const int64_t begin = counters.data_position;
  const stream::SequenceShape total = stream::TotalShape(source, begin, begin + plan.global_batch);
  const int64_t mine =
      stream::RankMicroBatches(plan.global_batch / plan.micro_batch, rank(), world()).begin *
      plan.micro_batch;
  layers::StepInfo info;
  info.step = counters.step;
  info.seed = plan.seed;
  info.loss_scale = 1.0 / static_cast<double>(std::max<int64_t>(total.valid_labels, 1));
  info.row_scale = 1.0 / static_cast<double>(std::max<int64_t>(total.tokens, 1));
  info.first_token = stream::TotalShape(source, begin, begin + mine).tokens;
  info.indexer_warmup = Warmup();
  if (Frozen()) {
    info.loss_scale = 0;
  }
  return info;
}

// Each rank measures its own slices of the reduced gradient; the slices add up to the whole (8.1).
// Gradients of indexers are measured apart.
Status TrainLoop::MeasureGradients(Agreement* agreement) {
  const std::vector<optim::GroupRange>& groups = parts_.state->groups(Warmup());
  return parts_.state->parameters()->ForEachMeasured([&](const shard::Measured& slice) {
    const int64_t slice_end = slice.begin + slice.elements;
    for (size_t g = 0; g < groups.size();) {
      // A run of groups of one sort: the fewer pieces, the same bits for models without indexers.
      size_t next = g + 1;
      while (next < groups.size() && groups[next].indexer == groups[g].indexer) ++next;
      const int64_t begin = std::max(groups[g].begin, slice.begin);
      const int64_t end = std::min(groups[next - 1].end, slice_end);
      if (begin < end) {
        // An expert is of one sort, so what was measured of it is what is asked for.
        const optim::GradientStats stats =
            slice.stats.has_value()
                ? *slice.stats
                : optim::MeasureGradients(slice.gradient.subspan(
                      static_cast<size_t>(begin - slice.begin), static_cast<size_t>(end - begin)));
        (*agreement)[groups[g].indexer ? Slot::kIndexerSquaredNorm : Slot::kSquaredNorm] +=
            stats.sum_of_squares;
        (*agreement)[Slot::kNonFinite] += static_cast<double>(stats.non_finite);
      }
      g = next;
    }
  });
}

void TrainLoop::FillRequests(Agreement* agreement) {
  parts_.checkpointer->Fill(agreement);
  if (const std::optional<heddle::v1::StopRank> stop = parts_.control->StopRequest()) {
    const bool save = stop->mode() == heddle::v1::STOP_MODE_CHECKPOINT_AND_EXIT;
    (*agreement)[save ? Slot::kStopAfterSave : Slot::kStopNow] = 1;
  }
  (*agreement)[Slot::kSaveDue] = rank() == 0 && SaveIsDue() ? 1 : 0;
}

// From sums over all ranks, so that they do the same (16).
StepVerdict TrainLoop::Judge(const Agreement& sums) {
  const int64_t stage = parts_.plan->indexer_warmup_steps;
  if (stage > 0 && parts_.state->counters().step == stage) parts_.state->numeric().StartStage();
  const bool finite = !sums.Any(Slot::kNonFinite);
  const double norm =
      std::hypot(std::sqrt(sums[Slot::kSquaredNorm]), std::sqrt(sums[Slot::kIndexerSquaredNorm]));
  norm_ = finite ? norm : std::nan("");
  return parts_.state->numeric().Judge(finite, MeanLoss(sums), norm);
}

// A bad step changes no weight on any rank; the data still advance (16.1).
Status TrainLoop::Update(const Agreement& sums, const StepVerdict& verdict) {
  Counters& counters = parts_.state->counters();
  const RunPlan& plan = *parts_.plan;
  parts_.control->NoteProgress(static_cast<uint64_t>(counters.step), Phase::kUpdate);
  const double norm = std::sqrt(sums[Slot::kSquaredNorm]);
  const double indexer_norm = std::sqrt(sums[Slot::kIndexerSquaredNorm]);
  learning_rate_ = optim::LearningRate(plan.schedule, counters.step);
  if (verdict.apply) {
    ++counters.updates;
    counters.frozen_updates += Frozen() ? 1 : 0;
    const optim::StepArgs args{
        .update = counters.updates,
        .learning_rate = learning_rate_,
        .grad_scale = optim::ClipDivisor(norm, plan.grad_clip),
        .found_inf = false,
        .frozen_updates = Frozen() ? 0 : counters.frozen_updates,
        .indexer_grad_scale = optim::ClipDivisor(indexer_norm, plan.grad_clip)};
    RETURN_IF_ERROR(parts_.state->ForEachShard(Frozen(), [&](const optim::Shard& shard) {
      optim::OptimizerStep(plan.optimizer, parts_.state->groups(Warmup()), args, shard);
    }));
    parts_.state->parameters()->Updated();
    parts_.model->UpdateBuffers(Frozen());
  }
  ++counters.step;
  counters.data_position += plan.global_batch;
  counters.tokens += static_cast<int64_t>(sums[Slot::kTokens]);
  return OkStatus();
}

StatusOr<bool> TrainLoop::CheckNumbers(const Agreement& sums, const StepVerdict& verdict) {
  if (verdict.apply) {
    return true;
  }
  std::string what = verdict.what;
  if (!verdict.finite) {
    ASSIGN_OR_RETURN(what, DescribeNonFinite());
  } else {
    what += Str(", ", Sequences(ReadLately(verdict.bad_steps)));
  }
  const int64_t step = parts_.state->counters().step;
  HEDDLE_WARN("the step's update is left out", {"step", step}, {"why", what},
              {"in_a_row", verdict.bad_steps});
  switch (verdict.then) {
    case StepVerdict::Then::kGoOn:
      return true;
    case StepVerdict::Then::kHalt:
      end_ = {.code = ExitCode::kNumeric,
              .category = "NUMERIC",
              .detail = Str("step ", step, ": ", what,
                            parts_.plan->nan_policy == NanPolicy::kSkip
                                ? Str("; ", verdict.bad_steps,
                                      " steps in a row, which training.nan_policy=skip does not "
                                      "skip")
                                : "")};
      return false;
    case StepVerdict::Then::kRollBack:
      // A save under way may be the very checkpoint to go back to.
      if (sums.Any(Slot::kSaveBusy)) RETURN_IF_ERROR(Settle());
      end_ = RollBack(verdict, Str("step ", step, ": ", what));
      return false;
  }
  return Internal("unknown verdict");
}

LoopEnd TrainLoop::RollBack(const StepVerdict& verdict, const std::string& what) const {
  LoopEnd end;
  end.code = ExitCode::kRollBack;
  end.category = "ROLLBACK";
  end.rollback_to_step = parts_.state->counters().step - verdict.bad_steps;
  end.skip = ReadLately(verdict.bad_steps);
  end.detail =
      Str(what, verdict.bad_steps > 1 ? Str("; ", verdict.bad_steps, " steps in a row") : "",
          "; back to step ", end.rollback_to_step, " or before, without ", Sequences(end.skip));
  return end;
}

stream::Window TrainLoop::ReadLately(int64_t steps) const {
  const std::vector<stream::Window>& skipped = parts_.state->skipped();
  const int64_t end = parts_.state->counters().data_position;
  const int64_t begin = std::max<int64_t>(0, end - steps * parts_.plan->global_batch);
  const int64_t first = stream::GlobalIndex(skipped, begin);
  return {first, stream::GlobalIndex(skipped, end - 1) + 1 - first};
}

// Each rank knows its own losses, and of the gradients its own part only.
StatusOr<std::string> TrainLoop::DescribeNonFinite() {
  // Of each rank: place of the first gradient in the flat layout, from 1, or 0; first sequence and
  // number of those of the first pass with such a loss, or 0.
  std::vector<double> all(static_cast<size_t>(world()) * 3, 0.0);
  const size_t own = static_cast<size_t>(rank()) * 3;
  ASSIGN_OR_RETURN(const int64_t bad, parts_.state->FirstNonFiniteGradient());
  all[own] = static_cast<double>(bad + 1);
  all[own + 1] = static_cast<double>(nonfinite_loss_.first);
  all[own + 2] = static_cast<double>(nonfinite_loss_.count);
  RETURN_IF_ERROR(parts_.group->AllReduceSum(std::span<double>(all)));
  double place = 0;
  int bad_ranks = 0;
  size_t bad_rank = 0;
  for (size_t r = 0; r < static_cast<size_t>(world()); ++r) {
    const double gradient = all[r * 3];
    if (gradient > 0 && (place == 0 || gradient < place)) place = gradient;
    if (all[r * 3 + 2] > 0 && bad_ranks++ == 0) bad_rank = r;
  }
  std::string tensor;
  for (const model::TensorSpec& spec : parts_.state->whole().tensors) {
    if (place == 0 || static_cast<int64_t>(place) > spec.offset + spec.elements) continue;
    tensor = spec.name;
    break;
  }
  // What came from one rank alone is worth looking at there: its data, or the machine.
  stream::Window read = ReadLately(1);
  if (bad_ranks == 1) {
    const std::vector<stream::Window>& skipped = parts_.state->skipped();
    const int64_t first = static_cast<int64_t>(all[bad_rank * 3 + 1]);
    const int64_t count = static_cast<int64_t>(all[bad_rank * 3 + 2]);
    read.first = stream::GlobalIndex(skipped, first);
    read.count = stream::GlobalIndex(skipped, first + count - 1) + 1 - read.first;
  }
  return Str("loss or gradient is not finite", tensor.empty() ? "" : Str(", first in ", tensor),
             bad_ranks == 1 && world() > 1 ? Str(", on rank ", bad_rank) : "", ", ",
             Sequences(read));
}

heddle::v1::MetricPoint TrainLoop::Describe(const Agreement& sums,
                                            const StepVerdict& verdict) const {
  const Counters& counters = parts_.state->counters();
  const double seconds = SecondsSince(times_.begin);
  heddle::v1::MetricPoint point;
  point.set_step(static_cast<uint64_t>(counters.step));
  point.set_loss(MeanLoss(sums));
  point.set_grad_norm(norm_);
  point.set_learning_rate(learning_rate_);
  point.set_tokens(static_cast<uint64_t>(counters.tokens));
  point.set_tokens_per_second(sums[Slot::kTokens] / std::max(seconds, 1e-9));
  point.set_step_seconds(seconds);
  point.set_batch_hash(stream::BatchHash(static_cast<uint64_t>(sums[Slot::kHashLow]),
                                         static_cast<uint64_t>(sums[Slot::kHashHigh])));
  point.set_attempt(parts_.spec->attempt());
  point.set_data_wait_seconds(times_.data);
  point.set_communication_seconds(times_.communication);
  if (parts_.plan->indexer_warmup_steps > 0 || sums[Slot::kIndexerLoss] > 0) {
    point.set_indexer_loss(sums[Slot::kIndexerLoss]);
  }
  if (sums[Slot::kBalanceLoss] > 0 || sums[Slot::kRouterLoss] > 0) {
    point.set_balance_loss(sums[Slot::kBalanceLoss]);
    point.set_router_z_loss(sums[Slot::kRouterLoss]);
  }
  if (parts_.plan->has_capacity) {
    point.set_dropped_assignments(static_cast<uint64_t>(sums[Slot::kDropped]));
  }
  if (parts_.plan->selects_keys) {
    point.set_nan_rows(static_cast<uint64_t>(sums[Slot::kNanRows]));
  }
  if (const auto use = parts_.state->parameters()->TakeOffloadStats()) {
    heddle::v1::OffloadUse* offload = point.mutable_offload();
    offload->set_hits(static_cast<uint64_t>(use->hits));
    offload->set_misses(static_cast<uint64_t>(use->misses));
    offload->set_evictions(static_cast<uint64_t>(use->evictions));
    offload->set_bytes_read(static_cast<uint64_t>(use->bytes_read));
    offload->set_bytes_written(static_cast<uint64_t>(use->bytes_written));
    offload->set_read_seconds(use->read_seconds);
    offload->set_write_seconds(use->write_seconds);
    offload->set_exposed_seconds(use->exposed_seconds);
    offload->set_resident_bytes(static_cast<uint64_t>(use->peak_bytes));
  }
  point.set_skipped_nonfinite(verdict.finite ? 0 : 1);
  if (verdict.spike) point.set_skipped_spikes(1);
  return point;
}

// Reads its own positions and changes no state, so that evaluating never changes training (15.7).
Status TrainLoop::Evaluate(heddle::v1::MetricPoint* point) {
  const int64_t step = parts_.state->counters().step;
  if (parts_.plan->eval_interval == 0 || step % parts_.plan->eval_interval != 0) {
    return OkStatus();
  }
  const int64_t sequences = parts_.data->eval_sequences;
  const int64_t begin = sequences * rank() / world();
  const int64_t end = sequences * (rank() + 1) / world();
  const int64_t most = (sequences + world() - 1) / world();  // of any rank
  std::array<double, 2> sums{};
  layers::StepInfo stage;
  stage.indexer_warmup = Warmup();
  // All ranks make the same number of passes, the last one perhaps over nothing.
  for (int64_t at = 0; at < most; at += parts_.plan->micro_batch) {
    parts_.control->NoteProgress(static_cast<uint64_t>(step), Phase::kEvaluate);
    stream::PackedBatch batch;
    for (int64_t i = begin + at; i < std::min(end, begin + at + parts_.plan->micro_batch); ++i) {
      RETURN_IF_ERROR(MarkBadData(parts_.data->eval->Append(i, &batch)));
    }
    ASSIGN_OR_RETURN(const model::LossSum loss,
                     parts_.model->Evaluate(ViewOf(batch), stage,
                                            parts_.state->parameters()->Hooks({.train = false})));
    sums[0] += loss.loss;
    sums[1] += static_cast<double>(loss.tokens);
  }
  RETURN_IF_ERROR(parts_.group->AllReduceSum(std::span<double>(sums)));
  point->set_eval_loss(sums[0] / std::max(sums[1], 1.0));
  return OkStatus();
}

void TrainLoop::Report(const heddle::v1::MetricPoint& point) {
  if (rank() != 0) {
    return;
  }
  heddle::v1::RankProgress progress;
  progress.set_step(point.step());
  *progress.add_points() = point;
  progress.set_checkpoints_deferred(parts_.checkpointer->stats().deferred);
  parts_.control->Report(progress);
  if (static_cast<int64_t>(point.step()) % parts_.plan->log_interval == 0) {
    // The line that people and log parsers know from other trainers.
    std::printf("Step %llu | Loss: %.4f | LR: %.4e | Tokens/sec: %.0f\n",
                static_cast<unsigned long long>(point.step()), point.loss(), point.learning_rate(),
                point.tokens_per_second());
    std::fflush(stdout);
  }
}

// Rank 0 decides, since measured times differ between ranks. A due save that finds the former one
// in flight waits for it.
bool TrainLoop::SaveIsDue() {
  const int64_t after = parts_.state->counters().step + 1;
  if (after >= parts_.plan->max_steps) {
    return false;  // the last save is LeaveAfterSave's
  }
  if (parts_.plan->save_interval > 0) {
    save_owed_ = save_owed_ || after % parts_.plan->save_interval == 0;
    return save_owed_;
  }
  const CheckpointerStats stats = parts_.checkpointer->stats();
  const double blocking = std::max(
      stats.committed > 0 ? stats.blocked_seconds / static_cast<double>(stats.committed) : 0.1,
      1e-3);
  const double interval =
      std::max({model::SaveIntervalSeconds(blocking, model::kMeanTimeToFailureSeconds),
                kAutoSaveSecondsMin, stats.last_write_seconds});
  return SecondsSince(last_save_at_) >= interval;
}

// After a step that is not finite the weights themselves may be what is bad: a save would push a
// sound checkpoint out of those that are kept. It stays owed.
Status TrainLoop::SaveIfDue(const Agreement& sums, const StepVerdict& verdict) {
  if (!sums.Any(Slot::kSaveDue) || stop_now_ || stop_after_save_ || !verdict.finite) {
    return OkStatus();
  }
  if (sums.Any(Slot::kSaveBusy)) {
    parts_.checkpointer->CountDeferred();
    return OkStatus();
  }
  save_owed_ = false;
  last_save_at_ = parts_.clock->NowSteady();
  return Stage();
}

Status TrainLoop::Stage() {
  const Counters& counters = parts_.state->counters();
  parts_.control->NoteProgress(static_cast<uint64_t>(counters.step), Phase::kSave);
  heddle::v1::TrainState state = DescribeRun(*parts_.spec, *parts_.plan, *parts_.data);
  state.set_step(static_cast<uint64_t>(counters.step));
  state.set_updates(static_cast<uint64_t>(counters.updates));
  state.set_frozen_updates(static_cast<uint64_t>(counters.frozen_updates));
  const std::vector<stream::Window>& skipped = parts_.state->skipped();
  state.set_data_position(
      static_cast<uint64_t>(stream::GlobalIndex(skipped, counters.data_position)));
  state.set_tokens_seen(static_cast<uint64_t>(counters.tokens));
  parts_.state->numeric().Save(&state);
  for (const stream::Window& window : skipped) {
    heddle::v1::DataWindow* saved = state.add_skipped();
    saved->set_first(static_cast<uint64_t>(window.first));
    saved->set_count(static_cast<uint64_t>(window.count));
  }
  return parts_.checkpointer->Stage(
      [this](checkpoint::Snapshot* snapshot) { return parts_.state->CopyTo(snapshot); }, state);
}

Status TrainLoop::Settle() {
  std::chrono::milliseconds pause{1};
  while (true) {
    parts_.control->NoteProgress(static_cast<uint64_t>(parts_.state->counters().step),
                                 Phase::kSave);
    Agreement agreement;
    parts_.checkpointer->Fill(&agreement);
    RETURN_IF_ERROR(agreement.Reach(parts_.group));
    if (agreement.Any(Slot::kFenced)) {
      return Aborted("a newer attempt exists");
    }
    parts_.checkpointer->Apply(agreement);
    if (!agreement.Any(Slot::kSaveBusy)) {
      return OkStatus();
    }
    std::this_thread::sleep_for(pause);
    pause = std::min(pause * 2, std::chrono::milliseconds{50});
  }
}

Status TrainLoop::SaveAndWait() {
  RETURN_IF_ERROR(Settle());
  const uint64_t step = static_cast<uint64_t>(parts_.state->counters().step);
  // All ranks saw the same commits, so all stage or none.
  if (parts_.checkpointer->stats().last_committed_step == step) {
    return OkStatus();
  }
  RETURN_IF_ERROR(Stage());
  RETURN_IF_ERROR(Settle());
  if (parts_.checkpointer->stats().last_committed_step != step) {
    return FailedPrecondition(Str("the checkpoint of step ", step, " was not committed"));
  }
  return OkStatus();
}

StatusOr<LoopEnd> TrainLoop::LeaveAfterSave(ExitCode code) {
  const Status saved = SaveAndWait();
  if (saved.ok()) {
    return LoopEnd{.code = code, .category = "", .detail = ""};
  }
  if (saved.code() == StatusCode::kAborted) {
    return LoopEnd{.code = ExitCode::kFenced, .category = "", .detail = Message(saved)};
  }
  if (saved.code() == StatusCode::kFailedPrecondition ||
      saved.code() == StatusCode::kResourceExhausted) {
    return LoopEnd{.code = ExitCode::kStorage, .category = "STORAGE", .detail = Message(saved)};
  }
  return saved;
}

Status TrainLoop::StartData() {
  stream::PrefetchOptions options;
  options.first_step = parts_.state->counters().data_position / parts_.plan->global_batch;
  options.global_batch_size = parts_.plan->global_batch;
  options.micro_batch_size = parts_.plan->micro_batch;
  options.rank = rank();
  options.world = world();
  if (parts_.spec->config().data().num_workers() > 0) {
    ASSIGN_OR_RETURN(prefetcher_, stream::Prefetcher::Create(parts_.data->train, options));
  }
  return OkStatus();
}

StatusOr<stream::PackedBatch> TrainLoop::NextBatch(int64_t micro_batch) {
  const int64_t step = parts_.state->counters().data_position / parts_.plan->global_batch;
  if (prefetcher_ != nullptr) {
    return prefetcher_->Next(step, micro_batch);
  }
  const stream::MicroBatchRange mine = stream::RankMicroBatches(
      parts_.plan->global_batch / parts_.plan->micro_batch, rank(), world());
  return stream::ReadMicroBatch(*parts_.data->train, step, parts_.plan->global_batch,
                                parts_.plan->micro_batch, mine.begin + micro_batch);
}

// A peer's death is seen at once; the deadline is for one that hangs (19.2).
void TrainLoop::TuneTimeout(double step_seconds) {
  slowest_recent_step_ = std::max(step_seconds, 0.95 * slowest_recent_step_);
  const std::chrono::milliseconds ten_steps(static_cast<int64_t>(slowest_recent_step_ * 10'000));
  parts_.group->SetTimeout(std::max(kStepTimeoutMin, ten_steps));
}

double TrainLoop::SecondsSince(int64_t begin) const {
  return static_cast<double>(parts_.clock->NowSteady() - begin) * 1e-9;
}

}  // namespace heddle::trainer
