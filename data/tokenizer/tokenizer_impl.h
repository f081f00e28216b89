// What a parsed tokenizer.json consists of; internal to this folder.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/status/status.h"
#include "data/tokenizer/bpe_model.h"
#include "data/tokenizer/splitter.h"

namespace heddle::tokenizer {

struct AddedToken {
  uint32_t id = 0;
  std::string content;
  bool special = false;
  bool normalized = false;
};

struct TokenizerImpl {
  std::string json;
  std::string sha256;
  BpeModel model;
  std::vector<SplitStep> steps;
  bool add_prefix_space = false;
  // In the order in which the reference takes them out of a text: first those that are matched in
  // the raw text, then those matched in normalized text. Within one list the leftmost longest match
  // wins.
  std::vector<std::vector<AddedToken>> added;
  std::unordered_map<std::string, uint32_t> id_of_text;  // vocabulary and added tokens by spelling
  std::vector<bool> special;                             // by id
  std::vector<uint32_t> prefix_ids;  // what the post-processor puts before a text
  std::vector<uint32_t> suffix_ids;  // and behind it
  std::optional<uint32_t> eos_id;
  std::optional<uint32_t> bos_id;
};

StatusOr<std::unique_ptr<TokenizerImpl>> ParseTokenizerJson(std::string_view json,
                                                            const std::string& name);

}  // namespace heddle::tokenizer
