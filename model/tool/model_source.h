// A model as the verbs use it: configuration, weights and the place of its tokenizer.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"
#include "model/parameter_store.h"
#include "model/tool/verbs.h"

namespace heddle::tokenizer {
class Tokenizer;
}

namespace heddle::tool {

struct ModelSource {
  std::string name;  // for messages: the folder, or the checkpoint's folder
  heddle::v1::ModelConfig config;
  heddle::v1::KvCacheConfig kv_cache;            // of the checkpoint's run; a folder has none
  std::unique_ptr<model::ParameterStore> store;  // null if weights were not asked for
  std::vector<int64_t> eos;                      // what a folder says; a checkpoint has none
  std::string tokenizer_path;                    // empty: none known
  std::string tokenizer_sha256;                  // what the checkpoint was trained with, or empty
};

// INVALID_ARGUMENT for contradicting options or a folder that does not fit its config.json;
// NOT_FOUND; DATA_LOSS for a damaged checkpoint.
StatusOr<ModelSource> OpenSource(const SourceOptions& options, bool with_weights);

// NOT_FOUND if the source has none; FAILED_PRECONDITION if it is not the one of the training run.
StatusOr<std::unique_ptr<tokenizer::Tokenizer>> OpenTokenizer(const ModelSource& source);

// Tokens that end a text: what the source says, else the tokenizer's. `tokenizer` may be null.
std::vector<int64_t> EosIds(const ModelSource& source, const tokenizer::Tokenizer* tokenizer);

}  // namespace heddle::tool
