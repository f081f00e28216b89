// heddle-model export and import: writes a model folder in Hugging Face's layout, with another
// attention kind where asked.
#include <cstdio>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "base/settings/settings.h"
#include "data/tokenizer/tokenizer.h"
#include "model/hf/convert.h"
#include "model/hf/model_dir.h"
#include "model/model_plan.h"
#include "model/tool/model_source.h"
#include "model/tool/verbs.h"

namespace heddle::tool {
namespace {

using heddle::v1::ModelConfig;

// The model under other keys of group `model`.
StatusOr<ModelConfig> Override(const std::vector<std::string>& overrides,
                               const ModelConfig& config) {
  for (const std::string& text : overrides) {
    if (text.rfind("model.", 0) != 0) {
      return InvalidArgument(Str(text, ": only keys of group `model` can be given here"));
    }
  }
  heddle::v1::RunConfig run;
  *run.mutable_model() = config;
  run.mutable_data()->set_path("none");  // the rules of a training run want one
  RETURN_IF_ERROR(settings::ApplyOverrides(overrides, &run));
  return run.model();
}

// Every layer with attention over all keys.
ModelConfig Dense(const ModelConfig& config) {
  ModelConfig dense = config;
  heddle::v1::AttentionConfig* attention = dense.mutable_attention();
  attention->clear_pattern();
  attention->clear_swa();
  attention->clear_nsa();
  attention->clear_dsa();
  attention->clear_gsa();
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    attention->add_pattern(model::LayerUsesLatent(config, layer)
                               ? heddle::v1::ATTENTION_KIND_MLA
                               : heddle::v1::ATTENTION_KIND_DENSE);
  }
  for (const int kind : attention->pattern()) {
    if (kind != attention->pattern(0)) return dense;
  }
  attention->set_kind(attention->pattern(0));
  attention->clear_pattern();
  return dense;
}

void Warn(const ModelConfig& from) {
  for (int layer = 0; layer < from.n_layers(); ++layer) {
    const heddle::v1::AttentionKind kind = model::LayerKind(from, layer);
    if (kind == heddle::v1::ATTENTION_KIND_DENSE || kind == heddle::v1::ATTENTION_KIND_MLA)
      continue;
    std::fprintf(stderr,
                 "heddle: export: --dense: the dense model sees keys that the sparse one left out "
                 "and lacks its gates; its logits differ\n");
    return;
  }
}

// The weights under the keys asked for. `converted` is empty where nothing was asked.
Status Convert(const ExportVerbOptions& options, ModelSource* source, hf::Converted* converted) {
  if (options.overrides.empty() && !options.dense) return OkStatus();
  ModelConfig to = source->config;
  if (options.dense) {
    Warn(source->config);
    to = Dense(to);
  }
  if (!options.overrides.empty()) {
    ASSIGN_OR_RETURN(to, Override(options.overrides, to));
  }
  ASSIGN_OR_RETURN(*converted, hf::ConvertModel(source->config, source->store.get(), to,
                                                {options.seed, options.dense}));
  source->config = to;
  source->store = std::move(converted->store);
  return OkStatus();
}

// What keeps heddle from using the folder's own tokenizer, which other programs may still use.
// Refused are only those that the caller named, or that a training run named.
StatusOr<std::vector<std::string>> CheckTokenizer(const ExportVerbOptions& options,
                                                  const ModelSource& source,
                                                  hf::ExportOptions* write) {
  std::vector<std::string> warnings;
  if (source.tokenizer_path.empty()) return warnings;
  write->tokenizer_path = source.tokenizer_path;
  const bool named = !options.source.tokenizer.empty() || !source.tokenizer_sha256.empty();
  const StatusOr<std::unique_ptr<tokenizer::Tokenizer>> tokenizer = OpenTokenizer(source);
  if (!tokenizer.ok() && named) return tokenizer.status();
  if (!tokenizer.ok()) {
    warnings.push_back(Str(Message(tokenizer.status()),
                           "; it is copied, but heddle cannot encode or decode with it: use --ids, "
                           "or give --tokenizer FILE"));
    return warnings;
  }
  // Only the tokenizer of the training run belongs to the weights (formats.md F5).
  if (!source.tokenizer_sha256.empty()) write->eos = EosIds(source, tokenizer->get());
  const int64_t ids = (*tokenizer)->vocab_size();
  if (ids > source.config.vocab_size()) {
    warnings.push_back(Str(source.tokenizer_path, ": has ", ids, " token ids, the model ",
                           source.config.vocab_size(),
                           ": text that needs the others cannot be given to it"));
  }
  return warnings;
}

void Report(const ExportVerbOptions& options, const ModelSource& source, size_t tensors,
            bool tokenizer, const std::vector<std::string>& warnings,
            const hf::Converted& converted) {
  for (const std::string& warning : warnings) {
    std::fprintf(stderr, "heddle: %s\n", warning.c_str());
  }
  const long long parameters = static_cast<long long>(source.store->plan().parameters);
  if (options.json) {
    const nlohmann::json object = {{"dir", options.out},           {"parameters", parameters},
                                   {"tensors", tensors},           {"tokenizer", tokenizer},
                                   {"added", converted.added},     {"rescaled", converted.rescaled},
                                   {"dropped", converted.dropped}, {"warnings", warnings}};
    std::printf("%s\n", object.dump().c_str());
    return;
  }
  std::printf("%s: %zu tensors, %lld parameters\n", options.out.c_str(), tensors, parameters);
  const std::pair<const char*, const std::vector<std::string>*> parts[] = {
      {"added", &converted.added},
      {"rescaled", &converted.rescaled},
      {"dropped", &converted.dropped}};
  for (const auto& [word, names] : parts) {
    for (const std::string& name : *names) std::printf("  %s %s\n", word, name.c_str());
  }
}

}  // namespace

Status RunExport(const ExportVerbOptions& options) {
  if (options.out.empty()) return InvalidArgument("--out: give the folder to write");
  if (options.out == options.source.dir) return InvalidArgument("--out: is the source itself");
  ASSIGN_OR_RETURN(ModelSource source, OpenSource(options.source, /*with_weights=*/true));
  hf::Converted converted;
  RETURN_IF_ERROR(Convert(options, &source, &converted));
  hf::ExportOptions write;
  write.allow_nonfinite = options.source.allow_nonfinite;
  write.eos = source.eos;
  ASSIGN_OR_RETURN(const std::vector<std::string> warnings,
                   CheckTokenizer(options, source, &write));
  const std::vector<hf::NamedWeight> weights = hf::WeightsOf(source.store.get());
  RETURN_IF_ERROR(hf::WriteModelDir(options.out, source.config, weights, write));
  Report(options, source, source.store->plan().tensors.size(), !write.tokenizer_path.empty(),
         warnings, converted);
  return OkStatus();
}

}  // namespace heddle::tool
