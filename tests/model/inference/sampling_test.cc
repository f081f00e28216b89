#include "model/inference/sampling.h"

#include <gtest/gtest.h>

#include <cmath>
#include <map>
#include <vector>

namespace heddle::inference {
namespace {

const std::vector<float> kLogits = {std::log(0.1f), std::log(0.4f), std::log(0.2f), std::log(0.3f)};

std::map<int64_t, double> Frequencies(SamplingOptions options, uint64_t stream = 0) {
  options.temperature = 1.0;
  std::map<int64_t, double> counts;
  for (int64_t position = 0; position < 20'000; ++position) {
    counts[*SampleToken(kLogits, options, {stream, position})] += 1.0 / 20'000;
  }
  return counts;
}

TEST(SampleToken, GreedyTakesTheFirstOfTheHighest) {
  const float nan = std::nanf("");
  EXPECT_EQ(*SampleToken(std::vector<float>{1, 5, nan, 5, 2}, {}, {}), 1);
}

TEST(SampleToken, FollowsTheProbabilitiesWithinTopKAndTopP) {
  const auto all = Frequencies({});
  EXPECT_NEAR(all.at(0), 0.1, 0.01);
  EXPECT_NEAR(all.at(1), 0.4, 0.015);
  const auto two = Frequencies({1.0, 2, 1.0, 0});
  EXPECT_EQ(two.size(), 2u);
  EXPECT_NEAR(two.at(1), 4.0 / 7.0, 0.015);
  // 0.4 + 0.3 reaches 0.6; 0.4 alone does not.
  const auto nucleus = Frequencies({1.0, 0, 0.6, 0});
  EXPECT_EQ(nucleus.size(), 2u);
  EXPECT_TRUE(nucleus.contains(3));
}

TEST(SampleToken, DrawsDependOnSeedStreamAndPositionOnly) {
  const SamplingOptions options{1.0, 0, 1.0, 9};
  int other_seed = 0;
  int other_stream = 0;
  for (int64_t position = 0; position < 100; ++position) {
    const int64_t token = *SampleToken(kLogits, options, {4, position});
    EXPECT_EQ(*SampleToken(kLogits, options, {4, position}), token);
    other_stream += *SampleToken(kLogits, options, {5, position}) != token;
    other_seed += *SampleToken(kLogits, {1.0, 0, 1.0, 10}, {4, position}) != token;
  }
  EXPECT_GT(other_seed, 20);
  EXPECT_GT(other_stream, 20);
  EXPECT_NEAR(Frequencies({}, 77).at(1), 0.4, 0.015);
}

TEST(SampleToken, LowTemperaturesTendToGreedyAndHighOnesToUniform) {
  const auto count = [](double temperature) {
    int greedy = 0;
    for (int64_t position = 0; position < 4000; ++position) {
      greedy += *SampleToken(kLogits, {temperature, 0, 1.0, 1}, {0, position}) == 1;
    }
    return greedy / 4000.0;
  };
  EXPECT_GT(count(0.05), 0.99);
  EXPECT_NEAR(count(1.0), 0.4, 0.03);
  EXPECT_NEAR(count(100.0), 0.25, 0.03);
}

TEST(SampleToken, RefusesLogitsThatAreNotFinite) {
  const float nan = std::nanf("");
  EXPECT_EQ(SampleToken(std::vector<float>{nan, nan}, {}, {}).status().code(),
            StatusCode::kInternal);
  EXPECT_EQ(SampleToken(std::vector<float>{1, INFINITY}, {1.0, 0, 1.0, 0}, {}).status().code(),
            StatusCode::kInternal);
}

TEST(SampleToken, NamesTheOptionOutOfRange) {
  EXPECT_NE(Message(CheckSampling({-1.0, 0, 1.0, 0})).find("temperature"), std::string::npos);
  EXPECT_NE(Message(CheckSampling({1.0, -1, 1.0, 0})).find("top-k"), std::string::npos);
  EXPECT_NE(Message(CheckSampling({1.0, 0, 0.0, 0})).find("top-p"), std::string::npos);
}

}  // namespace
}  // namespace heddle::inference
