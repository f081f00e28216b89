#include "model/inference/kv_cache.h"

#include <ATen/ops/empty.h>
#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "kernels/attention/reference.h"
#include "model/attention/gqa_layer.h"
#include "model/inference/decode_attention.h"
#include "model/model_costs.h"
#include "model/store_views.h"
#include "tests/model/golden.h"
#include "tests/model/inference/inference_models.h"

namespace heddle::inference {
namespace {

using inference_test::BuildStrong;
using inference_test::ConfigOf;
using inference_test::EveryKind;
using inference_test::FeedOne;
using inference_test::MakeDecoder;
using inference_test::NamedConfig;
using inference_test::Worst;
using model::Precision;
using model_test::Build;
using model_test::Built;
using model_test::Gen;
using model_test::Kind;
using model_test::RandomBatch;
using model_test::TinyConfig;

constexpr Quantization kBoth[] = {Quantization::kFp8, Quantization::kInt8};

at::Tensor Rows(int64_t rows, int64_t heads, int64_t width, double phase,
                at::ScalarType type = at::kFloat) {
  const at::Tensor values = at::empty({rows, heads, width}, at::kDouble);
  const std::vector<double> source = Gen(values.numel(), phase, 2.0);
  std::copy(source.begin(), source.end(), values.data_ptr<double>());
  return values.to(type);
}

at::Tensor Read(const RowStore& store, int64_t rows, int64_t heads, int64_t width,
                at::ScalarType type = at::kFloat) {
  const at::Tensor out = at::empty({rows, heads, width}, type);
  store.ReadFirst(out);
  return out;
}

TEST(RowStore, HoldsWhatWasWrittenAndReadsByIndex) {
  for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kDouble}) {
    const at::ScalarType wide = layers::StatisticsType(type);
    RowStore store({2, 5}, type);
    const at::Tensor rows = Rows(150, 2, 5, 0.2, type);
    store.Write(0, rows.narrow(0, 0, 3));
    store.Write(3, rows.narrow(0, 3, 147));  // grows
    EXPECT_EQ(Worst(Read(store, 150, 2, 5, wide), rows), 0.0);
    EXPECT_EQ(Worst(store.View(150), rows), 0.0);
    const std::vector<int32_t> index = {149, 0, 7, 7};
    const at::Tensor some = at::empty({4, 2, 5}, wide);
    store.Read(index, some);
    for (int64_t i = 0; i < 4; ++i) {
      EXPECT_EQ(Worst(some[i], rows[index[static_cast<size_t>(i)]]), 0.0);
    }
    // The first two dimensions of a projection's slice are not contiguous.
    store.Write(0, Rows(4, 6, 5, 0.9, type).narrow(1, 2, 2));
    EXPECT_EQ(Worst(store.View(4), Rows(4, 6, 5, 0.9, type).narrow(1, 2, 2)), 0.0);
  }
}

TEST(RowStore, QuantisedRowsAreNearAndExactRowsAreExact) {
  for (const Quantization quantization : kBoth) {
    for (const at::ScalarType type : {at::kFloat, at::kBFloat16, at::kDouble}) {
      RowStore store({2, 9}, type);
      const at::Tensor rows = Rows(40, 2, 9, 0.2, type);
      store.Write(0, rows.narrow(0, 0, 10));
      store.Quantize(quantization, /*exact=*/3, /*used=*/10);
      store.Write(10, rows.narrow(0, 10, 30));
      const at::Tensor back = Read(store, 40, 2, 9, layers::StatisticsType(type));
      EXPECT_EQ(Worst(back.narrow(0, 0, 3), rows.narrow(0, 0, 3)), 0.0);
      EXPECT_GT(Worst(back, rows), 0.0);
      EXPECT_LE(Worst(back, rows), 2.0 / (quantization == Quantization::kFp8 ? 28 : 253));
      const std::vector<int32_t> index = {39, 2, 3};
      const at::Tensor some = at::empty({3, 2, 9}, layers::StatisticsType(type));
      store.Read(index, some);
      for (int64_t i = 0; i < 3; ++i) {
        EXPECT_EQ(Worst(some[i], back[index[static_cast<size_t>(i)]]), 0.0);
      }
      const int64_t element = static_cast<int64_t>(c10::elementSize(type));
      EXPECT_EQ(store.BytesOf(40), 3 * 18 * element + 37 * (18 + 2 * 4));
    }
  }
}

// Section 10: 512 codes, 4 scales, 64 rotary values of 2 bytes in a row of MLA; 2 Hk (D + 4) in
// one of GQA.
TEST(RowStore, F4RowsHaveTheSizesOfTheirLayouts) {
  RowStore latent({1, 512, 128}, at::kBFloat16);
  latent.Quantize(Quantization::kFp8, 0, 0);
  EXPECT_EQ(latent.BytesOf(1) + 64 * 2, 656);
  KvCache gqa({2, 128, 128}, at::kBFloat16, {Quantization::kFp8, 0});
  gqa.Append(Rows(5, 2, 128, 0.1, at::kBFloat16), Rows(5, 2, 128, 0.2, at::kBFloat16));
  EXPECT_EQ(gqa.bytes(), 5 * 2 * 2 * (128 + 4));
}

TEST(KvCache, ARingHoldsTheWindowAndTheSinks) {
  for (const int64_t sinks : {0, 2, 9}) {
    const at::Tensor k = Rows(50, 1, 3, 0.1);
    const at::Tensor v = Rows(50, 1, 3, 0.7);
    for (const int64_t first : {0, 1, 4, 6, 8, 20, 50}) {  // prefill, then one by one
      KvCache cache({1, 3, 3, 5, sinks}, at::kFloat, {});
      cache.Append(k.narrow(0, 0, first), v.narrow(0, 0, first));
      for (int64_t t = first; t < 50; ++t) cache.Append(k.narrow(0, t, 1), v.narrow(0, t, 1));
      EXPECT_EQ(cache.length(), 50);
      EXPECT_EQ(cache.rows(), 5 + sinks);
      for (int64_t s = 0; s < 50; ++s) {
        if (s >= sinks && s < 45) continue;
        const int64_t row = s < sinks ? s : sinks + (s - sinks) % 5;
        EXPECT_EQ(Worst(cache.keys().View(5 + sinks)[row], k[s]), 0.0) << s;
        EXPECT_EQ(Worst(cache.values().View(5 + sinks)[row], v[s]), 0.0) << s;
      }
    }
  }
}

// The switch converts the whole prefix once: from then on the cache holds the codes of one that
// was quantised from the start, whatever the steps in which rows came.
TEST(KvCache, F5AfterTheThresholdTheCacheIsThatOfOneQuantisedFromTheStart) {
  for (const Quantization quantization : kBoth) {
    for (const int64_t window : {0, 30}) {
      const at::Tensor k = Rows(60, 2, 7, 0.1);
      const at::Tensor v = Rows(60, 2, 7, 0.7);
      KvCache always({2, 7, 7, window, 2}, at::kFloat, {quantization, 0});
      KvCache later({2, 7, 7, window, 2}, at::kFloat, {quantization, 20});
      KvCache never({2, 7, 7, window, 2}, at::kFloat, {});
      int64_t t = 0;
      for (const int64_t step : {7, 12, 1, 1, 1, 18, 20}) {
        for (KvCache* cache : {&always, &later, &never}) {
          cache->Append(k.narrow(0, t, step), v.narrow(0, t, step));
        }
        t += step;
        EXPECT_EQ(later.quantized(), t > 20);
        const KvCache& same = t > 20 ? always : never;
        const int64_t rows = later.rows();
        EXPECT_EQ(Worst(Read(later.keys(), rows, 2, 7), Read(same.keys(), rows, 2, 7)), 0.0) << t;
        EXPECT_EQ(Worst(Read(later.values(), rows, 2, 7), Read(same.values(), rows, 2, 7)), 0.0);
        EXPECT_EQ(later.bytes(), same.bytes());
      }
      // The rows of the compute type are gone.
      EXPECT_LT(later.allocated_bytes(), never.allocated_bytes());
    }
  }
}

// One decoding layer, against the reference on rows that went through the cache's format: every
// token attends to its own quantised row, sinks stay exact.
TEST(DecodeAttention, ATokenAttendsToQuantisedRowsItsOwnIncluded) {
  for (const Kind kind : {Kind::kDense, Kind::kSwa}) {
    for (const Quantization quantization : kBoth) {
      const heddle::v1::ModelConfig config = TinyConfig(kind, true);
      Built built = Build(config, Precision::kFp64);
      layers::RopeSet ropes(config, true);
      ropes.Ensure(64);
      const layers::LayerStorage storage = model::StoragesOf(*built.store).front();
      DecodeShared shared;
      const auto layer =
          MakeDecodeAttention({&config, &ropes, &shared, {quantization, 0}}, storage);
      const auto cache = layer->MakeCache();
      const attention::QkvProjection projection(config, storage, &ropes);
      const model::Heads heads = projection.heads();
      const int64_t tokens = 20;
      const at::Tensor h = Rows(tokens, 1, config.d_model(), 0.3, at::kDouble).squeeze(1);
      std::vector<int32_t> positions;
      for (int32_t t = 0; t < tokens; ++t) positions.push_back(t);
      const at::Tensor qkv = at::empty({tokens, projection.columns()}, at::kDouble);
      projection.Project(h, qkv);
      projection.Rotate(positions, false, qkv);
      const attention::HeadViews views = attention::SplitHeads(heads, qkv);
      const bool swa = kind == Kind::kSwa;
      const auto round_trip = [&](const at::Tensor& rows) {
        RowStore store({heads.kv, heads.dim}, at::kDouble);
        store.Quantize(quantization, swa ? 2 : 0, 0);
        store.Write(0, rows);
        return Read(store, tokens, heads.kv, heads.dim, at::kDouble);
      };
      const at::Tensor q = views.q.contiguous();
      const at::Tensor k = round_trip(views.k);
      const at::Tensor v = round_trip(views.v);
      const at::Tensor expected = at::empty({tokens, heads.query * heads.dim}, at::kDouble);
      const at::Tensor lse = at::empty({tokens, heads.query}, at::kDouble);
      const std::vector<int32_t> cu = {0, static_cast<int32_t>(tokens)};
      const kernels::attention::Shape shape{heads.query,
                                            heads.kv,
                                            heads.dim,
                                            heads.dim,
                                            1,
                                            cu.data(),
                                            1.0 / std::sqrt(static_cast<double>(heads.dim)),
                                            swa ? 5 : 0,
                                            swa ? 2 : 0};
      kernels::attention::ReferenceForward(shape, q.data_ptr<double>(), k.data_ptr<double>(),
                                           v.data_ptr<double>(), expected.data_ptr<double>(),
                                           lse.data_ptr<double>());
      const at::Tensor projected = expected.matmul(storage.Weight("self_attn.o_proj.weight").t());
      layers::BufferPool pool;
      const at::Tensor zero = at::empty({1, config.d_model()}, at::kDouble).zero_();
      for (int32_t t = 0; t < tokens; ++t) {
        layers::PassContext context;
        const std::vector<int32_t> one = {0, 1};
        const layers::Documents documents{one, std::span(positions).subspan(t, 1), 1};
        context.documents = &documents;
        context.kept = context.scratch = &pool;
        const at::Tensor out = at::empty({1, config.d_model()}, at::kDouble);
        layer->Continue({cache.get()});
        layer->Forward(context, h.narrow(0, t, 1), zero, out);
        ASSERT_LE(Worst(out[0], projected[t]), 1e-12) << t;
      }
    }
  }
}

// A prompt as long as the threshold is not quantised, the next token quantises it: from there on
// the logits are those of a cache that always was.
TEST(Decoder, F5TheSwitchGivesTheLogitsOfACacheThatWasAlwaysQuantised) {
  for (const NamedConfig& named : EveryKind()) {
    Built built = BuildStrong(named.config, Precision::kFp32);
    for (const Quantization quantization : kBoth) {
      const model_test::BatchData batch = RandomBatch({40}, named.config.vocab_size(), 8);
      const auto always = MakeDecoder(named.config, built, {quantization, 0});
      const auto later = MakeDecoder(named.config, built, {quantization, 16});
      const auto never = MakeDecoder(named.config, built);
      const SequenceId a = always->Open();
      const SequenceId b = later->Open();
      const SequenceId c = never->Open();
      const std::span<const int64_t> ids(batch.ids);
      FeedOne(always.get(), a, ids.first(16));
      FeedOne(later.get(), b, ids.first(16));
      FeedOne(never.get(), c, ids.first(16));
      EXPECT_EQ(later->cache_bytes(b), never->cache_bytes(c));
      double apart = 0;
      for (size_t t = 16; t < 40; ++t) {
        const at::Tensor one = FeedOne(always.get(), a, ids.subspan(t, 1));
        const at::Tensor other = FeedOne(later.get(), b, ids.subspan(t, 1));
        ASSERT_EQ(Worst(one, other), 0.0) << named.name << " " << t;
        ASSERT_EQ(always->cache_bytes(a), later->cache_bytes(b)) << named.name;
        apart = std::max(apart, Worst(one, FeedOne(never.get(), c, ids.subspan(t, 1))));
      }
      EXPECT_GT(apart, 1e-5) << named.name;  // the option has an effect
    }
  }
}

// Rows of the first layer depend on the tokens alone, so in a model of one layer the switch may
// come anywhere.
TEST(Decoder, F5ASwitchBetweenTwoTokensLosesNothing) {
  for (const char* name : {"dense", "swa", "nsa", "dsa seed", "gsa", "mla"}) {
    heddle::v1::ModelConfig config = ConfigOf(name);
    config.set_n_layers(1);
    Built built = BuildStrong(config, Precision::kFp32);
    for (const Quantization quantization : kBoth) {
      const model_test::BatchData batch = RandomBatch({40}, config.vocab_size(), 8);
      const auto always = MakeDecoder(config, built, {quantization, 0});
      const auto later = MakeDecoder(config, built, {quantization, 25});
      const SequenceId a = always->Open();
      const SequenceId b = later->Open();
      for (size_t t = 0; t < 40; ++t) {
        const at::Tensor one = FeedOne(always.get(), a, std::span(batch.ids).subspan(t, 1));
        const at::Tensor other = FeedOne(later.get(), b, std::span(batch.ids).subspan(t, 1));
        if (t >= 25) {
          ASSERT_EQ(Worst(one, other), 0.0) << name << " " << t;
        }
      }
    }
  }
}

TEST(Decoder, C13AQuantisedCacheTakesTheBytesOfTheFormula) {
  for (const NamedConfig& named : EveryKind()) {
    for (const Precision precision : {Precision::kBf16, Precision::kFp32}) {
      const int element = precision == Precision::kBf16 ? 2 : 4;
      Built built = BuildStrong(named.config, precision);
      const auto decoder = MakeDecoder(named.config, built, {Quantization::kFp8, 10});
      const model_test::BatchData batch = RandomBatch({30}, named.config.vocab_size(), 8);
      const SequenceId sequence = decoder->Open(30);
      FeedOne(decoder.get(), sequence, std::span(batch.ids).first(10));
      EXPECT_EQ(decoder->cache_bytes(sequence), model::KvCacheBytes(named.config, 10, element))
          << named.name;
      FeedOne(decoder.get(), sequence, std::span(batch.ids).subspan(10));
      const model::CacheFormat format{element, /*quantized=*/true, /*quantized_index=*/false};
      EXPECT_EQ(decoder->cache_bytes(sequence), model::CacheBytes(named.config, 30, format))
          << named.name;
      EXPECT_EQ(decoder->allocated_bytes(sequence), decoder->cache_bytes(sequence)) << named.name;
    }
  }
}

// The same by hand for one model of windows and sinks.
TEST(Decoder, C13BytesOfAWindowByHand) {
  const heddle::v1::ModelConfig config = ConfigOf("swa+dense");  // swa, dense, swa
  Built built = BuildStrong(config, Precision::kBf16);
  const auto decoder = MakeDecoder(config, built, {Quantization::kInt8, 0});
  const SequenceId sequence = decoder->Open(30);
  FeedOne(decoder.get(), sequence, RandomBatch({30}, config.vocab_size(), 8).ids);
  const int64_t row = 2 * 2 * (6 + 4);  // K and V, 2 heads, 6 codes and a scale
  const int64_t sink = 2 * 2 * 6 * 2;
  EXPECT_EQ(decoder->cache_bytes(sequence), 30 * row + 2 * (5 * row + 2 * sink));
}

TEST(Decoder, M2TheCacheOfMlaHoldsTheLatentAndTheRotaryPart) {
  const heddle::v1::ModelConfig config = ConfigOf("mla");
  Built built = BuildStrong(config, Precision::kBf16);
  const auto decoder = MakeDecoder(config, built);
  const SequenceId sequence = decoder->Open();
  FeedOne(decoder.get(), sequence, RandomBatch({21}, config.vocab_size(), 8).ids);
  EXPECT_EQ(decoder->cache_bytes(sequence), int64_t{21} * config.n_layers() * (12 + 4) * 2);
}

}  // namespace
}  // namespace heddle::inference
