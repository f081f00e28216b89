// Experts whose memory comes and goes are visited once a layer and turn for all micro-batches of a
// layer-major pass (training-runtime.md 7.3, formula (2)), with the bits of experts that are always
// there.
#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "model/store_views.h"
#include "tests/model/tiny_model.h"

namespace heddle::model {
namespace {

using layers::ExpertMemory;
using model_test::BatchData;

// All memory is there; gives it in another order, one expert and then two at a time.
class CountedVisits : public ExpertMemory {
 public:
  StatusOr<std::vector<int>> Begin(int layer, std::span<const int> experts, Use use) override {
    if (fails_at_ == begun_++) return DataLoss("a flipped bit");
    ++visits[{layer, use}];
    for (const int expert : experts) ++uses[{layer, use, expert}];
    left_ = experts.size();
    std::vector<int> order(experts.begin(), experts.end());
    std::reverse(order.begin(), order.end());
    return order;
  }
  StatusOr<size_t> Next() override {
    given_ = std::min<size_t>(left_, given_ % 2 + 1);
    left_ -= given_;
    return given_;
  }
  Status End() override { return OkStatus(); }
  void FailAt(int visit) { fails_at_ = visit; }

  std::map<std::pair<int, Use>, int> visits;
  std::map<std::tuple<int, Use, int>, int> uses;

 private:
  size_t left_ = 0;
  size_t given_ = 0;
  int begun_ = 0;
  int fails_at_ = -1;
};

heddle::v1::ModelConfig Config() {
  heddle::v1::ModelConfig config = model_test::TinyConfig(model_test::Kind::kHybrid, false);
  heddle::v1::MoeConfig* moe = config.mutable_moe();
  moe->set_n_experts(24);
  moe->set_top_k(2);
  moe->set_n_shared(1);
  moe->set_d_expert(12);
  moe->add_layers(0);
  moe->add_layers(2);
  moe->set_router(heddle::v1::MoeConfig::ROUTER_SIGMOID);
  moe->set_bias_update_rate(0.01);
  moe->set_aux_loss(0.01);
  moe->set_capacity_factor(1.5);
  return config;
}

std::vector<BatchData> Batches() {
  std::vector<BatchData> batches;
  batches.push_back(model_test::RandomBatch({9, 0, 3}, 37, 1));
  batches.push_back(model_test::RandomBatch({17}, 37, 2));
  batches.emplace_back();  // no token
  batches.push_back(model_test::RandomBatch({1, 1, 5}, 37, 3));
  return batches;
}

struct Outcome {
  Status status;
  double loss = 0;
  double balance = 0;
  int64_t dropped = 0;
  std::vector<float> gradients;
  std::vector<double> statistics;
};

// `together`: one pass over the units for all batches.
Outcome Train(Precision precision, Recompute recompute, ExpertMemory* memory, bool together) {
  const heddle::v1::ModelConfig config = Config();
  const std::unique_ptr<ParameterStore> store =
      *ParameterStore::Create(*PlanModel(config), precision);
  InitParameters(7, store.get());
  ModelMemory views = MemoryOf(*store);
  views.experts.memory = memory;
  const std::unique_ptr<LanguageModel> model =
      *LanguageModel::Create(config, views, {.recompute = recompute});
  store->ZeroGradients();
  const std::vector<BatchData> batches = Batches();
  std::vector<PackedBatch> all;
  for (const BatchData& batch : batches) all.push_back(batch.view());
  layers::StepInfo step{.loss_scale = 0.1, .row_scale = 0.05};
  Outcome outcome;
  for (size_t first = 0; first < all.size(); first += together ? all.size() : 1) {
    const StatusOr<LossSum> sum = model->ForwardBackward(
        std::span<const PackedBatch>(all).subspan(first, together ? all.size() : 1), step);
    if (!sum.ok()) {
      outcome.status = sum.status();
      return outcome;
    }
    outcome.loss += sum->loss;
    outcome.balance += sum->layers.balance;
    outcome.dropped += sum->counts.dropped;
    step.first_token += static_cast<int64_t>(all[first].input_ids.size());
  }
  outcome.gradients.assign(store->gradients().begin(), store->gradients().end());
  outcome.statistics.assign(model->statistics().begin(), model->statistics().end());
  return outcome;
}

class ExpertVisits : public testing::TestWithParam<std::pair<Precision, Recompute>> {};

TEST_P(ExpertVisits, OneForAllMicroBatchesAndTheSameBits) {
  const auto [precision, recompute] = GetParam();
  const Outcome expected = Train(precision, recompute, nullptr, true);
  ASSERT_TRUE(expected.status.ok());
  EXPECT_GT(expected.dropped, 0) << "the capacity drops nothing";
  CountedVisits merged;
  const Outcome got = Train(precision, recompute, &merged, true);
  EXPECT_EQ(got.loss, expected.loss);
  EXPECT_EQ(got.balance, expected.balance);
  EXPECT_EQ(got.dropped, expected.dropped);
  EXPECT_EQ(got.statistics, expected.statistics);
  EXPECT_EQ(got.gradients, expected.gradients);
  const int forwards = recompute == Recompute::kNone ? 1 : 2;
  for (const int layer : {0, 2}) {
    EXPECT_EQ((merged.visits[{layer, ExpertMemory::Use::kForward}]), forwards);
    EXPECT_EQ((merged.visits[{layer, ExpertMemory::Use::kBackward}]), 1);
  }
  for (const auto& [use, count] : merged.uses) {
    EXPECT_EQ(count, std::get<1>(use) == ExpertMemory::Use::kForward ? forwards : 1);
  }
  // A pass for each micro-batch visits an expert as often as it has tokens.
  CountedVisits apart;
  EXPECT_EQ(Train(precision, recompute, &apart, false).gradients.size(), got.gradients.size());
  EXPECT_EQ((apart.visits[{0, ExpertMemory::Use::kBackward}]), 4);
  EXPECT_LE(merged.uses.size(), apart.uses.size());
}

INSTANTIATE_TEST_SUITE_P(Ways, ExpertVisits,
                         testing::Values(std::pair(Precision::kFp32, Recompute::kNone),
                                         std::pair(Precision::kBf16, Recompute::kNone),
                                         std::pair(Precision::kBf16, Recompute::kSelective),
                                         std::pair(Precision::kFp32, Recompute::kFull),
                                         std::pair(Precision::kBf16, Recompute::kFull)));

// Whichever visit it is: two layers forward and back, and forward again where the backward redoes.
TEST(ExpertVisits, AVisitThatFailsEndsThePass) {
  for (const Recompute recompute : {Recompute::kNone, Recompute::kSelective, Recompute::kFull}) {
    const int visits = recompute == Recompute::kNone ? 4 : 6;
    for (int visit = 0; visit < visits; ++visit) {
      CountedVisits memory;
      memory.FailAt(visit);
      const Outcome got = Train(Precision::kFp32, recompute, &memory, true);
      EXPECT_EQ(got.status.code(), StatusCode::kDataLoss)
          << "visit " << visit << " recompute " << static_cast<int>(recompute);
    }
    CountedVisits memory;
    memory.FailAt(visits);
    EXPECT_TRUE(Train(Precision::kFp32, recompute, &memory, true).status.ok());
  }
}

}  // namespace
}  // namespace heddle::model
