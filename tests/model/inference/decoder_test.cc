#include "model/inference/decoder.h"

#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <map>

#include "tests/model/inference/inference_models.h"

namespace heddle::inference {
namespace {

using inference_test::BuildStrong;
using inference_test::EveryKind;
using inference_test::FeedOne;
using inference_test::MakeDecoder;
using inference_test::NamedConfig;
using inference_test::Worst;
using model::Precision;
using model_test::BatchData;
using model_test::Built;
using model_test::RandomBatch;

constexpr double kTolerance = 1e-10;

// C3, S3, N10, G8, M4: 60 tokens are many windows and blocks, so that rings have wrapped around.
TEST(Decoder, C3DecodeEqualsPrefillAtEveryPosition) {
  for (const NamedConfig& named : EveryKind()) {
    Built built = BuildStrong(named.config, Precision::kFp64);
    const BatchData batch = RandomBatch({60}, named.config.vocab_size(), 3);
    const at::Tensor logits = *built.model->Logits(batch.view());
    const auto decoder = MakeDecoder(named.config, built);
    for (const size_t prompt : {1u, 2u, 6u, 7u, 8u, 23u, 59u}) {
      const SequenceId sequence = decoder->Open();
      const std::span<const int64_t> ids(batch.ids);
      const at::Tensor first = FeedOne(decoder.get(), sequence, ids.first(prompt));
      EXPECT_LE(Worst(first, logits[static_cast<int64_t>(prompt) - 1]), kTolerance);
      for (size_t t = prompt; t < 60; ++t) {
        const at::Tensor next = FeedOne(decoder.get(), sequence, ids.subspan(t, 1));
        ASSERT_LE(Worst(next, logits[static_cast<int64_t>(t)]), kTolerance)
            << named.name << " prompt " << prompt << " position " << t;
      }
      decoder->Close(sequence);
    }
  }
}

// Keys that a layer scores for the token at position t, by the formulas of sections
// 4, 5.5, 6.4, 7.4 and 8, once per key head: lowest and highest, which differ where GSA adapts k.
struct KeyRange {
  int64_t low = 0;
  int64_t high = 0;
};
KeyRange KeysOfLayer(const heddle::v1::ModelConfig& config, int layer, int64_t t) {
  const int64_t visible = t + 1;
  const auto& attention = config.attention();
  const int64_t heads = config.n_kv_heads();
  const auto same = [](int64_t keys) { return KeyRange{keys, keys}; };
  switch (model::LayerKind(config, layer)) {
    case heddle::v1::ATTENTION_KIND_SWA:
      return same(heads * std::min<int64_t>(
                              visible, attention.swa().window() + attention.swa().sink_size()));
    case heddle::v1::ATTENTION_KIND_NSA: {
      const auto& nsa = attention.nsa();
      const int64_t windows =
          visible < nsa.kernel_size() ? 0 : (visible - nsa.kernel_size()) / nsa.kernel_stride() + 1;
      const int64_t block = nsa.block_size();
      const int64_t blocks = (visible + block - 1) / block;
      const int64_t chosen = std::min<int64_t>(nsa.topk(), blocks);
      const int64_t window = std::min<int64_t>(visible, nsa.window_size());
      // The newest block may be cut short, and only a forced one is always among the selected.
      const int64_t cut = blocks * block - visible;
      const bool forced = nsa.local_blocks() > 0 || chosen == blocks;
      return {heads * (windows + chosen * block - cut + window),
              heads * (windows + chosen * block - (forced ? cut : 0) + window)};
    }
    case heddle::v1::ATTENTION_KIND_DSA: {
      const int64_t keys = std::min<int64_t>(attention.dsa().topk(), visible);
      return same(model::LayerUsesLatent(config, layer) ? keys : heads * keys);
    }
    case heddle::v1::ATTENTION_KIND_GSA: {
      const auto& gsa = attention.gsa();
      const int64_t dense = gsa.dense_residual_alpha() > 0 ? heads * visible : 0;
      const int64_t low = gsa.use_adaptive_k() ? gsa.k_min() : gsa.k_base();
      const int64_t high = gsa.use_adaptive_k() ? gsa.k_max() : gsa.k_base();
      return {heads * std::min<int64_t>(low, visible) + dense,
              heads * std::min<int64_t>(high, visible) + dense};
    }
    case heddle::v1::ATTENTION_KIND_MLA:
      return same(visible);
    default:
      return same(heads * visible);
  }
}

TEST(Decoder, X4AttendsToAsManyKeysAsTheFormulasCount) {
  for (const NamedConfig& named : EveryKind()) {
    Built built = BuildStrong(named.config, Precision::kFp64);
    const BatchData batch = RandomBatch({60}, named.config.vocab_size(), 3);
    for (const Quantization quantization : {Quantization::kNone, Quantization::kInt8}) {
      const auto decoder = MakeDecoder(named.config, built, {quantization, 0});
      const SequenceId sequence = decoder->Open();
      const std::span<const int64_t> ids(batch.ids);
      FeedOne(decoder.get(), sequence, ids.first(3));
      for (int64_t t = 3; t < 60; ++t) {
        KeyRange expected;
        for (int layer = 0; layer < named.config.n_layers(); ++layer) {
          const KeyRange keys = KeysOfLayer(named.config, layer, t);
          expected.low += keys.low;
          expected.high += keys.high;
        }
        const int64_t before = decoder->counters().attended_keys;
        FeedOne(decoder.get(), sequence, ids.subspan(static_cast<size_t>(t), 1));
        const int64_t keys = decoder->counters().attended_keys - before;
        ASSERT_GE(keys, expected.low) << named.name << " position " << t;
        ASSERT_LE(keys, expected.high) << named.name << " position " << t;
      }
    }
  }
}

TEST(Decoder, C3ATurnOfSeveralTokensEqualsTheTokensOneByOne) {
  for (const NamedConfig& named : EveryKind()) {
    Built built = BuildStrong(named.config, Precision::kFp64);
    const BatchData batch = RandomBatch({40}, named.config.vocab_size(), 5);
    const at::Tensor logits = *built.model->Logits(batch.view());
    const auto decoder = MakeDecoder(named.config, built);
    const SequenceId sequence = decoder->Open();
    const std::span<const int64_t> ids(batch.ids);
    FeedOne(decoder.get(), sequence, ids.first(9));
    EXPECT_LE(Worst(FeedOne(decoder.get(), sequence, ids.subspan(9, 20)), logits[28]), kTolerance);
    EXPECT_EQ(decoder->length(sequence), 29);
    EXPECT_LE(Worst(FeedOne(decoder.get(), sequence, ids.subspan(29, 11)), logits[39]), kTolerance);
  }
}

// Sequences of unequal length in one batch, in another order at each step, some of them pausing:
// every row has the logits of its document in a forward over whole documents.
TEST(Decoder, C2C4ABatchOfUnequalLengthsEqualsEachSequenceAlone) {
  const std::vector<int32_t> lengths = {31, 20, 44, 23, 37};
  const std::vector<size_t> prompts = {12, 1, 25, 4, 18};
  for (const NamedConfig& named : EveryKind()) {
    Built built = BuildStrong(named.config, Precision::kFp64);
    const BatchData batch = RandomBatch(lengths, named.config.vocab_size(), 11);
    const at::Tensor logits = *built.model->Logits(batch.view());
    const auto decoder = MakeDecoder(named.config, built);
    std::vector<SequenceId> sequences;
    std::vector<Turn> turns;
    std::map<SequenceId, size_t> index;
    const auto ids = [&](size_t b) {
      return std::span<const int64_t>(batch.ids).subspan(static_cast<size_t>(batch.cu[b]),
                                                         static_cast<size_t>(lengths[b]));
    };
    const auto check = [&](const std::vector<Turn>& fed, int step) {
      const at::Tensor got = *decoder->Feed(fed);
      for (size_t i = 0; i < fed.size(); ++i) {
        const size_t b = index.at(fed[i].sequence);
        const int64_t row = batch.cu[b] + decoder->length(fed[i].sequence) - 1;
        ASSERT_LE(Worst(got[static_cast<int64_t>(i)], logits[row]), kTolerance)
            << named.name << " sequence " << b << " step " << step;
      }
    };
    for (const size_t b : {3u, 0u, 4u, 1u, 2u}) {
      const SequenceId sequence = decoder->Open();
      index[sequence] = b;
      sequences.push_back(sequence);
      turns.push_back({sequence, ids(b).first(prompts[b])});
    }
    check(turns, -1);
    for (int step = 0; step < 30; ++step) {
      turns.clear();
      for (size_t i = 0; i < sequences.size(); ++i) {
        const SequenceId sequence = sequences[(i + static_cast<size_t>(step)) % sequences.size()];
        const size_t b = index.at(sequence);
        const size_t done = static_cast<size_t>(decoder->length(sequence));
        if (done == ids(b).size() || (step + static_cast<int>(i)) % 4 == 0) continue;
        turns.push_back({sequence, ids(b).subspan(done, 1)});
      }
      check(turns, step);
    }
  }
}

// A new prompt starts while another sequence decodes.
TEST(Decoder, C2PromptsAndTokensShareACall) {
  for (const NamedConfig& named : EveryKind()) {
    Built built = BuildStrong(named.config, Precision::kFp64);
    const BatchData batch = RandomBatch({20, 15}, named.config.vocab_size(), 12);
    const at::Tensor logits = *built.model->Logits(batch.view());
    const auto decoder = MakeDecoder(named.config, built);
    const std::span<const int64_t> ids(batch.ids);
    const SequenceId a = decoder->Open();
    const SequenceId b = decoder->Open();
    FeedOne(decoder.get(), a, ids.first(10));
    const std::vector<Turn> turns = {{b, ids.subspan(20, 7)}, {a, ids.subspan(10, 3)}};
    const at::Tensor got = *decoder->Feed(turns);
    EXPECT_LE(Worst(got[0], logits[26]), kTolerance) << named.name;
    EXPECT_LE(Worst(got[1], logits[12]), kTolerance) << named.name;
  }
}

TEST(Decoder, C13CachesTakeTheBytesOfTheFormula) {
  for (const NamedConfig& named : EveryKind()) {
    Built built = BuildStrong(named.config, Precision::kBf16);
    const auto decoder = MakeDecoder(named.config, built);
    const BatchData batch = RandomBatch({70}, named.config.vocab_size(), 3);
    const SequenceId sequence = decoder->Open(/*reserve=*/70);
    EXPECT_EQ(decoder->allocated_bytes(sequence), model::KvCacheBytes(named.config, 70, 2))
        << named.name;
    FeedOne(decoder.get(), sequence, std::span(batch.ids).first(30));
    EXPECT_EQ(decoder->cache_bytes(sequence), model::KvCacheBytes(named.config, 30, 2))
        << named.name;
    for (size_t t = 30; t < 70; ++t) {
      FeedOne(decoder.get(), sequence, std::span(batch.ids).subspan(t, 1));
      const int64_t length = static_cast<int64_t>(t) + 1;
      EXPECT_EQ(decoder->cache_bytes(sequence), model::KvCacheBytes(named.config, length, 2))
          << named.name << " " << length;
    }
    // All of it used, nothing allocated beside it.
    EXPECT_EQ(decoder->allocated_bytes(sequence), decoder->cache_bytes(sequence)) << named.name;
  }
}

// Bug 26: a decoder that runs the prefix again would show it here.
TEST(Decoder, EveryTokenRunsThroughTheBlocksOnce) {
  for (const NamedConfig& named : EveryKind()) {
    Built built = BuildStrong(named.config, Precision::kFp32);
    const auto decoder = MakeDecoder(named.config, built);
    const BatchData batch = RandomBatch({25}, named.config.vocab_size(), 4);
    const SequenceId sequence = decoder->Open();
    FeedOne(decoder.get(), sequence, std::span(batch.ids).first(10));
    EXPECT_EQ(decoder->counters().prefill_rows, 10);
    EXPECT_EQ(decoder->counters().decode_rows, 0);
    for (size_t t = 10; t < 25; ++t) {
      FeedOne(decoder.get(), sequence, std::span(batch.ids).subspan(t, 1));
    }
    EXPECT_EQ(decoder->counters().prefill_rows, 10);
    EXPECT_EQ(decoder->counters().decode_rows, 15);
  }
}

TEST(Decoder, RefusesTurnsItCannotFeedAndChangesNothing) {
  const heddle::v1::ModelConfig config = EveryKind().front().config;
  Built built = BuildStrong(config, Precision::kFp32);
  const auto decoder = MakeDecoder(config, built);
  const SequenceId a = decoder->Open();
  const SequenceId b = decoder->Open();
  const std::vector<int64_t> good = {1, 2};
  const std::vector<int64_t> high = {1, 37};
  const std::vector<int64_t> low = {-1};
  const auto message = [&](const std::vector<Turn>& turns) {
    const auto fed = decoder->Feed(turns);
    EXPECT_EQ(fed.status().code(), StatusCode::kInvalidArgument);
    return Message(fed.status());
  };
  EXPECT_NE(message({{a, good}, {b, {}}}).find("turn 1: no token"), std::string::npos);
  EXPECT_NE(message({{a, good}, {b, high}}).find("37"), std::string::npos);
  EXPECT_NE(message({{a, low}}).find("-1"), std::string::npos);
  EXPECT_NE(message({{a, good}, {a, good}}).find("twice"), std::string::npos);
  decoder->Close(b);
  EXPECT_NE(message({{a, good}, {b, good}}).find("not open"), std::string::npos);
  EXPECT_EQ(decoder->length(a), 0);
  EXPECT_EQ(decoder->counters().prefill_rows, 0);
  EXPECT_EQ(decoder->Feed({})->size(0), 0);
}

TEST(Decoder, RefusesAStoreOfAnotherModel) {
  Built built = BuildStrong(EveryKind().front().config, Precision::kFp32);
  heddle::v1::ModelConfig other = EveryKind().front().config;
  other.set_n_layers(2);
  EXPECT_FALSE(Decoder::Create(other, built.store.get()).ok());
}

}  // namespace
}  // namespace heddle::inference
