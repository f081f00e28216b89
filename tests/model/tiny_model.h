// Small models and batches for the tests of the language model.
#pragma once

#include <cstdint>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "base/rng/rng.h"
#include "heddle/v1/config.pb.h"
#include "model/language_model.h"
#include "model/parameter_store.h"

namespace heddle::model_test {

enum class Kind { kDense, kSwa, kHybrid };

// Odd sizes on purpose: no width is a multiple of the vector length.
inline heddle::v1::ModelConfig TinyConfig(Kind kind, bool tied) {
  heddle::v1::ModelConfig config;
  config.set_vocab_size(37);
  config.set_d_model(20);
  config.set_n_layers(3);
  config.set_n_heads(4);
  config.set_n_kv_heads(2);
  config.set_head_dim(6);
  config.set_d_ffn(28);
  config.set_tie_embeddings(tied);
  heddle::v1::AttentionConfig* attention = config.mutable_attention();
  if (kind != Kind::kDense) {
    attention->mutable_swa()->set_window(5);
    attention->mutable_swa()->set_sink_size(2);
  }
  if (kind == Kind::kSwa) attention->set_kind(heddle::v1::ATTENTION_KIND_SWA);
  if (kind == Kind::kHybrid) {
    attention->add_pattern(heddle::v1::ATTENTION_KIND_SWA);
    attention->add_pattern(heddle::v1::ATTENTION_KIND_DENSE);
  }
  return config;
}

struct Built {
  std::unique_ptr<model::ParameterStore> store;
  std::unique_ptr<model::LanguageModel> model;
};

inline Built Build(const heddle::v1::ModelConfig& config, model::Precision precision,
                   model::LanguageModelOptions options = {}, uint64_t seed = 7) {
  Built built;
  built.store = *model::ParameterStore::Create(*model::PlanModel(config), precision);
  model::InitParameters(seed, built.store.get());
  built.model = *model::LanguageModel::Create(config, built.store.get(), options);
  return built;
}

struct BatchData {
  std::vector<int64_t> ids;
  std::vector<int64_t> labels;
  std::vector<int32_t> cu = {0};

  model::PackedBatch view() const { return {ids, labels, cu}; }
};

inline void AppendDocument(const std::vector<int64_t>& document, BatchData* data);

// Random documents; the last token of each has no label.
inline BatchData RandomBatch(const std::vector<int32_t>& lengths, int64_t vocabulary,
                             uint64_t seed) {
  const Rng rng(seed, "test.batch");
  BatchData data;
  uint64_t counter = 0;
  for (const int32_t length : lengths) {
    std::vector<int64_t> document;
    for (int32_t i = 0; i < length; ++i) {
      document.push_back(
          static_cast<int64_t>(rng.BelowAt(counter++, static_cast<uint64_t>(vocabulary))));
    }
    AppendDocument(document, &data);
  }
  return data;
}

// The same without a token that repeats in a document. Equal tokens have equal scores where an
// indexer sees no positions: exact ties, which the last bits of a matrix product would break one
// way or the other. REQUIRES: no length above the vocabulary.
inline BatchData DistinctBatch(const std::vector<int32_t>& lengths, int64_t vocabulary,
                               uint64_t seed) {
  BatchData data;
  uint64_t number = 0;
  for (const int32_t length : lengths) {
    std::vector<int64_t> tokens(static_cast<size_t>(vocabulary));
    std::iota(tokens.begin(), tokens.end(), 0);
    Shuffle(Rng(seed, "test.batch").Child(std::to_string(number++)), tokens);
    tokens.resize(static_cast<size_t>(length));
    AppendDocument(tokens, &data);
  }
  return data;
}

inline void AppendDocument(const std::vector<int64_t>& document, BatchData* data) {
  for (size_t i = 0; i < document.size(); ++i) {
    data->ids.push_back(document[i]);
    data->labels.push_back(i + 1 < document.size() ? document[i + 1] : model::kIgnoredLabel);
  }
  data->cu.push_back(data->cu.back() + static_cast<int32_t>(document.size()));
}

}  // namespace heddle::model_test
