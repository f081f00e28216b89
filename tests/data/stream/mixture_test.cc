#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "data/stream/sequence_stream.h"
#include "tests/support/status_matchers.h"

namespace heddle::stream {
namespace {

// Appends one token: its name and the index it was asked for.
class NamedSource : public SequenceSource {
 public:
  explicit NamedSource(int64_t name) : name_(name) {}
  Status AppendAs(int64_t index, int64_t global_index, PackedBatch* batch) const override {
    batch->tokens.push_back(name_);
    batch->positions.push_back(index);
    batch->labels.push_back(global_index);
    return OkStatus();
  }
  SequenceShape Shape(int64_t index) const override { return {index, 1, name_, 1}; }
  std::string fingerprint() const override { return Str("named ", name_); }

 private:
  int64_t name_;
};

StatusOr<std::unique_ptr<SequenceSource>> Mix(const std::vector<double>& weights) {
  std::vector<WeightedSource> sources;
  for (size_t k = 0; k < weights.size(); ++k) {
    sources.push_back({std::make_shared<NamedSource>(static_cast<int64_t>(k)), weights[k]});
  }
  return MakeMixture(std::move(sources));
}

TEST(Mixture, KeepsEachSourceWithinOneOfItsShare) {
  for (const std::vector<double>& weights :
       {std::vector<double>{1}, {1, 1}, {0.7, 0.2, 0.1}, {1e-9, 1}, {3, 3, 3, 1}}) {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<SequenceSource> mixture, Mix(weights));
    double sum = 0;
    for (const double weight : weights) sum += weight;
    std::vector<int64_t> counts(weights.size(), 0);
    for (int64_t i = 0; i < 140000; ++i) {
      PackedBatch batch;
      ASSERT_OK(mixture->Append(i, &batch));
      const auto source = static_cast<size_t>(batch.tokens[0]);
      // Each source goes through its own sequences in order, and hashes with the mixture's index.
      ASSERT_EQ(batch.positions[0], counts[source]) << "index " << i;
      ASSERT_EQ(batch.labels[0], i);
      ASSERT_EQ(mixture->Shape(i).valid_labels, batch.tokens[0]);
      ASSERT_EQ(mixture->Shape(i).index, i);
      ++counts[source];
      for (size_t k = 0; k < weights.size(); ++k) {
        const double share = weights[k] / sum * static_cast<double>(i + 1);
        const double rounding = static_cast<double>(i + 1) / 65536 + 1e-9;
        ASSERT_NEAR(static_cast<double>(counts[k]), share, 1 + rounding) << "index " << i;
      }
    }
  }
}

TEST(Mixture, NamesItsOrderBySharesAndSources) {
  ASSERT_OK_AND_ASSIGN(const auto a, Mix({1, 2}));
  ASSERT_OK_AND_ASSIGN(const auto b, Mix({2, 4}));
  ASSERT_OK_AND_ASSIGN(const auto c, Mix({2, 1}));
  EXPECT_EQ(a->fingerprint(), b->fingerprint());
  EXPECT_NE(a->fingerprint(), c->fingerprint());
}

TEST(Mixture, RefusesWeightsWithoutMeaning) {
  EXPECT_STATUS(Mix({}), StatusCode::kInvalidArgument, "no source");
  for (const double weight : {0.0, -1.0, std::numeric_limits<double>::infinity(), std::nan("")}) {
    EXPECT_STATUS(Mix({1, weight}), StatusCode::kInvalidArgument, "must be positive");
  }
}

}  // namespace
}  // namespace heddle::stream
