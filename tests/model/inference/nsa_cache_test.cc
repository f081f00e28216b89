#include "model/inference/nsa_cache.h"

#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include "model/store_views.h"
#include "tests/model/golden.h"
#include "tests/model/inference/inference_models.h"

namespace heddle::inference {
namespace {

using inference_test::BuildStrong;
using inference_test::ConfigOf;
using inference_test::Worst;

at::Tensor Rows(int64_t count, int64_t width, double phase) {
  const at::Tensor rows = at::empty({count, width}, at::kDouble);
  const std::vector<double> values = model_test::Gen(count * width, phase);
  std::copy(values.begin(), values.end(), rows.data_ptr<double>());
  return rows;
}

at::Tensor Read(const RowStore& store, int64_t rows) {
  const at::Tensor out = at::empty({rows, 2, 6}, at::kDouble);
  store.ReadFirst(out);
  return out;
}

class NsaCacheTest : public testing::TestWithParam<const char*> {
 protected:
  NsaCacheTest()
      : config_(ConfigOf(GetParam())),
        built_(BuildStrong(config_, model::Precision::kFp64)),
        ropes_(config_, true),
        weights_(config_, model::StoragesOf(*built_.store).front(), &ropes_) {
    ropes_.Ensure(64);
  }

  // Rows of 40 tokens as the layer projects them.
  layers::CacheRows Projected() {
    std::vector<int32_t> positions;
    for (int32_t t = 0; t < 40; ++t) positions.push_back(t);
    const attention::NsaRows made =
        weights_.Project(Rows(40, config_.d_model(), 0.4), positions, &rows_pool_);
    layers::CacheRows rows;
    rows.k = made.k;
    rows.v = made.v;
    rows.raw_k = made.raw_k;
    rows.raw_v = made.raw_v;
    rows.window_k = made.window_k;
    rows.window_v = made.window_v;
    return rows;
  }
  NsaCache Make() { return NsaCache(&weights_, at::kDouble, {}, &pool_); }

  heddle::v1::ModelConfig config_;
  model_test::Built built_;
  layers::RopeSet ropes_;
  attention::NsaWeights weights_;
  layers::BufferPool rows_pool_;
  layers::BufferPool pool_;
};

TEST_P(NsaCacheTest, N10EmissionEqualsPrefillAtEveryTokenOnceEveryStride) {
  const layers::CacheRows rows = Projected();
  const attention::Compression& c = weights_.shape().compression;
  NsaCache stepped = Make();
  for (int64_t t = 0; t < 40; ++t) {
    stepped.Append(rows, t, t + 1);
    const int64_t windows = attention::WindowCount(c, t + 1);
    ASSERT_EQ(stepped.windows(), windows);
    ASSERT_EQ(stepped.emissions(), windows);  // nothing is compressed twice
    NsaCache prompt = Make();
    prompt.Append(rows, 0, t + 1);
    ASSERT_EQ(prompt.windows(), windows);
    ASSERT_LE(
        Worst(Read(prompt.compressed_keys(), windows), Read(stepped.compressed_keys(), windows)),
        1e-12);
    ASSERT_LE(Worst(Read(prompt.compressed_values(), windows),
                    Read(stepped.compressed_values(), windows)),
              1e-12);
    ASSERT_EQ(prompt.bytes(), stepped.bytes());
  }
}

// A prompt of any length leaves the raw rows that the next windows need.
TEST_P(NsaCacheTest, N10TokensAfterAPromptCompleteItsWindows) {
  const layers::CacheRows rows = Projected();
  NsaCache whole = Make();
  whole.Append(rows, 0, 40);
  const int64_t windows = whole.windows();
  for (int64_t prompt = 1; prompt < 40; ++prompt) {
    NsaCache cache = Make();
    cache.Append(rows, 0, prompt);
    cache.Append(rows, prompt, 40);
    ASSERT_EQ(cache.windows(), windows);
    ASSERT_EQ(cache.emissions(), windows);
    ASSERT_LE(Worst(Read(cache.compressed_keys(), windows), Read(whole.compressed_keys(), windows)),
              1e-12)
        << prompt;
    ASSERT_LE(
        Worst(Read(cache.compressed_values(), windows), Read(whole.compressed_values(), windows)),
        1e-12);
  }
}

INSTANTIATE_TEST_SUITE_P(Projections, NsaCacheTest,
                         testing::Values("nsa", "nsa separate linear", "nsa avgpool l=r"),
                         [](const auto& info) { return std::to_string(info.index); });

}  // namespace
}  // namespace heddle::inference
