// NSA's backward, passes and memory: golden gradients of attention-and-moe.md section 14, central
// differences, C5, C10, N11 and K5. Forward: nsa_test.cc.
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "tests/model/attention/nsa_golden.h"
#include "tests/model/attention/nsa_harness.h"
#include "tests/model/attention/nsa_oracle.h"

namespace heddle::attention {
namespace {

using heddle::v1::NsaConfig;
using layers::Pass;

double SumOfSquares(const at::Tensor& t) {
  return model_test::Summarize(ToVector(t)).sum_of_squares;
}

TEST(NsaTraining, GoldenGradients) {
  NsaModel model(GoldenSizes());
  PutGoldenWeights(model);
  const NsaBatch batch({40});
  const at::Tensor h = GoldenRows();
  at::Tensor gradient = at::zeros({40, 76}, at::kDouble);
  Fill(gradient.narrow(1, 0, 32),
       model_test::SwapHeads(model_test::Gen(4 * 40 * 8, 0.9), 4, 40, 8));
  model.Forward(batch, h, Pass::kTrain);
  const at::Tensor dh = model.Backward(batch, h, gradient);
  EXPECT_NEAR(SumOfSquares(dh.narrow(1, 0, 32)), 160.0507730055, 1e-9);
  EXPECT_NEAR(SumOfSquares(dh.narrow(1, 32, 16)), 254.4560046892, 1e-9);
  EXPECT_NEAR(SumOfSquares(dh.narrow(1, 48, 16)), 314.6814612184, 1e-9);
  EXPECT_NEAR(SumOfSquares(dh.narrow(1, 64, 12)), 34.65336389785, 1e-10);
  EXPECT_NEAR(SumOfSquares(model.Gradient("compress.k_weight")), 545.0269982390, 1e-9);
  EXPECT_NEAR(SumOfSquares(model.Gradient("compress.v_weight")), 820.4510002130, 1e-9);
  EXPECT_NEAR(SumOfSquares(model.Gradient("compress.k_pe")), 1.518565693082, 1e-11);
}

// Sum of out times gradient.
double LossOf(const at::Tensor& out, const at::Tensor& gradient) {
  const Row a = ToVector(out);
  const Row b = ToVector(gradient);
  return std::inner_product(a.begin(), a.end(), b.begin(), 0.0);
}

// Central difference of `loss` in element i of `values`.
double Slope(const at::Tensor& values, int64_t i, const std::function<double()>& loss) {
  constexpr double kStep = 1e-5;
  double* value = values.data_ptr<double>() + i;
  const double at = *value;
  *value = at + kStep;
  const double up = loss();
  *value = at - kStep;
  const double down = loss();
  *value = at;
  return (up - down) / (2 * kStep);
}

struct Gradcheck {
  NsaSizes sizes;
  std::vector<int32_t> lengths;
};

void ExpectGradients(const Gradcheck& c) {
  NsaModel model(c.sizes);
  const NsaBatch batch(c.lengths);
  const at::Tensor h = RandomRows(model, batch);
  for (size_t b = 0; b + 1 < batch.cu.size(); ++b) {
    const NsaOracle oracle =
        RunOracle(model, h.narrow(0, batch.cu[b], batch.cu[b + 1] - batch.cu[b]));
    ASSERT_GT(oracle.margin, 1e-4) << "document " << b << " is too close to a tie";
  }
  const at::Tensor gradient = RandomTensor(h.sizes(), 77);
  model.Forward(batch, h, Pass::kTrain);
  const at::Tensor dh = model.Backward(batch, h, gradient);
  const auto loss = [&] { return LossOf(model.Forward(batch, h, Pass::kInference), gradient); };
  const auto check = [&](const at::Tensor& values, const at::Tensor& got, const std::string& what) {
    // A prime stride visits every row, head and tap over the tensors.
    const int64_t stride = std::max<int64_t>(1, values.numel() / 41);
    const Row gradients = ToVector(got);
    double largest = 0;
    for (int64_t i = 0; i < values.numel(); i += stride) {
      const double slope = Slope(values, i, loss);
      ASSERT_NEAR(gradients[static_cast<size_t>(i)], slope, 2e-7 * std::max(1.0, std::abs(slope)))
          << what << " " << i;
      largest = std::max(largest, std::abs(slope));
    }
    EXPECT_GT(largest, 1e-3) << what << " does not reach the loss";
  };
  check(h, dh, "h");
  for (const std::string& name : model.Names()) {
    check(model.Weight(name), model.Gradient(name), name);
  }
}

TEST(NsaTraining, C8GradientsEqualCentralDifferences) {
  for (const NsaConfig::CompressType type : kCompressTypes) {
    for (const bool separate : {false, true}) {
      SCOPED_TRACE("type " + std::to_string(type) + (separate ? " separate" : " shared"));
      ExpectGradients({{.type = type, .separate = separate}, {29, 0, 1, 3, 13}});
    }
  }
}

TEST(NsaTraining, C8GradientsOfOtherShapes) {
  ExpectGradients({{.heads = 6,
                    .kv_heads = 2,
                    .kernel_size = 6,
                    .stride = 2,
                    .block = 8,
                    .topk = 2,
                    .init_blocks = 0,
                    .local_blocks = 1,
                    .interleaved = true},
                   {35}});
  ExpectGradients({{.heads = 3,
                    .kv_heads = 3,
                    .dim = 10,
                    .kernel_size = 4,
                    .stride = 4,
                    .block = 4,
                    .topk = 4,
                    .local_blocks = 2,
                    .window = 1,
                    .type = NsaConfig::COMPRESS_TYPE_LINEAR},
                   {30, 5}});
}

// With the compressed branch shut, compression reaches the output only through the selection. Its
// weights change which blocks are chosen, and still have no gradient at all.
TEST(NsaTraining, N11NoGradientThroughTheScores) {
  NsaModel model(TransparentSizes({}));
  MakeTransparent(model);
  const NsaBatch batch({64});
  at::Tensor h = RandomRows(model, batch);
  // sigmoid(-800) is 0 in fp64.
  h.narrow(1, h.size(1) - 12, 12).view({64, 4, 3}).select(2, 0).fill_(-800);
  const NsaBranchesRun before(&model, batch, h);
  model.Forward(batch, h, Pass::kTrain);
  model.Backward(batch, h, RandomTensor(h.sizes(), 77));
  for (const char* name : {"compress.k_weight", "compress.v_weight", "compress.k_pe"}) {
    EXPECT_EQ(Largest(model.Gradient(name)), 0.0) << name;
  }
  model.Weight("compress.k_weight").mul_(-3);
  const NsaBranchesRun after(&model, batch, h);
  EXPECT_NE(before.selected.sets.first, after.selected.sets.first);
  EXPECT_GT(MaxDifference(before.slc(), after.slc()), 1e-2);
}

TEST(NsaTraining, GradientsOfPackedDocumentsAreThoseOfTheDocumentsAlone) {
  for (const NsaConfig::CompressType type : kCompressTypes) {
    NsaModel model({.type = type});
    const NsaBatch batch({21, 0, 40, 3, 1});
    const at::Tensor h = RandomRows(model, batch);
    const at::Tensor gradient = RandomTensor(h.sizes(), 77);
    model.Forward(batch, h, Pass::kTrain);
    const at::Tensor dh = model.Backward(batch, h, gradient);
    const at::Tensor packed = model.gradients().clone();
    at::Tensor sum = at::zeros_like(packed);
    for (size_t b = 0; b + 1 < batch.cu.size(); ++b) {
      const int64_t first = batch.cu[b];
      const int64_t length = batch.cu[b + 1] - first;
      const NsaBatch one({static_cast<int32_t>(length)});
      const at::Tensor own = h.narrow(0, first, length).contiguous();
      model.Forward(one, own, Pass::kTrain);
      const at::Tensor alone =
          model.Backward(one, own, gradient.narrow(0, first, length).contiguous());
      EXPECT_LE(MaxDifference(alone, dh.narrow(0, first, length)), 1e-11);
      sum.add_(model.gradients());
    }
    EXPECT_LE(MaxDifference(packed, sum), 1e-10);
  }
}

struct Results {
  at::Tensor out, dh;
  at::Tensor gradients;  // flat
  std::map<std::string, at::Tensor> by_name;
};

Results Train(NsaModel* model, const NsaBatch& batch, const at::Tensor& h) {
  Results r;
  r.out = model->Forward(batch, h, Pass::kTrain).clone();
  r.dh = model->Backward(batch, h, RandomTensor(h.sizes(), 77).to(h.scalar_type()));
  r.gradients = model->gradients().clone();
  for (const std::string& name : model->Names()) r.by_name[name] = model->Gradient(name).clone();
  return r;
}

// The products with weights are exact here, so that only our own code could differ.
TEST(NsaTraining, C5SameBitsForAnyNumberOfThreadsAndInEveryRun) {
  const int threads = at::get_num_threads();
  for (const at::ScalarType type : {at::kDouble, at::kFloat, at::kBFloat16}) {
    NsaModel model(TransparentSizes({}), type);
    MakeTransparent(model);
    const NsaBatch batch({150, 7, 300});
    // Repeated rows make equal scores.
    at::Tensor h = RandomRows(model, batch).to(type);
    h.narrow(0, 200, 150).copy_(h.narrow(0, 0, 1).expand({150, h.size(1)}));
    at::set_num_threads(1);
    const Results one = Train(&model, batch, h);
    for (const int count : {2, 3, 2}) {
      at::set_num_threads(count);
      const Results many = Train(&model, batch, h);
      EXPECT_TRUE(SameBits(one.out, many.out)) << count << " threads";
      EXPECT_TRUE(SameBits(one.dh, many.dh)) << count << " threads";
      for (const char* name : {"compress.k_weight", "compress.v_weight", "compress.k_pe"}) {
        EXPECT_TRUE(SameBits(one.by_name.at(name), many.by_name.at(name)))
            << name << " with " << count << " threads";
      }
    }
    at::set_num_threads(threads);
  }
}

TEST(NsaTraining, C10RecomputationGivesTheSameBits) {
  // Heads of 32 run as tiles in bf16, here the first rows of a document (model/attention).
  for (const auto& [type, dim] :
       {std::pair(at::kDouble, 6), {at::kBFloat16, 6}, {at::kBFloat16, 32}}) {
    for (const NsaConfig::CompressType compress : kCompressTypes) {
      NsaModel model({.dim = dim, .type = compress}, type);
      const NsaBatch batch({dim == 32 ? 200 : 45, 0, 9});
      const at::Tensor h = RandomRows(model, batch).to(type);
      const Results kept = Train(&model, batch, h);
      const at::Tensor out = model.Forward(batch, h, Pass::kSelect).clone();
      EXPECT_TRUE(SameBits(kept.out, out));
      model.Forward(batch, h, Pass::kRecompute, /*wanted=*/false);
      const at::Tensor dh =
          model.Backward(batch, h, RandomTensor(h.sizes(), 77).to(h.scalar_type()));
      EXPECT_TRUE(SameBits(kept.dh, dh));
      EXPECT_TRUE(SameBits(kept.gradients, model.gradients()));
    }
  }
}

// Recomputation on other inputs still attends to the blocks of the first forward.
TEST(NsaTraining, C10RecomputationNeverSelectsAgain) {
  NsaModel model({});
  const NsaBatch batch({64});
  const at::Tensor h = RandomRows(model, batch);
  const at::Tensor other = RandomRows(model, batch, 6);
  const at::Tensor fresh = model.Forward(batch, other, Pass::kSelect).clone();
  EXPECT_LE(MaxDifference(fresh, model.Forward(batch, other, Pass::kRecompute)), 0.0);
  model.Forward(batch, h, Pass::kSelect);
  EXPECT_GT(MaxDifference(fresh, model.Forward(batch, other, Pass::kRecompute)), 1e-2);
}

TEST(NsaTraining, Fp32AndBf16StayCloseToFp64) {
  // All blocks are selected: rounding may not change a selection here.
  for (const auto& [separate, dim] : {std::pair(false, 16), {true, 16}, {false, 32}, {true, 32}}) {
    const NsaSizes sizes = {.d_model = 32, .dim = dim, .topk = 9, .separate = separate};
    NsaModel wide(sizes);
    const NsaBatch batch({60, 11});
    const at::Tensor h = RandomRows(wide, batch).to(at::kBFloat16);
    wide.weights().copy_(wide.weights().to(at::kBFloat16));
    const Results expected = Train(&wide, batch, h.to(at::kDouble));
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16}) {
      NsaModel model(sizes, type);
      model.weights().copy_(wide.weights());
      const Results got = Train(&model, batch, h.to(type));
      const double tolerance = type == at::kFloat ? 2e-5 : 4e-2;
      EXPECT_LE(MaxDifference(got.out, expected.out), tolerance * Largest(expected.out));
      EXPECT_LE(MaxDifference(got.dh, expected.dh), tolerance * Largest(expected.dh));
      for (const auto& [name, gradient] : expected.by_name) {
        EXPECT_LE(MaxDifference(got.by_name.at(name), gradient), tolerance * Largest(gradient))
            << name;
      }
    }
  }
}

// Peak resident memory of the process since the last reset, bytes.
int64_t PeakBytes() {
  std::ifstream status("/proc/self/status");
  std::string word;
  while (status >> word) {
    if (word != "VmHWM:") continue;
    int64_t kilobytes = 0;
    status >> kilobytes;
    return kilobytes * 1024;
  }
  return 0;
}
bool ResetPeak() {
  std::ofstream refs("/proc/self/clear_refs");
  refs << "5" << std::flush;
  return refs.good();
}

// Forward and backward at L hold what is linear in L: the pools exactly, the process up to what
// the allocator keeps. One float per visible (row, window) would break the second bound twice over.
TEST(NsaTraining, K5PeakMemoryIsLinearInTheLength) {
  if (!ResetPeak()) GTEST_SKIP() << "/proc/self/clear_refs cannot be written here";
  const NsaSizes sizes = {.d_model = 16,
                          .heads = 2,
                          .kv_heads = 1,
                          .dim = 8,
                          .kernel_size = 4,
                          .stride = 2,
                          .block = 16,
                          .topk = 4,
                          .window = 64};
  struct Bytes {
    int64_t pools = 0;
    int64_t process = 0;
  };
  const auto measure = [&](int32_t length) {
    NsaModel model(sizes, at::kFloat);
    const NsaBatch batch({length});
    const at::Tensor h = RandomRows(model, batch).to(at::kFloat);
    ResetPeak();
    const int64_t before = PeakBytes();
    Train(&model, batch, h);
    return Bytes{model.pool_bytes(), PeakBytes() - before};
  };
  measure(256);  // what the first use of the libraries costs
  const Bytes half = measure(2048);
  const Bytes whole = measure(4096);
  EXPECT_LE(whole.pools, 2 * half.pools + half.pools / 64);
  EXPECT_LT(whole.process, int64_t{4096} * 2047 / 2 * 4 / 2);
}

}  // namespace
}  // namespace heddle::attention
