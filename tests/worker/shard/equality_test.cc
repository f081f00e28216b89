// Every way to shard, accumulate and recompute gives the parameters of one process that holds
// everything and adds the ranks' gradients in ascending order, bit for bit (training-runtime.md
// 20.1, 20.2). Five micro-batches, so that ranks have different numbers of them, or none.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <map>
#include <thread>
#include <tuple>

#include "data/stream/sequence_stream.h"
#include "model/optim/gradient_norm.h"
#include "model/optim/optimizer.h"
#include "tests/model/tiny_model.h"
#include "tests/support/status_matchers.h"
#include "tests/worker/comm/fake_rendezvous.h"
#include "worker/shard/parameters.h"

namespace heddle::shard {
namespace {

using model::Precision;
using model::Recompute;
using model_test::BatchData;
using model_test::Kind;
using model_test::RandomBatch;
using model_test::TinyConfig;

constexpr int kSteps = 3;
constexpr int kMicroBatches = 5;
constexpr uint64_t kSeed = 7;

struct Case {
  Options options;  // rank and world are set by the run
  int world = 1;
  Recompute recompute = Recompute::kNone;
  heddle::v1::ModelConfig config = TinyConfig(Kind::kHybrid, false);
  double clip = 1e9;
};

using Values = std::vector<float>;  // masters of the whole model

const BatchData& MicroBatch(int step, int m) {
  static const std::vector<BatchData> all = [] {
    std::vector<BatchData> batches;
    for (int i = 0; i < kSteps * kMicroBatches; ++i) {
      batches.push_back(RandomBatch({7 + i % 3, 0, 1, 4 + i % 5}, 37, static_cast<uint64_t>(i)));
    }
    return batches;
  }();
  return all[static_cast<size_t>(step * kMicroBatches + m)];
}

layers::StepInfo InfoOf(int step) {
  layers::StepInfo info;
  info.step = step;
  info.seed = kSeed;
  int64_t labels = 0;
  int64_t rows = 0;
  for (int m = 0; m < kMicroBatches; ++m) {
    const BatchData& batch = MicroBatch(step, m);
    labels += std::count_if(batch.labels.begin(), batch.labels.end(),
                            [](int64_t label) { return label != model::kIgnoredLabel; });
    rows += static_cast<int64_t>(batch.ids.size());
  }
  info.loss_scale = 1.0 / static_cast<double>(labels);
  info.row_scale = 1.0 / static_cast<double>(rows);
  return info;
}

int PassesOf(int world) { return (kMicroBatches + world - 1) / world; }

// The batches of one pass of a rank; an empty one where it has none left.
std::vector<model::PackedBatch> PassOf(const Case& c, int step, int rank, int pass) {
  const stream::MicroBatchRange mine = stream::RankMicroBatches(kMicroBatches, rank, c.world);
  const bool all = c.options.accumulation == Accumulation::kLayerMajor;
  std::vector<model::PackedBatch> batches;
  for (int64_t m = mine.begin + pass;
       m < (all ? mine.end : std::min(mine.end, mine.begin + pass + 1)); ++m) {
    batches.push_back(MicroBatch(step, static_cast<int>(m)).view());
  }
  static const BatchData nothing;
  if (batches.empty()) batches.push_back(nothing.view());
  return batches;
}

optim::StepArgs ArgsOf(const Case& c, int step, double squares) {
  optim::StepArgs args;
  args.update = step + 1;
  args.learning_rate = 0.01;
  args.grad_scale = optim::ClipDivisor(std::sqrt(squares), c.clip);
  return args;
}

// Adds `from` to `to`, or takes its place where `to` is empty.
void Add(const std::span<const float> from, Values* to) {
  if (to->empty()) {
    to->assign(from.begin(), from.end());
    return;
  }
  for (size_t i = 0; i < from.size(); ++i) (*to)[i] += from[i];
}

// What one process computes that plays all ranks one after the other.
Values Reference(const Case& c) {
  model_test::Built built = model_test::Build(c.config, c.options.precision, {}, kSeed);
  const model::ModelPlan& plan = built.store->plan();
  const optim::Hyperparameters hyper;
  const std::vector<optim::GroupRange> groups = optim::GroupsOf(plan, hyper);
  Values m(static_cast<size_t>(plan.flat_elements), 0.0f);
  Values v = m;
  for (int step = 0; step < kSteps; ++step) {
    const bool each = c.options.accumulation == Accumulation::kSyncEach;
    Values sum;
    for (int pass = 0; pass < (each ? PassesOf(c.world) : 1); ++pass) {
      Values over_ranks;
      for (int rank = 0; rank < c.world; ++rank) {
        built.store->ZeroGradients();
        for (int p = pass; p < (each ? pass + 1 : PassesOf(c.world)); ++p) {
          Case single = c;
          single.options.accumulation = Accumulation::kSyncEach;
          EXPECT_OK(built.model->ForwardBackward(PassOf(single, step, rank, p), InfoOf(step)));
        }
        Add(built.store->gradients(), &over_ranks);
      }
      Add(over_ranks, &sum);
    }
    double squares = 0;
    for (const float g : sum) squares += double{g} * double{g};
    std::copy(sum.begin(), sum.end(), built.store->gradients().begin());
    optim::OptimizerStep(hyper, groups, ArgsOf(c, step, squares),
                         {.flat_offset = 0,
                          .master = built.store->master(),
                          .m = m,
                          .v = v,
                          .gradient = built.store->gradients(),
                          .compute_bf16 = built.store->compute_bf16()});
  }
  return {built.store->master().begin(), built.store->master().end()};
}

struct Outcome {
  int64_t gathered_bytes = 0;
  Values masters;          // after the last step
  Values first_gradients;  // sums over ranks of step 0
};

// One rank's run; writes what it holds into `out`.
Status RunRank(const Case& c, comm::Communicator* group, Outcome* out) {
  ASSIGN_OR_RETURN(const model::ModelPlan plan, model::PlanModel(c.config));
  Options options = c.options;
  options.rank = group->rank();
  options.world = c.world;
  ASSIGN_OR_RETURN(const std::unique_ptr<Parameters> parameters, MakeParameters(plan, options));
  parameters->Connect(group);
  InitParameters(kSeed, parameters.get());
  model::LanguageModelOptions model_options;
  model_options.recompute = c.recompute;
  ASSIGN_OR_RETURN(const std::unique_ptr<model::LanguageModel> model,
                   model::LanguageModel::Create(c.config, parameters->memory(), model_options));
  const optim::Hyperparameters hyper;
  const std::vector<optim::GroupRange> groups = optim::GroupsOf(plan, hyper);
  Values m(static_cast<size_t>(parameters->owned_elements()), 0.0f);
  Values v = m;
  const int passes = options.accumulation == Accumulation::kLayerMajor ? 1 : PassesOf(c.world);
  for (int step = 0; step < kSteps; ++step) {
    parameters->BeginStep();
    for (int pass = 0; pass < passes; ++pass) {
      RETURN_IF_ERROR(
          model->ForwardBackward(PassOf(c, step, options.rank, pass), InfoOf(step),
                                 parameters->Hooks({.train = true, .last = pass + 1 == passes})));
    }
    RETURN_IF_ERROR(parameters->FinishGradients());
    double squares = 0;
    for (const Measured& slice : parameters->measured()) {
      squares += optim::MeasureGradients(slice.gradient).sum_of_squares;
    }
    RETURN_IF_ERROR(group->AllReduceSum(std::span<double>(&squares, 1)));
    for (const Held& held : parameters->held()) {
      if (step == 0) {
        std::copy(held.gradient.begin(), held.gradient.end(),
                  out->first_gradients.begin() + held.range.begin);
      }
      const size_t offset = static_cast<size_t>(held.owned_offset);
      const size_t size = held.master.size();
      optim::OptimizerStep(hyper, groups, ArgsOf(c, step, squares),
                           {.flat_offset = held.range.begin,
                            .master = held.master,
                            .m = std::span<float>(m).subspan(offset, size),
                            .v = std::span<float>(v).subspan(offset, size),
                            .gradient = held.gradient,
                            .compute_bf16 = held.compute_bf16});
    }
    parameters->Updated();
    // A forward between two steps: gathers, and changes nothing.
    RETURN_IF_ERROR(model->Evaluate(MicroBatch(step, 0).view(), InfoOf(step),
                                    parameters->Hooks({.train = false})));
  }
  out->gathered_bytes = parameters->gathered_bytes();
  for (const Held& held : parameters->held()) {
    std::copy(held.master.begin(), held.master.end(), out->masters.begin() + held.range.begin);
  }
  return OkStatus();
}

StatusOr<std::unique_ptr<comm::Communicator>> Connect(comm::FakeRendezvous* server, int rank,
                                                      int world) {
  if (world == 1) return comm::MakeSolo();
  comm::GroupOptions options;
  options.rank = rank;
  options.world_size = world;
  options.data_address = "127.0.0.1";
  options.key_prefix = "shard/";
  options.rendezvous =
      [server, rank](
          const heddle::v1::RendezvousRequest& request) -> StatusOr<heddle::v1::RendezvousReply> {
    return server->Answer(static_cast<uint32_t>(rank), request);
  };
  options.init_timeout = std::chrono::milliseconds(20000);
  options.step_timeout = std::chrono::milliseconds(20000);
  return comm::ConnectGloo(options);
}

// The ranks' groups of a world, made once: connecting takes longer than a case.
const std::vector<std::unique_ptr<comm::Communicator>>& GroupsOf(int world) {
  static std::map<int, std::vector<std::unique_ptr<comm::Communicator>>> all;
  static std::map<int, comm::FakeRendezvous> servers;
  auto& groups = all[world];
  if (!groups.empty()) return groups;
  comm::FakeRendezvous* server = &servers[world];
  groups.resize(static_cast<size_t>(world));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < world; ++rank) {
    threads.emplace_back([&groups, server, rank, world] {
      auto group = Connect(server, rank, world);
      ASSERT_OK(group.status());
      groups[static_cast<size_t>(rank)] = *std::move(group);
    });
  }
  for (std::thread& thread : threads) thread.join();
  return groups;
}

// What one rank holds is 0 with the others, or they all hold the same.
void Merge(const Values& from, Values* to) {
  for (size_t i = 0; i < to->size(); ++i) (*to)[i] = (*to)[i] == 0.0f ? from[i] : (*to)[i];
}

Outcome RunOnRanks(const Case& c) {
  const model::ModelPlan plan = *model::PlanModel(c.config);
  const Values zero(static_cast<size_t>(plan.flat_elements), 0.0f);
  std::vector<Outcome> found(static_cast<size_t>(c.world), Outcome{0, zero, zero});
  const auto& groups = GroupsOf(c.world);
  std::vector<std::thread> threads;
  for (int rank = 0; rank < c.world; ++rank) {
    threads.emplace_back([&, rank] {
      const size_t r = static_cast<size_t>(rank);
      ASSERT_OK(RunRank(c, groups[r].get(), &found[r]));
    });
  }
  for (std::thread& thread : threads) thread.join();
  Outcome all = found.front();
  for (const Outcome& rank : found) {
    Merge(rank.masters, &all.masters);
    Merge(rank.first_gradients, &all.first_gradients);
  }
  return all;
}
Values RunSharded(const Case& c) { return RunOnRanks(c).masters; }

double Largest(const Values& a, const Values& b) {
  double largest = a.size() == b.size() ? 0 : INFINITY;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
    largest = std::max(largest, std::abs(double{a[i]} - double{b[i]}));
  }
  return largest;
}

std::string NameOf(Mode mode) {
  return mode == Mode::kNone ? "none" : mode == Mode::kOptimizer ? "optimizer" : "full";
}
std::string NameOf(Accumulation accumulation) {
  return accumulation == Accumulation::kSyncEach   ? "sync_each"
         : accumulation == Accumulation::kSyncLast ? "sync_last"
                                                   : "layer_major";
}

using Parts = std::tuple<int, Mode, Accumulation, Recompute, Precision, bool>;
class Equality : public testing::TestWithParam<Parts> {};

TEST_P(Equality, ParametersAreThoseOfOneProcessBitForBit) {
  Case c;
  bool tied = false;
  std::tie(c.world, c.options.mode, c.options.accumulation, c.recompute, c.options.precision,
           tied) = GetParam();
  c.config.set_tie_embeddings(tied);
  // The reference does not depend on mode or recomputation.
  static std::map<std::tuple<int, bool, Precision, bool>, Values> references;
  const auto key = std::tuple(c.world, c.options.accumulation == Accumulation::kSyncEach,
                              c.options.precision, tied);
  if (!references.contains(key)) references[key] = Reference(c);
  const Values& expected = references[key];
  const Values got = RunSharded(c);
  ASSERT_EQ(got.size(), expected.size());
  if (tied && c.options.accumulation == Accumulation::kLayerMajor) {
    // The head's shares of all micro-batches come before the embedding's.
    EXPECT_LT(Largest(got, expected), c.options.precision == Precision::kFp32 ? 2e-6 : 1e-2);
    return;
  }
  EXPECT_EQ(std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)), 0)
      << "largest difference " << Largest(got, expected);
}

std::string NameOfCase(const testing::TestParamInfo<Parts>& info) {
  const auto& [world, mode, accumulation, recompute, precision, tied] = info.param;
  return Str(world, "_", NameOf(mode), "_", NameOf(accumulation), "_",
             recompute == Recompute::kFull        ? "recompute"
             : recompute == Recompute::kSelective ? "selective"
                                                  : "keep",
             "_", precision == Precision::kFp32 ? "fp32" : "bf16", tied ? "_tied" : "");
}

// All combinations but sync_each with whole gradients, which is refused; tied embeddings, which
// change the schedule of two units only, on two and three ranks.
std::vector<Parts> AllParts() {
  std::vector<Parts> all;
  for (const int world : {1, 2, 3, 4}) {
    for (const Mode mode : {Mode::kNone, Mode::kOptimizer, Mode::kFull}) {
      for (const Accumulation accumulation :
           {Accumulation::kSyncEach, Accumulation::kSyncLast, Accumulation::kLayerMajor}) {
        if (mode == Mode::kNone && accumulation == Accumulation::kSyncEach) continue;
        for (const Recompute recompute :
             {Recompute::kNone, Recompute::kSelective, Recompute::kFull}) {
          for (const Precision precision : {Precision::kFp32, Precision::kBf16}) {
            all.emplace_back(world, mode, accumulation, recompute, precision, false);
            if (world == 2 || world == 3) {
              all.emplace_back(world, mode, accumulation, recompute, precision, true);
            }
          }
        }
      }
    }
  }
  return all;
}

INSTANTIATE_TEST_SUITE_P(Ranks, Equality, testing::ValuesIn(AllParts()), NameOfCase);

// The plan of a run's memory knows what the schedule holds at a time, to the byte but for the
// alignment of buffers.
TEST(Sharding, GatheredMemoryIsWhatThePlanSays) {
  for (const int world : {1, 2, 3}) {
    for (const bool tied : {false, true}) {
      for (const Accumulation accumulation :
           {Accumulation::kSyncEach, Accumulation::kSyncLast, Accumulation::kLayerMajor}) {
        for (const Precision precision : {Precision::kFp32, Precision::kBf16}) {
          Case c;
          c.world = world;
          c.options.mode = Mode::kFull;
          c.options.accumulation = accumulation;
          c.options.precision = precision;
          c.config.set_tie_embeddings(tied);
          heddle::v1::TrainingConfig training;
          training.set_accumulation(accumulation == Accumulation::kSyncEach
                                        ? heddle::v1::TrainingConfig::ACCUMULATION_SYNC_EACH
                                    : accumulation == Accumulation::kSyncLast
                                        ? heddle::v1::TrainingConfig::ACCUMULATION_SYNC_LAST
                                        : heddle::v1::TrainingConfig::ACCUMULATION_LAYER_MAJOR);
          training.set_precision(precision == Precision::kFp32
                                     ? heddle::v1::TrainingConfig::PRECISION_FP32
                                     : heddle::v1::TrainingConfig::PRECISION_BF16);
          heddle::v1::ParallelConfig parallel;
          parallel.set_shard(heddle::v1::ParallelConfig::SHARD_FULL);
          parallel.mutable_ranks()->set_max(world);
          const model::MemoryEstimate plan = model::EstimateMemory(c.config, training, parallel);
          const int64_t measured = RunOnRanks(c).gathered_bytes;
          EXPECT_GT(plan.gathered, 0);
          EXPECT_NEAR(static_cast<double>(measured), static_cast<double>(plan.gathered), 12 * 128)
              << world << " ranks, tied " << tied << ", " << NameOf(accumulation);
        }
      }
    }
  }
}

// The norm is a sum over ranks: another order than one process's.
TEST(Sharding, ClippingAgreesWithOneProcess) {
  for (const int world : {2, 3}) {
    Case c;
    c.world = world;
    c.options.mode = Mode::kFull;
    c.options.precision = Precision::kFp32;
    c.clip = 0.05;
    const Values clipped = Reference(c);
    EXPECT_LT(Largest(RunSharded(c), clipped), 2e-6);
    Case unclipped = c;
    unclipped.clip = 1e9;
    EXPECT_GT(Largest(Reference(unclipped), clipped), 1e-4) << "the clip does nothing";
  }
}

// Of the gradients: AdamW divides a gradient by its size, so that an element near 0, whose shares
// of the ranks cancel, moves by a whole step either way.
TEST(Sharding, GradientsInBf16OnTheWireStayClose) {
  Case c;
  c.world = 3;
  c.options.mode = Mode::kFull;
  c.options.precision = Precision::kFp32;
  const Values exact = RunOnRanks(c).first_gradients;
  c.options.wire = comm::Wire::kBf16;
  const Values rounded = RunOnRanks(c).first_gradients;
  double error = 0;
  double size = 0;
  for (size_t i = 0; i < exact.size(); ++i) {
    error += std::pow(double{rounded[i]} - double{exact[i]}, 2);
    size += std::pow(double{exact[i]}, 2);
  }
  EXPECT_GT(error, 0) << "nothing was rounded";
  EXPECT_LT(std::sqrt(error / size), 1e-2);
}

}  // namespace
}  // namespace heddle::shard
