#include "model/inference/generate.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <limits>

#include "tests/model/inference/inference_models.h"

namespace heddle::inference {
namespace {

using inference_test::BuildStrong;
using inference_test::EveryKind;
using inference_test::MakeDecoder;
using inference_test::NamedConfig;
using model::Precision;
using model_test::Built;

std::vector<Prompt> SomePrompts() {
  return {{{3, 1, 4}, 0}, {{15}, 1}, {{9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3, 2}, 2}, {{8, 4}, 3}};
}

GenerateOptions Sampled(int64_t tokens) {
  GenerateOptions options;
  options.max_new_tokens = tokens;
  options.sampling.temperature = 1.0;
  options.sampling.seed = 5;
  return options;
}

std::vector<int64_t> One(Decoder* decoder, const Prompt& prompt, const GenerateOptions& options) {
  return Generate(decoder, std::span(&prompt, 1), options)->front().ids;
}

TEST(Generate, C12StopsAtEndOfTextAndAtTheMaximum) {
  for (const NamedConfig& named : EveryKind()) {
    Built built = BuildStrong(named.config, Precision::kFp32);
    const auto decoder = MakeDecoder(named.config, built);
    GenerateOptions options = Sampled(12);
    const std::vector<Generated> free = *Generate(decoder.get(), SomePrompts(), options);
    for (const Generated& made : free) {
      EXPECT_EQ(made.ids.size(), 12u);
      EXPECT_EQ(made.finish, Finish::kMaxNewTokens);
    }
    // The tokens that two sequences made at some place end every sequence that makes one of them.
    options.eos = {free[1].ids[4], free[2].ids[6]};
    const std::vector<Generated> stopped = *Generate(decoder.get(), SomePrompts(), options);
    for (size_t i = 0; i < free.size(); ++i) {
      const auto first = std::find_first_of(free[i].ids.begin(), free[i].ids.end(),
                                            options.eos.begin(), options.eos.end());
      const bool ends = first != free[i].ids.end();
      const std::vector<int64_t> expected(free[i].ids.begin(), ends ? first + 1 : first);
      EXPECT_EQ(stopped[i].ids, expected) << named.name << " " << i;
      EXPECT_EQ(stopped[i].finish, ends ? Finish::kEos : Finish::kMaxNewTokens);
    }
    EXPECT_LE(stopped[1].ids.size(), 5u);
    EXPECT_LE(stopped[2].ids.size(), 7u);
  }
}

TEST(Generate, C12StopsAtTheLongestSequenceOfTheModel) {
  const heddle::v1::ModelConfig config = EveryKind().back().config;
  Built built = BuildStrong(config, Precision::kFp32);
  const auto decoder = MakeDecoder(config, built);
  GenerateOptions options = Sampled(10);
  options.max_length = 14;
  const std::vector<Generated> made = *Generate(decoder.get(), SomePrompts(), options);
  EXPECT_EQ(made[2].ids.size(), 2u);
  EXPECT_EQ(made[2].finish, Finish::kMaxLength);
  EXPECT_EQ(made[0].ids.size(), 10u);
  EXPECT_EQ(made[0].finish, Finish::kMaxNewTokens);
  options.max_length = 12;
  const auto full = Generate(decoder.get(), SomePrompts(), options);
  EXPECT_EQ(full.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(Message(full.status()).find("prompt 2"), std::string::npos);
}

TEST(Generate, C4PermutingPromptsPermutesTheResults) {
  for (const NamedConfig& named : EveryKind()) {
    Built built = BuildStrong(named.config, Precision::kFp64);
    const auto decoder = MakeDecoder(named.config, built);
    for (const double temperature : {0.0, 1.0}) {
      GenerateOptions options = Sampled(20);
      options.sampling.temperature = temperature;
      const std::vector<Prompt> prompts = SomePrompts();
      const std::vector<Generated> made = *Generate(decoder.get(), prompts, options);
      const std::vector<size_t> order = {2, 3, 0, 1};
      std::vector<Prompt> permuted;
      for (const size_t i : order) permuted.push_back(prompts[i]);
      const std::vector<Generated> again = *Generate(decoder.get(), permuted, options);
      for (size_t i = 0; i < order.size(); ++i) {
        EXPECT_EQ(again[i].ids, made[order[i]].ids) << named.name << " " << i;
        // C2: nor does it matter what else runs.
        EXPECT_EQ(One(decoder.get(), permuted[i], options), again[i].ids) << named.name << " " << i;
      }
    }
  }
}

TEST(Generate, TheSeedAndTheStreamDecideTheDraws) {
  const heddle::v1::ModelConfig config = EveryKind().front().config;
  Built built = BuildStrong(config, Precision::kFp32);
  const auto decoder = MakeDecoder(config, built);
  GenerateOptions options = Sampled(16);
  const Prompt prompt{{3, 1, 4}, 0};
  const std::vector<int64_t> made = One(decoder.get(), prompt, options);
  EXPECT_EQ(One(decoder.get(), prompt, options), made);
  EXPECT_NE(One(decoder.get(), {prompt.ids, 1}, options), made);
  options.sampling.seed = 6;
  EXPECT_NE(One(decoder.get(), prompt, options), made);
  // A draw belongs to its position: what a longer prompt already holds does not shift it.
  options.sampling.seed = 5;
  Prompt longer = prompt;
  longer.ids.insert(longer.ids.end(), made.begin(), made.begin() + 6);
  EXPECT_EQ(One(decoder.get(), longer, Sampled(10)),
            std::vector<int64_t>(made.begin() + 6, made.end()));
}

// Bug 26: prompts run once, every new token but the last once.
TEST(Generate, NeverRunsThePrefixAgain) {
  for (const NamedConfig& named : EveryKind()) {
    Built built = BuildStrong(named.config, Precision::kFp32);
    const auto decoder = MakeDecoder(named.config, built);
    ASSERT_TRUE(Generate(decoder.get(), SomePrompts(), Sampled(15)).ok());
    EXPECT_EQ(decoder->counters().prefill_rows, 3 + 1 + 12 + 2) << named.name;
    EXPECT_EQ(decoder->counters().decode_rows, 4 * 14) << named.name;
  }
}

TEST(Generate, ReportsTheCacheOfEachSequence) {
  for (const NamedConfig& named : EveryKind()) {
    Built built = BuildStrong(named.config, Precision::kFp32);
    const auto decoder = MakeDecoder(named.config, built);
    const std::vector<Prompt> prompts = SomePrompts();
    const std::vector<Generated> made = *Generate(decoder.get(), prompts, Sampled(9));
    for (size_t i = 0; i < prompts.size(); ++i) {
      // The last token made was never fed.
      const int64_t length = static_cast<int64_t>(prompts[i].ids.size()) + 8;
      EXPECT_EQ(made[i].cache_bytes, model::KvCacheBytes(named.config, length, 4)) << named.name;
    }
  }
}

TEST(Generate, SeesEveryTokenAtOnce) {
  const heddle::v1::ModelConfig config = EveryKind().front().config;
  Built built = BuildStrong(config, Precision::kFp32);
  const auto decoder = MakeDecoder(config, built);
  std::vector<std::vector<int64_t>> seen(4);
  const std::vector<Generated> made =
      *Generate(decoder.get(), SomePrompts(), Sampled(5),
                [&](size_t prompt, int64_t token) { seen[prompt].push_back(token); });
  for (size_t i = 0; i < seen.size(); ++i) EXPECT_EQ(seen[i], made[i].ids);
}

TEST(Generate, RefusesAnEmptyPromptAndBadOptions) {
  const heddle::v1::ModelConfig config = EveryKind().front().config;
  Built built = BuildStrong(config, Precision::kFp32);
  const auto decoder = MakeDecoder(config, built);
  std::vector<Prompt> prompts = SomePrompts();
  prompts[1].ids.clear();
  const auto refused = Generate(decoder.get(), prompts, Sampled(3));
  EXPECT_EQ(refused.status().code(), StatusCode::kInvalidArgument);
  EXPECT_NE(Message(refused.status()).find("prompt 1: no token"), std::string::npos);
  EXPECT_FALSE(Generate(decoder.get(), SomePrompts(), Sampled(-1)).ok());
  prompts = SomePrompts();
  prompts[3].ids[0] = 999;
  EXPECT_FALSE(Generate(decoder.get(), prompts, Sampled(3)).ok());
  EXPECT_TRUE(Generate(decoder.get(), {}, Sampled(3))->empty());
  EXPECT_TRUE(Generate(decoder.get(), SomePrompts(), Sampled(0))->front().ids.empty());
  EXPECT_EQ(decoder->counters().prefill_rows, 0);
}

// Bug 45: a model that has diverged says so instead of making token 0.
TEST(Generate, SaysThatTheModelHasDiverged) {
  const heddle::v1::ModelConfig config = EveryKind().front().config;
  Built built = BuildStrong(config, Precision::kFp32);
  built.store->master()[0] = std::numeric_limits<float>::quiet_NaN();  // of the tied embedding
  const auto decoder = MakeDecoder(config, built);
  const std::vector<Prompt> prompts = {{{0, 1}, 0}};
  const auto made = Generate(decoder.get(), prompts, Sampled(3));
  EXPECT_EQ(made.status().code(), StatusCode::kInternal);
  EXPECT_NE(Message(made.status()).find("diverged"), std::string::npos);
}

}  // namespace
}  // namespace heddle::inference
