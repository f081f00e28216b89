// heddle-model export and import: writes a model folder in Hugging Face's layout.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/settings/settings.h"
#include "data/tokenizer/tokenizer.h"
#include "model/hf/model_dir.h"
#include "model/model_plan.h"
#include "model/tool/model_source.h"
#include "model/tool/verbs.h"

namespace heddle::tool {
namespace {

// The model under other keys: same tensors, other attention.
Status Override(const std::vector<std::string>& overrides, heddle::v1::ModelConfig* config) {
  if (overrides.empty()) return OkStatus();
  for (const std::string& text : overrides) {
    if (text.rfind("model.", 0) != 0) {
      return InvalidArgument(Str(text, ": only keys of group `model` can be given here"));
    }
  }
  heddle::v1::RunConfig run;
  *run.mutable_model() = *config;
  run.mutable_data()->set_path("none");  // the rules of a training run want one
  RETURN_IF_ERROR(settings::ApplyOverrides(overrides, &run));
  ASSIGN_OR_RETURN(const model::ModelPlan before, model::PlanModel(*config));
  ASSIGN_OR_RETURN(const model::ModelPlan after, model::PlanModel(run.model()));
  for (const model::TensorSpec& tensor : after.tensors) {
    const model::TensorSpec* old = before.Find(tensor.name);
    if (old == nullptr || old->shape != tensor.shape) {
      return InvalidArgument(Str("the overrides change tensor '", tensor.name, "'"));
    }
  }
  if (after.tensors.size() != before.tensors.size()) {
    return InvalidArgument("the overrides change which tensors the model has");
  }
  *config = run.model();
  return OkStatus();
}

}  // namespace

Status RunExport(const ExportVerbOptions& options) {
  if (options.out.empty()) return InvalidArgument("--out: give the folder to write");
  if (options.out == options.source.dir) return InvalidArgument("--out: is the source itself");
  ASSIGN_OR_RETURN(ModelSource source, OpenSource(options.source, /*with_weights=*/true));
  RETURN_IF_ERROR(Override(options.overrides, &source.config));
  hf::ExportOptions write;
  if (!source.tokenizer_path.empty()) {
    // Only the tokenizer of the training run belongs to the weights (formats.md F5).
    if (!source.tokenizer_sha256.empty()) RETURN_IF_ERROR(OpenTokenizer(source));
    write.tokenizer_path = source.tokenizer_path;
  }
  std::vector<hf::NamedWeight> weights;
  for (const model::TensorSpec& tensor : source.store->plan().tensors) {
    weights.push_back({tensor.name, tensor.shape, source.store->master(tensor)});
  }
  RETURN_IF_ERROR(hf::WriteModelDir(options.out, source.config, weights, write));
  if (options.json) {
    const nlohmann::json object = {{"dir", options.out},
                                   {"parameters", source.store->plan().parameters},
                                   {"tensors", weights.size()},
                                   {"tokenizer", !write.tokenizer_path.empty()}};
    std::printf("%s\n", object.dump().c_str());
  } else {
    std::printf("%s: %zu tensors, %lld parameters\n", options.out.c_str(), weights.size(),
                static_cast<long long>(source.store->plan().parameters));
  }
  return OkStatus();
}

}  // namespace heddle::tool
