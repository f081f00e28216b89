// heddle-model logits: logits of given token ids, from safetensors to safetensors.
#include <ATen/core/Tensor.h>

#include <filesystem>
#include <system_error>
#include <utility>

#include "model/hf/safetensors.h"
#include "model/language_model.h"
#include "model/padded.h"
#include "model/tool/model_source.h"
#include "model/tool/verbs.h"

namespace heddle::tool {
namespace {

struct Input {
  model::PackedRows rows;      // places is empty beside cu_seqlens
  std::vector<int64_t> shape;  // of input_ids
};

StatusOr<Input> ReadInput(const std::string& path) {
  ASSIGN_OR_RETURN(const std::unique_ptr<hf::SafetensorsFile> file,
                   hf::SafetensorsFile::Open(path));
  const auto& tensors = file->header().tensors;
  const auto found = tensors.find("input_ids");
  if (found == tensors.end()) return InvalidArgument(Str(path, ": no tensor 'input_ids'"));
  Input input;
  input.shape = found->second.shape;
  ASSIGN_OR_RETURN(input.rows.ids, file->ReadIntegers("input_ids"));
  const bool packed = tensors.contains("cu_seqlens");
  const bool masked = tensors.contains("attention_mask");
  if (packed ? input.shape.size() != 1 || masked : input.shape.size() != 2) {
    return InvalidArgument(Str(path,
                               ": input_ids must be [B, T], attention_mask [B, T] beside it "
                               "or not, or [N] beside cu_seqlens"));
  }
  if (packed) {
    ASSIGN_OR_RETURN(const std::vector<int64_t> cu, file->ReadIntegers("cu_seqlens"));
    for (const int64_t row : cu) {
      if (row < 0 || row > INT32_MAX) return InvalidArgument(Str(path, ": cu_seqlens: ", row));
      input.rows.cu_seqlens.push_back(static_cast<int32_t>(row));
    }
    return input;
  }
  std::vector<int64_t> mask(input.rows.ids.size(), 1);
  if (masked) {
    ASSIGN_OR_RETURN(mask, file->ReadIntegers("attention_mask"));
  }
  StatusOr<model::PackedRows> rows =
      model::PackPadded(input.rows.ids, mask, input.shape[0], input.shape[1]);
  if (!rows.ok())
    return InvalidArgument(Str(path, ": attention_", std::string(rows.status().message())));
  input.rows = *std::move(rows);
  return input;
}

// Also by a link: the input is still mapped when the output takes its place.
bool IsSameFile(const std::string& a, const std::string& b) {
  std::error_code absent;  // one that is not there yet is another
  return std::filesystem::equivalent(a, b, absent);
}

}  // namespace

Status RunLogits(const LogitsOptions& options) {
  if (IsSameFile(options.input, options.out)) {
    return InvalidArgument(Str("--out: is the input itself: ", options.out));
  }
  ASSIGN_OR_RETURN(const ModelSource source, OpenSource(options.source, /*with_weights=*/true));
  ASSIGN_OR_RETURN(Input input, ReadInput(options.input));
  ASSIGN_OR_RETURN(const std::unique_ptr<model::LanguageModel> model,
                   model::LanguageModel::Create(source.config, source.store.get()));
  ASSIGN_OR_RETURN(at::Tensor logits, model->Logits({input.rows.ids, {}, input.rows.cu_seqlens}));
  if (input.shape.size() == 2) {
    logits = model::ScatterPadded(logits, input.rows, input.shape[0], input.shape[1]);
  }
  std::vector<int64_t> shape = input.shape;
  shape.push_back(source.config.vocab_size());
  return hf::WriteSafetensors(options.out,
                              {{"logits", hf::DType::kF32, shape, logits.data_ptr<float>()}});
}

}  // namespace heddle::tool
