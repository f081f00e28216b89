// heddle-model generate: continues a prompt.
#include <chrono>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/clock/clock.h"
#include "data/tokenizer/tokenizer.h"
#include "model/inference/decoder.h"
#include "model/inference/sampling.h"
#include "model/tool/model_source.h"
#include "model/tool/verbs.h"

namespace heddle::tool {
namespace {

using nlohmann::json;

Status CheckOverrides(const std::vector<std::string>& overrides) {
  for (const std::string& text : overrides) {
    if (text == "memory.kv_cache.quantization=none") continue;
    return InvalidArgument(Str(text, ": this build keeps the KV cache in the compute type"));
  }
  return OkStatus();
}

// Ids of the prompt, and the tokenizer where there is one.
struct Prompt {
  std::vector<int64_t> ids;
  std::unique_ptr<tokenizer::Tokenizer> tokenizer;
};

StatusOr<Prompt> ReadPrompt(const GenerateVerbOptions& options, const ModelSource& source) {
  Prompt prompt;
  if (options.ids.empty() == options.prompt.empty()) {
    return InvalidArgument("give --prompt TEXT or --ids 1,2,3");
  }
  if (!options.prompt.empty()) {
    ASSIGN_OR_RETURN(prompt.tokenizer, OpenTokenizer(source));
    ASSIGN_OR_RETURN(const std::vector<uint32_t> ids, prompt.tokenizer->Encode(options.prompt));
    prompt.ids.assign(ids.begin(), ids.end());
  } else {
    prompt.ids = options.ids;
    if (!source.tokenizer_path.empty()) {
      ASSIGN_OR_RETURN(prompt.tokenizer, OpenTokenizer(source));
    }
  }
  return prompt;
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

}  // namespace

Status RunGenerate(const GenerateVerbOptions& options) {
  RETURN_IF_ERROR(CheckOverrides(options.overrides));
  inference::GenerateOptions generate;
  generate.max_new_tokens = options.max_new_tokens;
  generate.sampling = {options.temperature, options.top_k, options.top_p, options.seed};
  RETURN_IF_ERROR(inference::CheckSampling(generate.sampling));
  ASSIGN_OR_RETURN(const ModelSource source, OpenSource(options.source, /*with_weights=*/true));
  ASSIGN_OR_RETURN(const Prompt prompt, ReadPrompt(options, source));
  if (prompt.tokenizer != nullptr && prompt.tokenizer->eos_id().has_value()) {
    generate.eos = *prompt.tokenizer->eos_id();
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<inference::Decoder> decoder,
                   inference::Decoder::Create(source.config, source.store.get()));
  SystemClock clock;
  const int64_t start = clock.NowSteady();
  ASSIGN_OR_RETURN(const std::vector<int64_t> ids,
                   inference::Generate(decoder.get(), prompt.ids, generate));
  const double seconds = static_cast<double>(clock.NowSteady() - start) * 1e-9;
  ASSIGN_OR_RETURN(const std::string text, TextOf(prompt.tokenizer.get(), ids));
  if (options.json) {
    json object;
    object["ids"] = ids;
    object["text"] = text;
    object["tokens_per_second"] = static_cast<double>(ids.size()) / std::max(seconds, 1e-9);
    std::printf("%s\n", object.dump(-1, ' ', false, json::error_handler_t::replace).c_str());
  } else if (prompt.tokenizer != nullptr) {
    std::printf("%s%s\n", options.prompt.c_str(), text.c_str());
  } else {
    for (size_t i = 0; i < ids.size(); ++i) {
      std::printf("%s%lld", i == 0 ? "" : ",", static_cast<long long>(ids[i]));
    }
    std::printf("\n");
  }
  return OkStatus();
}

}  // namespace heddle::tool
