// heddle-model export and import: writes a model folder in Hugging Face's layout.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "data/tokenizer/tokenizer.h"
#include "model/hf/model_dir.h"
#include "model/tool/model_source.h"
#include "model/tool/verbs.h"

namespace heddle::tool {

Status RunExport(const ExportVerbOptions& options) {
  if (options.out.empty()) return InvalidArgument("--out: give the folder to write");
  if (options.out == options.source.dir) return InvalidArgument("--out: is the source itself");
  ASSIGN_OR_RETURN(const ModelSource source, OpenSource(options.source, /*with_weights=*/true));
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
