// Every way to shard, accumulate and recompute gives the parameters of one process that holds
// everything and adds the ranks' gradients in ascending order, bit for bit (training-runtime.md
// 20.1, 20.2). Over Gloo; mpi_equality_test.cc does the same over MPI.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

#include "tests/support/status_matchers.h"
#include "tests/worker/shard/gloo_ranks.h"
#include "tests/worker/shard/sharded_run.h"

namespace heddle::shard {
namespace {

Values RunSharded(const Case& c) { return RunOnRanks(c).masters; }

class Equality : public testing::TestWithParam<Parts> {};

TEST_P(Equality, ParametersAreThoseOfOneProcessBitForBit) {
  const Case c = CaseOf(GetParam());
  EXPECT_EQ(Difference(c, RunSharded(c)), "");
}

INSTANTIATE_TEST_SUITE_P(Ranks, Equality, testing::ValuesIn(AllParts()),
                         [](const testing::TestParamInfo<Parts>& info) {
                           return NameOf(info.param);
                         });

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
              << world << " ranks, tied " << tied << ", accumulation "
              << static_cast<int>(accumulation);
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
