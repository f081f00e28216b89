// heddle-model generate: continues prompts, several at once as one batch.
#include <charconv>
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/clock/clock.h"
#include "base/settings/settings.h"
#include "data/tokenizer/tokenizer.h"
#include "model/inference/decoder.h"
#include "model/inference/generate.h"
#include "model/tool/model_source.h"
#include "model/tool/verbs.h"

namespace heddle::tool {
namespace {

using nlohmann::json;

// What the source says about the cache, under the overrides.
StatusOr<heddle::v1::KvCacheConfig> CacheConfig(const std::vector<std::string>& overrides,
                                                const ModelSource& source) {
  bool threshold = false;
  for (const std::string& text : overrides) {
    if (text.rfind("memory.kv_cache.", 0) != 0) {
      return InvalidArgument(Str(text, ": only memory.kv_cache.quantization=none|fp8|int8 and ",
                                 "memory.kv_cache.threshold=N can be given here"));
    }
    threshold |= text.rfind("memory.kv_cache.threshold", 0) == 0;
  }
  heddle::v1::RunConfig run;
  *run.mutable_memory()->mutable_kv_cache() = source.kv_cache;
  run.mutable_data()->set_path("none");  // the rules of a training run want one
  RETURN_IF_ERROR(settings::ApplyOverrides(overrides, &run));
  const heddle::v1::KvCacheConfig& cache = run.memory().kv_cache();
  if (threshold && cache.quantization() == heddle::v1::KvCacheConfig::QUANTIZATION_NONE) {
    return InvalidArgument(
        "memory.kv_cache.threshold: has no effect without memory.kv_cache.quantization");
  }
  return cache;
}

StatusOr<std::vector<int64_t>> ParseIds(const std::string& text) {
  std::vector<int64_t> ids;
  const char* at = text.data();
  const char* end = at + text.size();
  while (true) {
    int64_t id = 0;
    const auto [next, error] = std::from_chars(at, end, id);
    if (error != std::errc() || (next != end && *next != ',')) {
      return InvalidArgument(Str("--ids ", text, ": must be token ids like 1,2,3"));
    }
    ids.push_back(id);
    if (next == end) return ids;
    at = next + 1;
  }
}

// Prompts as ids, and the tokenizer where there is one.
struct Prompts {
  std::vector<inference::Prompt> prompts;
  std::unique_ptr<tokenizer::Tokenizer> tokenizer;
};

StatusOr<Prompts> ReadPrompts(const GenerateVerbOptions& options, const ModelSource& source) {
  Prompts read;
  if (options.ids.empty() == options.prompts.empty()) {
    return InvalidArgument("give --prompt TEXT or --ids 1,2,3; repeat it for a batch");
  }
  if (!options.prompts.empty() || !source.tokenizer_path.empty()) {
    ASSIGN_OR_RETURN(read.tokenizer, OpenTokenizer(source));
  }
  for (const std::string& text : options.prompts) {
    ASSIGN_OR_RETURN(const std::vector<uint32_t> ids, read.tokenizer->Encode(text));
    if (ids.empty()) return InvalidArgument("--prompt: is empty");
    read.prompts.push_back({{ids.begin(), ids.end()}, read.prompts.size()});
  }
  for (const std::string& text : options.ids) {
    ASSIGN_OR_RETURN(std::vector<int64_t> ids, ParseIds(text));
    read.prompts.push_back({std::move(ids), read.prompts.size()});
  }
  return read;
}

StatusOr<std::string> TextOf(const tokenizer::Tokenizer* tokenizer,
                             const std::vector<int64_t>& ids) {
  if (tokenizer == nullptr) return std::string();
  std::vector<uint32_t> known;
  for (const int64_t id : ids) {
    // A vocabulary padded beyond the tokenizer's has ids without text.
    if (id < tokenizer->vocab_size()) known.push_back(static_cast<uint32_t>(id));
  }
  return tokenizer->Decode(known);
}

const char* FinishName(inference::Finish finish) {
  switch (finish) {
    case inference::Finish::kEos:
      return "eos";
    case inference::Finish::kMaxLength:
      return "max_length";
    case inference::Finish::kMaxNewTokens:
      break;
  }
  return "max_new_tokens";
}

struct Result {
  std::vector<inference::Generated> sequences;
  std::vector<std::string> texts;
  double tokens_per_second = 0;
};

json SequenceJson(const Prompts& prompts, const Result& result, size_t i) {
  return {{"ids", result.sequences[i].ids},
          {"text", result.texts[i]},
          {"finish", FinishName(result.sequences[i].finish)},
          {"prompt_tokens", prompts.prompts[i].ids.size()},
          {"kv_cache_bytes", result.sequences[i].cache_bytes}};
}

void Print(const GenerateVerbOptions& options, const Prompts& prompts, const Result& result) {
  const bool batch = result.sequences.size() > 1;
  if (options.json) {
    json object;
    if (batch) {
      for (size_t i = 0; i < result.sequences.size(); ++i) {
        object["sequences"].push_back(SequenceJson(prompts, result, i));
      }
    } else {
      object = SequenceJson(prompts, result, 0);
    }
    object["tokens_per_second"] = result.tokens_per_second;
    std::printf("%s\n", object.dump(-1, ' ', false, json::error_handler_t::replace).c_str());
    return;
  }
  for (size_t i = 0; i < result.sequences.size(); ++i) {
    if (batch) std::printf("%s[%zu] ", i == 0 ? "" : "\n", i);
    if (prompts.tokenizer != nullptr) {
      const std::string& prompt = options.prompts.empty() ? std::string() : options.prompts[i];
      std::printf("%s%s\n", prompt.c_str(), result.texts[i].c_str());
      continue;
    }
    const std::vector<int64_t>& ids = result.sequences[i].ids;
    for (size_t k = 0; k < ids.size(); ++k) {
      std::printf("%s%lld", k == 0 ? "" : ",", static_cast<long long>(ids[k]));
    }
    std::printf("\n");
  }
}

}  // namespace

Status RunGenerate(const GenerateVerbOptions& options) {
  inference::GenerateOptions generate;
  generate.max_new_tokens = options.max_new_tokens;
  generate.sampling = {options.temperature, options.top_k, options.top_p, options.seed};
  RETURN_IF_ERROR(inference::CheckSampling(generate.sampling));
  ASSIGN_OR_RETURN(const ModelSource source, OpenSource(options.source, /*with_weights=*/true));
  ASSIGN_OR_RETURN(const heddle::v1::KvCacheConfig cache, CacheConfig(options.overrides, source));
  ASSIGN_OR_RETURN(const Prompts prompts, ReadPrompts(options, source));
  generate.eos = EosIds(source, prompts.tokenizer.get());
  generate.max_length = source.config.max_position_embeddings();
  ASSIGN_OR_RETURN(const std::unique_ptr<inference::Decoder> decoder,
                   inference::Decoder::Create(source.config, source.store.get(),
                                              inference::DecoderOptionsOf(cache)));
  SystemClock clock;
  const int64_t start = clock.NowSteady();
  Result result;
  ASSIGN_OR_RETURN(result.sequences, inference::Generate(decoder.get(), prompts.prompts, generate));
  const double seconds = static_cast<double>(clock.NowSteady() - start) * 1e-9;
  size_t tokens = 0;
  for (const inference::Generated& sequence : result.sequences) {
    tokens += sequence.ids.size();
    ASSIGN_OR_RETURN(std::string text, TextOf(prompts.tokenizer.get(), sequence.ids));
    result.texts.push_back(std::move(text));
  }
  result.tokens_per_second = static_cast<double>(tokens) / std::max(seconds, 1e-9);
  Print(options, prompts, result);
  return OkStatus();
}

}  // namespace heddle::tool
