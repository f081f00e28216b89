// NSA's forward: golden values of attention-and-moe.md section 14, the properties N1-N9 and C1-C9
// of section 13, a second implementation for random shapes. Gradients: nsa_training_test.cc.
#include <ATen/Parallel.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/eye.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>
#include <vector>

#include "kernels/attention/reference.h"
#include "model/parameter_store.h"
#include "model/store_views.h"
#include "tests/model/attention/nsa_golden.h"
#include "tests/model/attention/nsa_harness.h"
#include "tests/model/attention/nsa_oracle.h"

namespace heddle::attention {
namespace {

using heddle::v1::NsaConfig;
using layers::Pass;

// Dense causal attention, or a window, over rotated rows by the oracle of all attention code.
at::Tensor Reference(const NsaBatch& batch, const at::Tensor& q, const at::Tensor& k,
                     const at::Tensor& v, int64_t window = 0) {
  kernels::attention::Shape shape;
  shape.heads = q.size(1);
  shape.kv_heads = k.size(1);
  shape.key_dim = shape.value_dim = q.size(2);
  shape.documents = static_cast<int64_t>(batch.cu.size()) - 1;
  shape.cu_seqlens = batch.cu.data();
  shape.scale = 1.0 / std::sqrt(static_cast<double>(q.size(2)));
  shape.window = window;
  at::Tensor out = at::empty(q.sizes(), at::kDouble);
  std::vector<double> lse(static_cast<size_t>(q.size(0) * q.size(1)));
  kernels::attention::ReferenceForward(shape, ToVector(q).data(), ToVector(k).data(),
                                       ToVector(v).data(), out.data_ptr<double>(), lse.data());
  return out;
}

TEST(Nsa, GoldenBranchesAndOutput) {
  NsaModel model(GoldenSizes());
  PutGoldenWeights(model);
  const NsaBatch batch({40});
  const at::Tensor h = GoldenRows();
  const NsaBranchesRun run(&model, batch, h);
  ExpectGolden(run.cmp(), {32.16494847608, 15.17489918254, 0, 0.005367275642142}, "cmp");
  ExpectGolden(run.slc(), {-5.575410097178, 140.8231391884, 0.9092974268257, -0.05882540701182},
               "slc");
  ExpectGolden(run.win(), {11.68702204377, 213.5551021056, 0.9092974268257, -0.1467170006844},
               "win");
  const at::Tensor out = model.Forward(batch, h, Pass::kTrain);
  ExpectGolden(out.narrow(1, 0, 32).view({40, 4, 8}),
               {24.56582195755, 252.6774442554, 1.437122021457, -0.1754136595533}, "out");
}

TEST(Nsa, GoldenBlockScoresAndSelection) {
  NsaModel model(GoldenSizes());
  PutGoldenWeights(model);
  const NsaBranchesRun run(&model, NsaBatch({40}), GoldenRows(), /*with_scores=*/true);
  const model_test::Summary scores = model_test::Summarize(ToVector(run.scores));
  EXPECT_NEAR(scores.sum, 296, 1e-10);
  EXPECT_NEAR(scores.sum_of_squares, 561.8115493323, 1e-9);
  using Blocks = std::vector<int>;
  EXPECT_EQ(run.Blocks(8, 0), (Blocks{0, 1}));
  EXPECT_EQ(run.Blocks(17, 0), (Blocks{0, 1, 2}));
  EXPECT_EQ(run.Blocks(25, 0), (Blocks{0, 2, 3}));
  EXPECT_EQ(run.Blocks(31, 0), (Blocks{0, 1, 3}));
  EXPECT_EQ(run.Blocks(39, 0), (Blocks{0, 1, 4}));
  EXPECT_EQ(run.Blocks(25, 1), (Blocks{0, 2, 3}));
  EXPECT_EQ(run.Blocks(31, 1), (Blocks{0, 2, 3}));
  EXPECT_EQ(run.Blocks(39, 1), (Blocks{0, 1, 4}));
  EXPECT_NEAR(RunOracle(model, GoldenRows()).margin, 0.02577, 5e-6);
}

// Sizes with l in and out of proportion to B, no and many forced blocks, one group and many.
std::vector<NsaSizes> ManySizes() {
  std::vector<NsaSizes> out;
  out.push_back({});
  out.push_back({.kernel_size = 6, .stride = 2, .topk = 4, .init_blocks = 0, .local_blocks = 2});
  out.push_back({.heads = 6,
                 .kv_heads = 1,
                 .kernel_size = 2,
                 .stride = 2,
                 .block = 4,
                 .topk = 5,
                 .init_blocks = 2,
                 .local_blocks = 2,
                 .window = 1});
  out.push_back({.heads = 3,
                 .kv_heads = 3,
                 .dim = 18,
                 .kernel_size = 8,
                 .stride = 4,
                 .topk = 2,
                 .init_blocks = 0,
                 .local_blocks = 0,
                 .interleaved = true});
  out.push_back({.kernel_size = 1, .stride = 1, .block = 1, .topk = 7, .local_blocks = 3});
  return out;
}

std::string Name(const NsaSizes& s) {
  return "l " + std::to_string(s.kernel_size) + " r " + std::to_string(s.stride) + " B " +
         std::to_string(s.block) + " n " + std::to_string(s.topk) + " H " +
         std::to_string(s.heads) + " type " + std::to_string(s.type) +
         (s.separate ? " separate" : " shared");
}

// Layer and selection of every document against the second implementation, which selects once per
// key head for all heads of its group. False if a document is too close to a tie to compare.
bool EqualsTheOracle(NsaModel* model, const NsaBatch& batch, const at::Tensor& h) {
  const NsaSizes& sizes = model->sizes();
  const at::Tensor out = model->Forward(batch, h, Pass::kTrain);
  const NsaBranchesRun run(model, batch, h);
  double worst = 0;
  for (size_t b = 0; b + 1 < batch.cu.size(); ++b) {
    const int64_t first = batch.cu[b];
    const int64_t length = batch.cu[b + 1] - first;
    const NsaOracle oracle = RunOracle(*model, h.narrow(0, first, length));
    if (oracle.margin < 1e-7) return false;
    for (size_t t = 0; t < oracle.blocks.size(); ++t) {
      for (size_t g = 0; g < oracle.blocks[t].size(); ++g) {
        EXPECT_EQ(run.Blocks(first + static_cast<int64_t>(t), static_cast<int64_t>(g)),
                  oracle.blocks[t][g])
            << "document " << b << " token " << t;
      }
      const Row got = ToVector(out.select(0, first + static_cast<int64_t>(t)));
      for (size_t i = 0; i < got.size(); ++i) {
        worst = std::max(worst, std::abs(got[i] - oracle.out[t][i]));
      }
    }
  }
  EXPECT_LE(worst, 1e-11) << Name(sizes);
  return true;
}

// Lengths 0, 1, l - 1, l, B, B + 1 and a long one, packed.
TEST(Nsa, C9EqualsTheSecondImplementationOnRaggedBatches) {
  for (NsaSizes sizes : ManySizes()) {
    for (const NsaConfig::CompressType type : kCompressTypes) {
      sizes.type = type;
      sizes.separate = type != NsaConfig::COMPRESS_TYPE_WEIGHTEDPOOL;
      NsaModel model(sizes);
      const NsaBatch batch(
          {0, 1, sizes.kernel_size - 1, 0, sizes.kernel_size, sizes.block, 47, sizes.block + 1, 0});
      EXPECT_TRUE(EqualsTheOracle(&model, batch, RandomRows(model, batch))) << "a tie";
    }
  }
}

TEST(Nsa, RandomShapesEqualTheSecondImplementation) {
  int compared = 0;
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    RngCursor random(Rng(seed, "test.nsa.shapes"));
    const auto draw = [&](int32_t low, int32_t high) {
      return low + static_cast<int32_t>(random.Below(static_cast<uint64_t>(high - low + 1)));
    };
    NsaSizes sizes;
    sizes.kv_heads = draw(1, 3);
    sizes.heads = sizes.kv_heads * draw(1, 3);
    sizes.dim = 2 * draw(1, 10);
    sizes.stride = draw(1, 4);
    sizes.kernel_size = sizes.stride * draw(1, 4);
    sizes.block = sizes.kernel_size + sizes.stride * draw(0, 4);
    sizes.init_blocks = draw(0, 2);
    sizes.local_blocks = draw(0, 2);
    sizes.topk = std::max(1, sizes.init_blocks + sizes.local_blocks + draw(0, 3));
    sizes.window = draw(1, 20);
    sizes.type = kCompressTypes[draw(0, 2)];
    sizes.separate = draw(0, 1) == 1;
    sizes.interleaved = draw(0, 1) == 1;
    std::vector<int32_t> lengths;
    for (int32_t count = draw(1, 5); count > 0; --count) lengths.push_back(draw(0, 50));
    NsaModel model(sizes);
    const NsaBatch batch(lengths);
    SCOPED_TRACE("seed " + std::to_string(seed) + " " + Name(sizes));
    compared += EqualsTheOracle(&model, batch, RandomRows(model, batch, seed)) ? 1 : 0;
  }
  EXPECT_GE(compared, 30);
}

TEST(Nsa, EmptyBatchesAndDocumentsWithoutRows) {
  NsaModel model({});
  for (const std::vector<int32_t>& lengths :
       std::vector<std::vector<int32_t>>{{}, {0}, {0, 0, 0}}) {
    const NsaBatch batch(lengths);
    const at::Tensor h = RandomRows(model, batch);
    EXPECT_EQ(model.Forward(batch, h, Pass::kTrain).size(0), 0);
    model.Backward(batch, h, h);
    EXPECT_EQ(Largest(model.gradients()), 0.0);
  }
}

// N1-N4: each branch has a limit in which it is dense or nothing, exactly.
TEST(Nsa, N1AllBlocksSelectedIsDense) {
  NsaSizes sizes;
  sizes.topk = 6;
  NsaModel model(sizes);
  const NsaBatch batch({48, 3, 20, 0, 41});
  const NsaBranchesRun run(&model, batch, RandomRows(model, batch));
  EXPECT_LE(MaxDifference(run.slc(), Reference(batch, run.rows.q, run.rows.k, run.rows.v)), 1e-12);
}

TEST(Nsa, N2WindowOfTheWholeDocumentIsDense) {
  NsaSizes sizes;
  sizes.window = 48;
  sizes.separate = true;
  NsaModel model(sizes);
  const NsaBatch batch({48, 3, 20, 0, 41});
  const NsaBranchesRun run(&model, batch, RandomRows(model, batch));
  EXPECT_LE(
      MaxDifference(run.win(), Reference(batch, run.rows.q, run.rows.window_k, run.rows.window_v)),
      1e-12);
}

TEST(Nsa, WindowCountsTheQueryItself) {
  NsaModel model({.window = 5});
  const NsaBatch batch({48, 3, 5, 6});
  const NsaBranchesRun run(&model, batch, RandomRows(model, batch));
  EXPECT_LE(MaxDifference(run.win(), Reference(batch, run.rows.q, run.rows.k, run.rows.v, 5)),
            1e-12);
}

TEST(Nsa, N3DocumentShorterThanAWindowIsDenseWithoutCompression) {
  NsaModel model({.kernel_size = 8, .stride = 2});
  const NsaBatch batch({7, 1, 3});
  const NsaBranchesRun run(&model, batch, RandomRows(model, batch));
  EXPECT_EQ(run.windows.count(), 0);
  EXPECT_EQ(Largest(run.cmp()), 0.0);
  for (const double lse : ToVector(run.attended.lse[0])) {
    EXPECT_EQ(lse, -std::numeric_limits<double>::infinity());
  }
  EXPECT_LE(MaxDifference(run.slc(), Reference(batch, run.rows.q, run.rows.k, run.rows.v)), 1e-12);
}

TEST(Nsa, N4WindowsOfOneTokenAreDense) {
  NsaModel model({.kernel_size = 1, .stride = 1, .type = NsaConfig::COMPRESS_TYPE_AVGPOOL});
  model.Weight("compress.k_pe").zero_();
  const NsaBatch batch({30, 0, 9});
  const NsaBranchesRun run(&model, batch, RandomRows(model, batch));
  EXPECT_LE(MaxDifference(run.cmp(), Reference(batch, run.rows.q, run.rows.k, run.rows.v)), 1e-12);
}

// With w = 1 / l and M = I / l all types are the mean, embeddings included.
TEST(Nsa, N5TheThreeCompressionsMeetInTheMean) {
  const NsaBatch batch({45, 4, 17});
  std::vector<at::Tensor> outs;
  for (const NsaConfig::CompressType type : kCompressTypes) {
    NsaModel model({.type = type});
    for (const char* name : {"compress.k_weight", "compress.v_weight"}) {
      if (type == NsaConfig::COMPRESS_TYPE_WEIGHTEDPOOL) model.Weight(name).fill_(0.25);
      if (type == NsaConfig::COMPRESS_TYPE_LINEAR) {
        model.Weight(name).view({2, 4, 6, 6}).copy_(at::eye(6, at::kDouble).mul_(0.25));
      }
    }
    outs.push_back(model.Forward(batch, RandomRows(model, batch), Pass::kInference));
  }
  EXPECT_LE(MaxDifference(outs[0], outs[1]), 1e-12);
  EXPECT_LE(MaxDifference(outs[0], outs[2]), 1e-12);
}

// compress_init: mean starts all types as average pooling; xavier does not (section 5.2).
TEST(Nsa, N5CompressionsCoincideAtTheirInitialValues) {
  const auto start = [](NsaConfig::CompressType type, NsaConfig::CompressInit init) {
    heddle::v1::ModelConfig config = ConfigOf({.type = type});
    config.mutable_attention()->mutable_nsa()->set_compress_init(init);
    const auto store =
        *model::ParameterStore::Create(*model::PlanModel(config), model::Precision::kFp64);
    model::InitParameters(3, store.get());
    layers::RopeSet ropes(config, /*fp64=*/true);
    ropes.Ensure(45);
    const NsaBatch batch({45, 4, 17});
    const layers::Documents documents = batch.documents();
    const auto layer = MakeNsa(config, model::StoragesOf(*store)[0], &ropes);
    layers::BufferPool kept;
    layers::BufferPool scratch;
    layers::PassContext context;
    context.documents = &documents;
    context.kept = &kept;
    context.scratch = &scratch;
    const at::Tensor h = RandomTensor({batch.rows(), 20}, 5, 20.0);
    at::Tensor out = at::empty_like(h);
    layer->Begin(documents);
    layer->Forward(context, h, at::zeros_like(h), out);
    return out;
  };
  const at::Tensor mean = start(NsaConfig::COMPRESS_TYPE_AVGPOOL, NsaConfig::COMPRESS_INIT_MEAN);
  for (const NsaConfig::CompressType type : kCompressTypes) {
    EXPECT_LE(MaxDifference(mean, start(type, NsaConfig::COMPRESS_INIT_MEAN)), 1e-12);
    EXPECT_GT(MaxDifference(mean, start(type, NsaConfig::COMPRESS_INIT_XAVIER)), 1e-3);
  }
}

TEST(Nsa, N6SelectionHoldsForcedBlocksAndNoFutureBlock) {
  for (const NsaSizes& sizes : ManySizes()) {
    SCOPED_TRACE(Name(sizes));
    NsaModel model(sizes);
    const NsaBatch batch({60, 1, 0, 33, sizes.block});
    const NsaBranchesRun run(&model, batch, RandomRows(model, batch));
    int64_t without_block_0 = 0;
    for (int64_t row = 0; row < batch.rows(); ++row) {
      const int t = batch.positions[static_cast<size_t>(row)];
      const int current = t / sizes.block;
      for (int64_t g = 0; g < sizes.kv_heads; ++g) {
        const std::vector<int> blocks = run.Blocks(row, g);
        ASSERT_EQ(static_cast<int>(blocks.size()), std::min(sizes.topk, current + 1));
        ASSERT_TRUE(std::is_sorted(blocks.begin(), blocks.end()));
        ASSERT_EQ(std::adjacent_find(blocks.begin(), blocks.end()), blocks.end());
        ASSERT_GE(blocks.front(), 0);
        ASSERT_LE(blocks.back(), current);
        for (int i = 0; i <= current; ++i) {
          const bool forced = i < sizes.init_blocks || i > current - sizes.local_blocks;
          ASSERT_TRUE(!forced || std::count(blocks.begin(), blocks.end(), i) == 1)
              << "row " << row << " block " << i;
        }
        if (blocks.front() > 0) ++without_block_0;
      }
    }
    // No place is filled up with block 0.
    if (sizes.init_blocks == 0) {
      EXPECT_GT(without_block_0, 0);
    }
  }
}

TEST(Nsa, N7BlockScoresOfARowSumToTheGroupTimesTheOverlap) {
  for (const NsaSizes& sizes : ManySizes()) {
    SCOPED_TRACE(Name(sizes));
    NsaModel model(sizes);
    const NsaBatch batch({60, 1, 33});
    const NsaBranchesRun run(&model, batch, RandomRows(model, batch), /*with_scores=*/true);
    const double whole =
        static_cast<double>(sizes.heads / sizes.kv_heads) * (sizes.kernel_size / sizes.stride);
    const Row sums = ToVector(run.scores.sum(2));
    for (size_t i = 0; i < sums.size(); ++i) {
      const int t = batch.positions[i / static_cast<size_t>(sizes.kv_heads)];
      ASSERT_NEAR(sums[i], t < sizes.kernel_size - 1 ? 0.0 : whole, 1e-10) << "token " << t;
    }
  }
}

TEST(Nsa, N8OneOpenGateIsolatesItsBranch) {
  NsaModel model(TransparentSizes({}));
  MakeTransparent(model);
  const NsaBatch batch({40, 7});
  at::Tensor h = RandomRows(model, batch);
  for (int64_t branch = 0; branch < kNsaBranches; ++branch) {
    at::Tensor logits = h.narrow(1, h.size(1) - 12, 12).view({h.size(0), 4, 3});
    logits.fill_(-40);
    logits.select(2, branch).fill_(40);
    const at::Tensor out = model.Forward(batch, h, Pass::kInference);
    const NsaBranchesRun run(&model, batch, h);
    EXPECT_LE(MaxDifference(out.narrow(1, 0, 24).view({h.size(0), 4, 6}),
                            run.attended.out[static_cast<size_t>(branch)]),
              1e-12);
  }
}

TEST(Nsa, N9HeadsOfAGroupShareOneSelection) {
  NsaModel model({.heads = 6, .kv_heads = 2});
  const NsaBatch batch({50});
  const NsaBranchesRun run(&model, batch, RandomRows(model, batch));
  EXPECT_EQ(run.selected.sets.set_heads, 2);
  bool groups_differ = false;
  for (int64_t row = 0; row < 50; ++row) {
    groups_differ = groups_differ || run.Blocks(row, 0) != run.Blocks(row, 1);
  }
  EXPECT_TRUE(groups_differ);
}

TEST(Nsa, X4TouchedPairsEqualTheFormulas) {
  const NsaSizes sizes;
  NsaModel model(sizes);
  const NsaBatch batch({61, 0, 5, 30});
  const NsaBranchesRun run(&model, batch, RandomRows(model, batch));
  int64_t compressed = 0;
  int64_t window = 0;
  int64_t selected = 0;
  for (const int32_t t : batch.positions) {
    if (t >= 3) compressed += (t - 3) / 2 + 1;
    window += std::min(t + 1, 6);
    // All blocks but the current one are whole; the current one is forced.
    selected += 2 * ((std::min(3, t / 8 + 1) - 1) * 8 + t % 8 + 1);
  }
  EXPECT_EQ(run.geometry.compressed.pairs(), compressed);
  EXPECT_EQ(run.geometry.window.pairs(), window);
  EXPECT_EQ(run.selected.sets.pairs(), selected);
}

TEST(Nsa, C1OutputsOfAPrefixDoNotDependOnWhatFollows) {
  for (const NsaConfig::CompressType type : kCompressTypes) {
    NsaModel model({.type = type});
    const NsaBatch whole({37});
    const at::Tensor h = RandomRows(model, whole);
    const at::Tensor out = model.Forward(whole, h, Pass::kInference);
    for (int32_t t = 1; t < 37; ++t) {
      const at::Tensor prefix =
          model.Forward(NsaBatch({t}), h.narrow(0, 0, t).contiguous(), Pass::kInference);
      ASSERT_LE(MaxDifference(prefix, out.narrow(0, 0, t)), 1e-10) << "length " << t;
    }
  }
}

// Branches take the same bits alone and packed: their rows are given, not projected.
TEST(Nsa, C2PackedEqualsAlone) {
  for (const NsaConfig::CompressType type : kCompressTypes) {
    NsaSizes sizes;
    sizes.type = type;
    NsaModel model(TransparentSizes(sizes));
    MakeTransparent(model);
    const NsaBatch batch({21, 0, 40, 3, 1});
    const at::Tensor h = RandomRows(model, batch);
    const NsaBranchesRun packed(&model, batch, h);
    const at::Tensor out = model.Forward(batch, h, Pass::kInference);
    for (size_t b = 0; b + 1 < batch.cu.size(); ++b) {
      const int64_t first = batch.cu[b];
      const int64_t length = batch.cu[b + 1] - first;
      if (length == 0) continue;
      const NsaBatch one({static_cast<int32_t>(length)});
      const at::Tensor own = h.narrow(0, first, length).contiguous();
      const NsaBranchesRun alone(&model, one, own);
      for (size_t i = 0; i < kNsaBranches; ++i) {
        const at::Tensor part = packed.attended.out[i].narrow(0, first, length);
        EXPECT_LE(MaxDifference(alone.attended.out[i], part), 1e-12);
        // The matrix product of `linear` is LibTorch's.
        if (type != NsaConfig::COMPRESS_TYPE_LINEAR) {
          EXPECT_TRUE(SameBits(alone.attended.out[i], part)) << "branch " << i;
        }
      }
      EXPECT_LE(
          MaxDifference(model.Forward(one, own, Pass::kInference), out.narrow(0, first, length)),
          1e-12);
    }
  }
}

TEST(Nsa, C4PermutedDocumentsPermuteTheOutputs) {
  NsaModel model({});
  const std::vector<int32_t> lengths = {21, 40, 3};
  const NsaBatch batch(lengths);
  const NsaBatch permuted({3, 21, 40});
  const at::Tensor h = RandomRows(model, batch);
  const auto permute = [&](const at::Tensor& t) {
    return at::cat({t.narrow(0, 61, 3), t.narrow(0, 0, 21), t.narrow(0, 21, 40)});
  };
  const at::Tensor out = model.Forward(batch, h, Pass::kInference);
  const at::Tensor other = model.Forward(permuted, permute(h), Pass::kInference);
  EXPECT_LE(MaxDifference(permute(out), other), 1e-12);
}

TEST(Nsa, C7PerturbingATokenLeavesEarlierOutputsBitwiseUnchanged) {
  for (const NsaConfig::CompressType type : kCompressTypes) {
    NsaModel model({.type = type});
    const NsaBatch batch({37, 8});
    const at::Tensor h = RandomRows(model, batch);
    const at::Tensor out = model.Forward(batch, h, Pass::kInference);
    for (int64_t s = 0; s < 37; s += 3) {
      at::Tensor changed = h.clone();
      changed.select(0, s).add_(0.7);
      const at::Tensor other = model.Forward(batch, changed, Pass::kInference);
      EXPECT_TRUE(SameBits(out.narrow(0, 0, s), other.narrow(0, 0, s))) << "token " << s;
      EXPECT_TRUE(SameBits(out.narrow(0, 37, 8), other.narrow(0, 37, 8))) << "token " << s;
      EXPECT_GT(MaxDifference(out.select(0, s), other.select(0, s)), 1e-3) << "token " << s;
    }
  }
}

// C3 with the functions that nsa_layer.h offers a decoder, and N10's count of emissions.
TEST(Nsa, C3StepsOfADecoderEqualThePrefill) {
  for (const NsaConfig::CompressType type : kCompressTypes) {
    for (const bool separate : {false, true}) {
      NsaSizes sizes;
      sizes.type = type;
      sizes.separate = separate;
      SCOPED_TRACE(Name(sizes));
      NsaModel model(sizes);
      const NsaBatch batch({45});
      const at::Tensor h = RandomRows(model, batch);
      const at::Tensor prefill = model.Forward(batch, h, Pass::kInference);
      const NsaWeights weights = model.MakeWeights();
      const NsaShape& shape = weights.shape();
      NsaKeys cache;
      at::Tensor raw_k;
      at::Tensor raw_v;
      const auto append = [](at::Tensor* rows, const at::Tensor& more) {
        *rows = rows->defined() ? at::cat({*rows, more}) : more.clone();
      };
      const at::Tensor none = at::empty({0, 2, 6}, at::kDouble);
      cache.kc = cache.vc = none;
      int64_t emitted = 0;
      for (int32_t t = 0; t < 45; ++t) {
        layers::BufferPool pool;
        layers::BufferPool scratch;
        const std::vector<int32_t> position = {t};
        const NsaRows row = weights.Project(h.narrow(0, t, 1), position, &pool);
        append(&cache.k, row.k);
        append(&cache.v, row.v);
        append(&cache.window_k, row.window_k);
        append(&cache.window_v, row.window_v);
        append(&raw_k, row.raw_k);
        append(&raw_v, row.raw_v);
        if (raw_k.size(0) == sizes.kernel_size) {
          at::Tensor kc;
          at::Tensor vc;
          weights.CompressRows(OneWindow(shape.compression, emitted++), raw_k, raw_v, &pool,
                               &scratch, &kc, &vc);
          append(&cache.kc, kc);
          append(&cache.vc, vc);
          const int64_t rest = sizes.kernel_size - sizes.stride;
          raw_k = raw_k.narrow(0, sizes.stride, rest).clone();
          raw_v = raw_v.narrow(0, sizes.stride, rest).clone();
        }
        const NsaGeometry geometry = GeometryOf(shape, {{t}, {0}, {0}});
        const NsaAttended attended = TakeAttended(shape, 1, at::kDouble, &pool);
        AttendCompressed(shape, geometry, row.q, cache, attended);
        const SelectedBlocks selected =
            SelectBlocks(shape, geometry.queries, row.q, cache.kc, attended.lse[0], &scratch);
        AttendTokens(shape, geometry, selected.sets, row.q, cache, attended);
        const at::Tensor o = pool.Take({1, 24}, at::kDouble);
        CombineBranches(row.gate_logits, attended.out, o);
        const at::Tensor out = at::empty({1, sizes.d_model}, at::kDouble);
        weights.Output(at::zeros_like(out), o, out);
        ASSERT_LE(MaxDifference(out, prefill.narrow(0, t, 1)), 1e-10) << "token " << t;
        ASSERT_EQ(emitted, WindowCount(shape.compression, t + 1));
      }
    }
  }
}

TEST(Nsa, CacheRowsAreWhatADecoderStores) {
  for (const bool separate : {false, true}) {
    NsaModel model({.separate = separate});
    const NsaBatch batch({20, 5});
    const at::Tensor h = RandomRows(model, batch);
    layers::CacheRows cache;
    model.Forward(batch, h, Pass::kInference, /*wanted=*/true, &cache);
    const NsaBranchesRun run(&model, batch, h);
    EXPECT_TRUE(SameBits(cache.k, run.rows.k));
    EXPECT_TRUE(SameBits(cache.v, run.rows.v));
    EXPECT_TRUE(SameBits(cache.raw_k, run.rows.raw_k));
    EXPECT_GT(MaxDifference(cache.raw_k, cache.k), 1e-3);
    EXPECT_EQ(cache.raw_v.defined(), separate);
    EXPECT_EQ(cache.window_k.defined(), separate);
    EXPECT_EQ(cache.window_v.defined(), separate);
    if (!separate) continue;
    EXPECT_TRUE(SameBits(cache.raw_v, run.rows.raw_v));
    EXPECT_TRUE(SameBits(cache.window_k, run.rows.window_k));
    EXPECT_TRUE(SameBits(cache.window_v, run.rows.window_v));
  }
}

}  // namespace
}  // namespace heddle::attention
