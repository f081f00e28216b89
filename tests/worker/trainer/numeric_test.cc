// A number that is not finite in ONE rank - in its gradients, its parameters, a sequence that only
// it reads - under every policy: one verdict on all ranks, no such checkpoint, and after a rollback
// the run comes where an undamaged one comes (training-runtime.md 16, 20.10).
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>

#include "checkpoint/tensor_io/load.h"
#include "tests/support/status_matchers.h"
#include "tests/support/worker/disk_dir.h"
#include "tests/worker/trainer/job.h"
#include "tests/worker/trainer/rank_threads.h"

namespace heddle::trainer {
namespace {

using heddle::v1::CheckpointRecord;
using heddle::v1::ParallelConfig;
using heddle::v1::TrainingConfig;

constexpr int64_t kSteps = 60;
constexpr int64_t kBatch = 8;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

enum class Where { kGradient, kParameter, kBatch };

struct Case {
  TrainingConfig::NanPolicy policy = TrainingConfig::NAN_POLICY_HALT;
  Where where = Where::kGradient;
  ParallelConfig::Shard shard = ParallelConfig::SHARD_NONE;
  int ranks = 2;
  int victim = 1;
  int64_t step = 23;  // of the first one, from 0
};

std::string NameOf(const testing::TestParamInfo<Case>& info) {
  const Case& c = info.param;
  const char* policies[] = {"halt", "skip", "rollback"};
  const char* places[] = {"gradient", "parameter", "batch"};
  const char* shards[] = {"none", "optimizer", "full"};
  return Str(policies[c.policy], "_", places[static_cast<int>(c.where)], "_", shards[c.shard], "_",
             c.ranks, "_ranks_victim_", c.victim, "_step_", c.step);
}

heddle::v1::RunConfig ConfigOf(const Case& c) {
  heddle::v1::RunConfig config = SmallConfig(c.ranks, kSteps);
  config.mutable_data()->set_eval_path(DataFolder() + "/eval");
  config.mutable_training()->set_eval_interval(kSteps);
  config.mutable_training()->set_nan_policy(c.policy);
  config.mutable_parallel()->set_shard(c.shard);
  config.mutable_data()->set_num_workers(0);
  return config;
}

// A weight of the last unit, which every token meets, of what the rank computes with in fp32; and
// back.
class Weight {
 public:
  void Damage(RunState* state) {
    float& weight = Place(state);
    if (!std::isnan(weight)) good_ = weight;
    weight = kNan;
    damaged_ = true;
  }
  void Repair(RunState* state) {
    if (damaged_) Place(state) = good_;
    damaged_ = false;
  }

 private:
  static float& Place(RunState* state) {
    shard::Held held;
    EXPECT_OK(state->parameters()->ForEachHeld(shard::Touch::kUpdate, [&](const shard::Held& next) {
      held = next;  // the last one
      return OkStatus();
    }));
    const int64_t unit = state->parameters()->plan().units.back().offset;
    return held.master[static_cast<size_t>(std::max<int64_t>(0, unit - held.range.begin))];
  }

  float good_ = 0;
  bool damaged_ = false;
};

// `steps` steps in a row.
Injection Break(const Case& c, int64_t steps, Weight* weight) {
  Injection injection;
  const auto hit = [c, steps](int rank, int64_t step) {
    return rank == c.victim && step >= c.step && step < c.step + steps;
  };
  switch (c.where) {
    case Where::kGradient:
      injection.gradients = [hit](int rank, int64_t step, std::span<float> gradients) {
        if (hit(rank, step)) gradients[gradients.size() / 2] = kNan;
      };
      break;
    case Where::kParameter:
      // Once: it stays until a checkpoint is loaded.
      injection.parameters = [c, weight](int rank, int64_t step, RunState* state) {
        if (rank == c.victim && step == c.step) weight->Damage(state);
      };
      break;
    case Where::kBatch: {
      // A sequence of each of these steps that the victim reads: the model's numbers break with it
      // and only with it, in whatever attempt.
      std::set<int64_t> poison;
      for (int64_t i = 0; i < steps; ++i) {
        poison.insert((c.step + i) * kBatch + c.victim * kBatch / c.ranks);
      }
      injection.sequence = [c, poison, weight](int rank, int64_t index, RunState* state) {
        if (rank != c.victim) return;
        if (poison.contains(index)) {
          weight->Damage(state);
        } else if (index % 2 == 0) {  // another micro-batch of two begins
          weight->Repair(state);
        }
      };
      break;
    }
  }
  return injection;
}

// Every rank ended alike; the words that all said.
LoopEnd OneVerdict(const AttemptResult& result, ExitCode code) {
  EXPECT_OK(result.ends[0].status());
  if (!result.ends[0].ok()) return {};
  const LoopEnd& first = *result.ends[0];
  for (const StatusOr<LoopEnd>& end : result.ends) {
    EXPECT_OK(end.status());
    if (!end.ok()) continue;
    EXPECT_EQ(static_cast<int>(end->code), static_cast<int>(code)) << end->detail;
    EXPECT_EQ(end->detail, first.detail);
    EXPECT_EQ(end->rollback_to_step, first.rollback_to_step);
    EXPECT_EQ(end->skip.first, first.skip.first);
    EXPECT_EQ(end->skip.count, first.skip.count);
  }
  return first;
}

using Values = std::map<std::string, std::vector<float>>;  // by tensor and class

// All that a checkpoint holds.
Values Load(const CheckpointRecord& record, const std::string& root) {
  Values values;
  std::vector<checkpoint::WantedRange> wanted;
  for (const heddle::v1::TensorInfo& tensor : record.tensors()) {
    uint64_t elements = 1;
    for (const int64_t size : tensor.shape()) elements *= static_cast<uint64_t>(size);
    for (const int tensor_class : tensor.classes()) {
      std::vector<float>& part = values[Str(tensor.name(), " class ", tensor_class)];
      part.assign(elements, kNan);
      wanted.push_back({.name = tensor.name(),
                        .shape = {tensor.shape().begin(), tensor.shape().end()},
                        .tensor_class = static_cast<heddle::v1::TensorClass>(tensor_class),
                        .first = 0,
                        .count = elements,
                        .data = part.data()});
    }
  }
  EXPECT_OK(checkpoint::LoadRanges(record, root, wanted));
  return values;
}

// Every checkpoint is whole, and every value of it is a number.
void ExpectFinite(const AttemptResult& result, const std::string& root) {
  for (const CheckpointRecord& record : result.committed) {
    ExpectGood(record, root);
    for (const auto& [name, part] : Load(record, root)) {
      EXPECT_TRUE(std::all_of(part.begin(), part.end(), [](float v) { return std::isfinite(v); }))
          << name << " of step " << record.step();
    }
  }
}

double FinalEval(const AttemptResult& result) {
  const auto last = result.points.find(static_cast<uint64_t>(kSteps));
  EXPECT_NE(last, result.points.end());
  return last == result.points.end() ? 0 : last->second.eval_loss();
}

// Of a run that nothing damages.
double CleanEval(const Case& c) {
  static std::map<int, double> known;
  const int key = c.ranks;
  if (!known.contains(key)) {
    const checkpoint::TempDir folder;
    Case clean = c;
    clean.policy = TrainingConfig::NAN_POLICY_HALT;
    const AttemptResult result =
        RunAttempt({.config = ConfigOf(clean), .root = folder.path(), .injection = {}});
    OneVerdict(result, ExitCode::kDone);
    known[key] = FinalEval(result);
  }
  return known[key];
}

void ExpectNames(const Case& c, const std::string& detail, int64_t steps_done) {
  EXPECT_NE(detail.find(Str("step ", steps_done, ": ")), std::string::npos) << detail;
  EXPECT_NE(detail.find("not finite, first in "), std::string::npos) << detail;
  EXPECT_NE(detail.find("sequences "), std::string::npos) << detail;
  // A loss tells its rank and micro-batch; of a sum of gradients nobody knows whose share it was.
  if (c.where == Where::kBatch && c.shard == ParallelConfig::SHARD_NONE) {
    const int64_t first = (steps_done - 1) * kBatch + c.victim * kBatch / c.ranks;
    EXPECT_NE(detail.find(Str("on rank ", c.victim, ", sequences ", first, " to ", first + 1)),
              std::string::npos)
        << detail;
  }
}

class NotFinite : public testing::TestWithParam<Case> {
 protected:
  NotFinite() : input_{.config = ConfigOf(GetParam()), .root = folder_.path(), .injection = {}} {}

  // The next attempt, with so many bad steps.
  AttemptResult Run(int64_t steps) {
    input_.injection = Break(GetParam(), steps, &weight_);
    ++input_.fence;
    const AttemptResult result = RunAttempt(input_);
    ExpectFinite(result, input_.root);
    return result;
  }
  void Halts();
  void SkipsTwo();
  void HaltsAfterThree();
  void RollsBackAfterThree();
  // What the coordinator does next (coordinator/state/rollback.h).
  AttemptInput After(const LoopEnd& end, const AttemptResult& first) const;
  void ExpectGoesOn(const LoopEnd& end, const AttemptResult& first);

  const checkpoint::TempDir folder_;
  Weight weight_;
  AttemptInput input_;
};

void NotFinite::Halts() {
  const Case c = GetParam();
  const LoopEnd end = OneVerdict(Run(1), ExitCode::kNumeric);
  EXPECT_EQ(end.category, "NUMERIC");
  ExpectNames(c, end.detail, c.step + 1);
}

void NotFinite::SkipsTwo() {
  const Case c = GetParam();
  // The one save that falls due does so at the first bad step, and is made after the second.
  input_.config.mutable_checkpoint()->set_save_interval(static_cast<int32_t>(c.step) + 1);
  const AttemptResult result = Run(2);
  OneVerdict(result, ExitCode::kDone);
  EXPECT_TRUE(std::isnan(result.points.at(static_cast<uint64_t>(c.step) + 1).grad_norm()));
  for (const auto& [at, point] : result.points) {  // of this step, as skipped_spikes
    const int64_t before = static_cast<int64_t>(at) - 1;
    EXPECT_EQ(point.skipped_nonfinite(), before == c.step || before == c.step + 1 ? 1u : 0u) << at;
  }
  ASSERT_FALSE(result.committed.empty());
  EXPECT_EQ(result.committed.front().step(), static_cast<uint64_t>(c.step) + 3)
      << "a save amid steps that are not finite waits for one that is";
  EXPECT_EQ(result.committed.back().train_state().updates(), static_cast<uint64_t>(kSteps) - 2);
  EXPECT_NEAR(FinalEval(result) / CleanEval(c), 1, 0.01);
}

void NotFinite::HaltsAfterThree() {
  const Case c = GetParam();
  const LoopEnd end = OneVerdict(Run(3), ExitCode::kNumeric);
  EXPECT_NE(end.detail.find("3 steps in a row"), std::string::npos) << end.detail;
  ExpectNames(c, end.detail, c.step + 3);
}

void NotFinite::RollsBackAfterThree() {
  const Case c = GetParam();
  const AttemptResult first = Run(3);
  const LoopEnd end = OneVerdict(first, ExitCode::kRollBack);
  EXPECT_EQ(end.category, "ROLLBACK");
  ExpectNames(c, end.detail, c.step + 3);
  EXPECT_EQ(end.rollback_to_step, c.step);
  EXPECT_EQ(end.skip.first, c.step * kBatch);
  EXPECT_EQ(end.skip.count, 3 * kBatch);
  ExpectGoesOn(end, first);
}

AttemptInput NotFinite::After(const LoopEnd& end, const AttemptResult& first) const {
  AttemptInput again = input_;
  ++again.fence;
  for (const CheckpointRecord& record : first.committed) {
    if (static_cast<int64_t>(record.step()) <= end.rollback_to_step) {
      again.restore.insert(again.restore.begin(), record);
    }
  }
  heddle::v1::DataWindow& window = again.skipped.emplace_back();
  window.set_first(static_cast<uint64_t>(end.skip.first));
  window.set_count(static_cast<uint64_t>(end.skip.count));
  // Bad data are still bad; a fault of the machine has passed.
  if (GetParam().where != Where::kBatch) again.injection = {};
  return again;
}

void NotFinite::ExpectGoesOn(const LoopEnd& end, const AttemptResult& first) {
  const Case c = GetParam();
  const AttemptInput again = After(end, first);
  ASSERT_FALSE(again.restore.empty());
  const AttemptResult second = RunAttempt(again);
  OneVerdict(second, ExitCode::kDone);
  ExpectFinite(second, again.root);
  EXPECT_LE(second.start_step, static_cast<uint64_t>(end.rollback_to_step));
  EXPECT_EQ(second.points.begin()->first, second.start_step + 1) << "steps appear again";
  EXPECT_EQ(second.points.rbegin()->second.skipped_nonfinite(), 0u);
  const heddle::v1::TrainState& last = second.committed.back().train_state();
  EXPECT_EQ(last.data_position(), static_cast<uint64_t>((kSteps + 3) * kBatch));
  ASSERT_EQ(last.skipped_size(), 1);
  EXPECT_EQ(last.skipped(0).first(), again.skipped[0].first());
  // The same batches as the first time up to the window, then those after it.
  for (const auto& [step, point] : first.points) {
    const auto repeated = second.points.find(step);
    if (repeated == second.points.end()) continue;
    EXPECT_EQ(point.batch_hash() == repeated->second.batch_hash(),
              static_cast<int64_t>(step) <= c.step)
        << "step " << step;
  }
  EXPECT_NEAR(FinalEval(second) / CleanEval(c), 1, 0.01);
}

TEST_P(NotFinite, IsHandledAlikeOnAllRanksAsThePolicySays) {
  const Case c = GetParam();
  switch (c.policy) {
    case TrainingConfig::NAN_POLICY_HALT:
      return Halts();
    case TrainingConfig::NAN_POLICY_SKIP:
      // Parameters stay damaged: there are never two bad steps only.
      if (c.where != Where::kParameter) SkipsTwo();
      return HaltsAfterThree();
    case TrainingConfig::NAN_POLICY_ROLLBACK:
      return RollsBackAfterThree();
  }
}

std::vector<Case> Twenty() {
  std::vector<Case> cases;
  for (const auto policy : {TrainingConfig::NAN_POLICY_HALT, TrainingConfig::NAN_POLICY_SKIP,
                            TrainingConfig::NAN_POLICY_ROLLBACK}) {
    for (const Where where : {Where::kGradient, Where::kParameter, Where::kBatch}) {
      for (const auto shard : {ParallelConfig::SHARD_NONE, ParallelConfig::SHARD_FULL}) {
        const int64_t number = static_cast<int64_t>(cases.size());
        cases.push_back({.policy = policy,
                         .where = where,
                         .shard = shard,
                         .ranks = 2,
                         .victim = static_cast<int>(number % 2),
                         .step = 15 + number});
      }
    }
  }
  for (const Where where : {Where::kGradient, Where::kParameter}) {
    cases.push_back({.policy = TrainingConfig::NAN_POLICY_ROLLBACK,
                     .where = where,
                     .shard = ParallelConfig::SHARD_OPTIMIZER,
                     .ranks = 4,
                     .victim = 2,
                     .step = 36});
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(OneRank, NotFinite, testing::ValuesIn(Twenty()), NameOf);

struct RunOfExperts {
  std::map<uint64_t, heddle::v1::MetricPoint> points;
  Values values;  // of the newest checkpoint
};

// To the end of the job: as many attempts as the policy makes of it.
RunOfExperts RunWithExperts(const Case& c, const std::string& spill_dir) {
  const checkpoint::TempDir folder;
  AttemptInput input{.config = ConfigOf(c), .root = folder.path(), .injection = {}};
  heddle::v1::MoeConfig* moe = input.config.mutable_model()->mutable_moe();
  moe->set_n_experts(8);
  moe->set_top_k(2);
  moe->set_d_expert(64);
  moe->set_router(heddle::v1::MoeConfig::ROUTER_SIGMOID);
  moe->set_bias_update_rate(0.01);
  input.config.mutable_parallel()->set_expert(c.ranks);
  if (!spill_dir.empty()) {
    heddle::v1::ExpertOffloadingConfig* offloading =
        input.config.mutable_memory()->mutable_expert_offloading();
    offloading->set_enabled(true);
    offloading->set_resident_mb(1);
    offloading->set_spill_dir(spill_dir);
  }
  Weight weight;
  input.injection = Break(c, c.policy == TrainingConfig::NAN_POLICY_SKIP ? 2 : 3, &weight);
  AttemptResult first = RunAttempt(input);
  if (c.policy == TrainingConfig::NAN_POLICY_SKIP) {
    OneVerdict(first, ExitCode::kDone);
    return {first.points, Load(first.committed.back(), folder.path())};
  }
  const LoopEnd end = OneVerdict(first, ExitCode::kRollBack);
  AttemptInput again = input;
  ++again.fence;
  again.injection = {};
  for (const CheckpointRecord& record : first.committed) {
    if (static_cast<int64_t>(record.step()) <= end.rollback_to_step) {
      again.restore.insert(again.restore.begin(), record);
    }
  }
  AttemptResult second = RunAttempt(again);
  OneVerdict(second, ExitCode::kDone);
  second.points.merge(first.points);
  return {second.points, Load(second.committed.back(), folder.path())};
}

// A bad step is no step for offloaded experts either: their gradients, measured or still on their
// way, go with it, and what was written for it must not be met again.
TEST(NotFiniteExperts, OffloadedOnesComeWhereThoseInMemoryCome) {
  for (const auto policy : {TrainingConfig::NAN_POLICY_SKIP, TrainingConfig::NAN_POLICY_ROLLBACK}) {
    SCOPED_TRACE(static_cast<int>(policy));
    const Case c{.policy = policy, .shard = ParallelConfig::SHARD_FULL, .victim = 0};
    const test::DiskDir spill;
    const RunOfExperts resident = RunWithExperts(c, "");
    const RunOfExperts offloaded = RunWithExperts(c, spill.path());
    ExpectSameBits(resident.points, offloaded.points);
    EXPECT_EQ(resident.values.size(), offloaded.values.size());
    for (const auto& [name, part] : resident.values) {
      EXPECT_EQ(part, offloaded.values.at(name)) << name;
    }
    const auto& use = offloaded.points.rbegin()->second.offload();
    EXPECT_GT(use.evictions(), 0u) << "everything fitted";
    EXPECT_TRUE(std::isnan(resident.points.at(static_cast<uint64_t>(c.step) + 1).grad_norm()) ||
                policy == TrainingConfig::NAN_POLICY_ROLLBACK);
  }
}

// Gradients that are far too large, with numbers that are finite.
Injection Jump(int64_t step) {
  Injection injection;
  injection.gradients = [step](int rank, int64_t now, std::span<float> gradients) {
    if (rank != 1 || now != step) return;
    for (float& gradient : gradients) gradient *= 1e6f;
  };
  return injection;
}

TEST(Spike, IsSkippedOrRolledBackAndHaltDoesNotLook) {
  Case c;
  const int64_t step = 43;
  const checkpoint::TempDir folder;
  AttemptInput input{.config = ConfigOf(c), .root = folder.path(), .injection = Jump(step)};
  const AttemptResult halt = RunAttempt(input);
  OneVerdict(halt, ExitCode::kDone);
  EXPECT_FALSE(halt.points.at(static_cast<uint64_t>(step) + 1).has_skipped_spikes());

  input.fence = 2;
  input.config.mutable_training()->set_nan_policy(TrainingConfig::NAN_POLICY_SKIP);
  const AttemptResult skip = RunAttempt(input);
  OneVerdict(skip, ExitCode::kDone);
  for (const auto& [at, point] : skip.points) {
    EXPECT_EQ(point.skipped_spikes(), static_cast<int64_t>(at) == step + 1 ? 1u : 0u) << at;
    EXPECT_EQ(point.skipped_nonfinite(), 0u) << at << ": a spike is finite";
  }
  EXPECT_EQ(skip.committed.back().train_state().updates(), static_cast<uint64_t>(kSteps) - 1);
  EXPECT_NEAR(FinalEval(skip) / CleanEval(c), 1, 0.01);

  input.fence = 3;
  input.config.mutable_training()->set_nan_policy(TrainingConfig::NAN_POLICY_ROLLBACK);
  const LoopEnd end = OneVerdict(RunAttempt(input), ExitCode::kRollBack);
  EXPECT_EQ(end.rollback_to_step, step);
  EXPECT_EQ(end.skip.first, step * kBatch);
  EXPECT_EQ(end.skip.count, kBatch);
  EXPECT_NE(end.detail.find("gradient norm"), std::string::npos) << end.detail;
}

// The window is state: stopped before the spike and resumed, the run decides alike, bit for bit.
TEST(Spike, AResumedRunDecidesAsAnUndisturbedOne) {
  Case c;
  c.policy = TrainingConfig::NAN_POLICY_SKIP;
  const checkpoint::TempDir folder;
  AttemptInput input{.config = ConfigOf(c), .root = folder.path(), .injection = Jump(43)};
  const AttemptResult whole = RunAttempt(input);
  OneVerdict(whole, ExitCode::kDone);
  for (const CheckpointRecord& record : whole.committed) {
    if (record.step() < 35 || record.step() >= static_cast<uint64_t>(kSteps)) continue;
    SCOPED_TRACE(record.step());
    AttemptInput again = input;
    again.fence = 10 + record.step();
    again.restore = {record};
    const AttemptResult rest = RunAttempt(again);
    OneVerdict(rest, ExitCode::kDone);
    EXPECT_EQ(rest.start_step, record.step());
    for (const auto& [step, point] : rest.points) {
      EXPECT_EQ(point.loss(), whole.points.at(step).loss()) << step;
      EXPECT_EQ(point.grad_norm(), whole.points.at(step).grad_norm()) << step;
      EXPECT_EQ(point.skipped_spikes(), whole.points.at(step).skipped_spikes()) << step;
    }
    const heddle::v1::TrainState& a = rest.committed.back().train_state();
    const heddle::v1::TrainState& b = whole.committed.back().train_state();
    ASSERT_EQ(a.recent_losses_size(), b.recent_losses_size());
    for (int i = 0; i < a.recent_losses_size(); ++i) {
      EXPECT_EQ(a.recent_losses(i), b.recent_losses(i));
      EXPECT_EQ(a.recent_norms(i), b.recent_norms(i));
    }
  }
}

}  // namespace
}  // namespace heddle::trainer
