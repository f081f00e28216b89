#include "model/inference/decoder.h"

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <cmath>
#include <map>

#include "model/inference/sampling.h"
#include "tests/model/tiny_model.h"

namespace heddle::inference {
namespace {

using model::Precision;
using model_test::BatchData;
using model_test::Build;
using model_test::Built;
using model_test::Kind;
using model_test::RandomBatch;
using model_test::TinyConfig;

double Worst(const std::vector<float>& got, const at::Tensor& row) {
  const at::Tensor wide = row.to(at::kDouble).contiguous();
  double worst = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    worst = std::max(worst, std::abs(got[i] - wide.data_ptr<double>()[i]));
  }
  return worst;
}

// C3 and S3: 40 tokens is eight windows, so rings have wrapped around many times.
TEST(Decoder, DecodeEqualsPrefillAtEveryPosition) {
  for (const Kind kind : {Kind::kDense, Kind::kSwa, Kind::kHybrid}) {
    const heddle::v1::ModelConfig config = TinyConfig(kind, true);
    Built built = Build(config, Precision::kFp64);
    const BatchData batch = RandomBatch({40}, config.vocab_size(), 3);
    const at::Tensor logits = *built.model->Logits(batch.view());
    for (const size_t prompt : {1u, 2u, 6u, 7u, 8u, 23u}) {
      const auto decoder = *Decoder::Create(config, built.store.get());
      for (int again = 0; again < 2; ++again) {
        const std::span<const int64_t> ids(batch.ids);
        std::vector<float> got = *decoder->Feed(ids.first(prompt));
        EXPECT_LE(Worst(got, logits[static_cast<int64_t>(prompt) - 1]), 1e-6);
        for (size_t t = prompt; t < 40; ++t) {
          got = *decoder->Feed(ids.subspan(t, 1));
          ASSERT_LE(Worst(got, logits[static_cast<int64_t>(t)]), 1e-6)
              << "kind " << static_cast<int>(kind) << " prompt " << prompt << " position " << t;
        }
        decoder->Reset();
      }
    }
  }
}

// C13.
TEST(Decoder, CacheTakesTheBytesOfTheFormula) {
  for (const Kind kind : {Kind::kDense, Kind::kSwa, Kind::kHybrid}) {
    const heddle::v1::ModelConfig config = TinyConfig(kind, true);
    Built built = Build(config, Precision::kBf16);
    const auto decoder = *Decoder::Create(config, built.store.get());
    const BatchData batch = RandomBatch({30}, config.vocab_size(), 3);
    ASSERT_TRUE(decoder->Feed(batch.ids).ok());
    EXPECT_EQ(decoder->cache_bytes(), model::KvCacheBytes(config, 30, 2));
    ASSERT_TRUE(decoder->Feed(std::span(batch.ids).first(3)).ok());
    EXPECT_EQ(decoder->cache_bytes(), model::KvCacheBytes(config, 33, 2));
  }
}

TEST(Decoder, RefusesWhatItCannotFeed) {
  const heddle::v1::ModelConfig config = TinyConfig(Kind::kDense, true);
  Built built = Build(config, Precision::kFp32);
  const auto decoder = *Decoder::Create(config, built.store.get());
  EXPECT_FALSE(decoder->Feed({}).ok());
  EXPECT_FALSE(decoder->Feed(std::vector<int64_t>{1, 37}).ok());
  EXPECT_EQ(decoder->length(), 0);
}

// C12.
TEST(Generate, StopsAtEndOfTextAndAtTheMaximum) {
  const heddle::v1::ModelConfig config = TinyConfig(Kind::kHybrid, true);
  Built built = Build(config, Precision::kFp32);
  const auto decoder = *Decoder::Create(config, built.store.get());
  const std::vector<int64_t> prompt = {3, 1, 4};
  GenerateOptions options;
  options.max_new_tokens = 12;
  options.sampling.temperature = 1.0;
  options.sampling.seed = 5;
  const std::vector<int64_t> free = *Generate(decoder.get(), prompt, options);
  EXPECT_EQ(free.size(), 12u);
  decoder->Reset();
  EXPECT_EQ(*Generate(decoder.get(), prompt, options), free);
  decoder->Reset();
  options.eos = free[4];
  std::vector<int64_t> stopped = *Generate(decoder.get(), prompt, options);
  EXPECT_LE(stopped.size(), 5u);
  EXPECT_EQ(stopped.back(), free[4]);
  options.max_new_tokens = 0;
  EXPECT_TRUE(Generate(decoder.get(), prompt, options)->empty());
}

TEST(SampleToken, GreedyTakesTheFirstOfTheHighest) {
  const float nan = std::nanf("");
  EXPECT_EQ(SampleToken(std::vector<float>{1, 5, nan, 5, 2}, {}, 0), 1);
}

TEST(SampleToken, FollowsTheProbabilitiesWithinTopKAndTopP) {
  const std::vector<float> logits = {std::log(0.1f), std::log(0.4f), std::log(0.2f),
                                     std::log(0.3f)};
  const auto frequencies = [&](SamplingOptions options) {
    options.temperature = 1.0;
    std::map<int64_t, double> counts;
    for (int64_t position = 0; position < 20'000; ++position) {
      counts[SampleToken(logits, options, position)] += 1.0 / 20'000;
    }
    return counts;
  };
  const auto all = frequencies({});
  EXPECT_NEAR(all.at(0), 0.1, 0.01);
  EXPECT_NEAR(all.at(1), 0.4, 0.015);
  const auto two = frequencies({1.0, 2, 1.0, 0});
  EXPECT_EQ(two.size(), 2u);
  EXPECT_NEAR(two.at(1), 4.0 / 7.0, 0.015);
  // 0.4 + 0.3 reaches 0.6; 0.4 alone does not.
  const auto nucleus = frequencies({1.0, 0, 0.6, 0});
  EXPECT_EQ(nucleus.size(), 2u);
  EXPECT_TRUE(nucleus.contains(3));
  EXPECT_NE(frequencies({1.0, 0, 1.0, 1}).at(2), all.at(2));
}

TEST(SampleToken, NamesTheOptionOutOfRange) {
  EXPECT_NE(Message(CheckSampling({-1.0, 0, 1.0, 0})).find("temperature"), std::string::npos);
  EXPECT_NE(Message(CheckSampling({1.0, -1, 1.0, 0})).find("top-k"), std::string::npos);
  EXPECT_NE(Message(CheckSampling({1.0, 0, 0.0, 0})).find("top-p"), std::string::npos);
}

}  // namespace
}  // namespace heddle::inference
