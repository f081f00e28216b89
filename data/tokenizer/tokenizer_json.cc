#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "data/tokenizer/byte_alphabet.h"
#include "data/tokenizer/tokenizer.h"
#include "data/tokenizer/tokenizer_impl.h"

namespace heddle::tokenizer {
namespace {

using nlohmann::json;

constexpr int64_t kTokensMax = 1 << 24;
constexpr size_t kFileBytesMax = size_t{256} << 20;
constexpr const char* kEosNames[] = {"<|endoftext|>", "<|end_of_text|>", "</s>",   "<eos>",
                                     "<|eot_id|>",    "<|im_end|>",      "<|eos|>"};
constexpr const char* kBosNames[] = {"<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>",
                                     "<|bos|>"};

// A member of an object, or null when absent.
const json& Member(const json& object, const char* key) {
  static const json null;
  const auto it = object.find(key);
  return it == object.end() ? null : *it;
}

bool IsTrue(const json& object, const char* key) {
  const json& value = Member(object, key);
  return value.is_boolean() && value.get<bool>();
}

// The "type" of a part, for messages and dispatch.
std::string TypeOf(const json& part) {
  const json& type = Member(part, "type");
  return part.is_object() && type.is_string() ? type.get<std::string>() : "(none)";
}

class Parser {
 public:
  explicit Parser(TokenizerImpl* out) : out_(*out) {}

  Status Run(const json& root) {
    if (!root.is_object()) return InvalidArgument("not a JSON object");
    for (const char* part : {"truncation", "padding"}) {
      if (!Member(root, part).is_null()) {
        return InvalidArgument(Str(part, ": not supported; must be null"));
      }
    }
    RETURN_IF_ERROR(ReadNormalizer(Member(root, "normalizer")));
    RETURN_IF_ERROR(ReadModel(Member(root, "model")));
    RETURN_IF_ERROR(ReadAddedTokens(Member(root, "added_tokens")));
    RETURN_IF_ERROR(ReadPreTokenizer(Member(root, "pre_tokenizer")));
    if (!has_byte_level_) {
      return InvalidArgument("pre_tokenizer: no ByteLevel; only byte-level BPE is supported");
    }
    RETURN_IF_ERROR(ReadPostProcessor(Member(root, "post_processor")));
    RETURN_IF_ERROR(ReadDecoder(Member(root, "decoder")));
    FindEndTokens();
    return OkStatus();
  }

 private:
  static Status ReadNormalizer(const json& part) {
    if (part.is_null()) return OkStatus();
    const json& list = Member(part, "normalizers");
    if (TypeOf(part) == "Sequence" && list.is_array() && list.empty()) return OkStatus();
    return InvalidArgument(Str("normalizer of type ", TypeOf(part), " is not supported"));
  }

  Status ReadModel(const json& part) {
    const std::string type = TypeOf(part);
    // Files of old versions have no type; a BPE is known by its merges.
    if (!part.is_object() || (type != "BPE" && !(type == "(none)" && part.contains("merges")))) {
      return InvalidArgument(Str("model of type ", type, " is not supported"));
    }
    const json& dropout = Member(part, "dropout");
    if (!dropout.is_null() && !(dropout.is_number() && dropout.get<double>() == 0.0)) {
      return InvalidArgument("model.dropout: not supported; must be null");
    }
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
      const json& value = Member(part, key);
      if (!value.is_null() && !(value.is_string() && value.get<std::string>().empty())) {
        return InvalidArgument(Str("model.", key, ": not supported; must be null"));
      }
    }
    if (IsTrue(part, "byte_fallback")) {
      return InvalidArgument("model.byte_fallback: not supported");
    }
    out_.model.ignore_merges = IsTrue(part, "ignore_merges");
    RETURN_IF_ERROR(ReadVocabulary(Member(part, "vocab")));
    return ReadMerges(Member(part, "merges"));
  }

  // Gives `id` to a token spelt `text`.
  Status AddToken(const std::string& text, int64_t id) {
    if (id < 0 || id >= kTokensMax) {
      return InvalidArgument(Str("token '", text, "': id ", id, " is out of range"));
    }
    const auto index = static_cast<size_t>(id);
    if (index >= out_.model.bytes_of.size()) out_.model.bytes_of.resize(index + 1);
    if (text.empty()) return InvalidArgument(Str("id ", id, ": empty token"));
    if (!out_.model.bytes_of[index].empty()) {
      return InvalidArgument(Str("token '", text, "': id ", id, " is taken by another token"));
    }
    // Like the reference, a token with a character outside the alphabet stands for its own UTF-8.
    out_.model.bytes_of[index] = FromAlphabet(text).value_or(text);
    out_.id_of_text.emplace(text, static_cast<uint32_t>(id));
    return OkStatus();
  }

  Status ReadVocabulary(const json& vocabulary) {
    if (!vocabulary.is_object() || vocabulary.empty()) {
      return InvalidArgument("model.vocab: must be an object of tokens and ids");
    }
    out_.model.bytes_of.reserve(vocabulary.size());
    out_.id_of_text.reserve(vocabulary.size());
    for (const auto& [text, id] : vocabulary.items()) {
      if (!id.is_number_integer()) {
        return InvalidArgument(Str("model.vocab: id of '", text, "' is not an integer"));
      }
      RETURN_IF_ERROR(AddToken(text, id.get<int64_t>()));
      std::optional<std::string> bytes = FromAlphabet(text);
      if (bytes.has_value()) {
        out_.model.id_of.emplace(*std::move(bytes), static_cast<uint32_t>(id.get<int64_t>()));
      }
    }
    for (int byte = 0; byte < 256; ++byte) {
      const auto it = out_.model.id_of.find(std::string(1, static_cast<char>(byte)));
      if (it == out_.model.id_of.end()) {
        return InvalidArgument(Str("model.vocab: no token for byte ", byte));
      }
      out_.model.byte_id[static_cast<size_t>(byte)] = it->second;
    }
    return OkStatus();
  }

  Status ReadMerges(const json& merges) {
    if (!merges.is_array()) return InvalidArgument("model.merges: must be an array");
    out_.model.merges.Reserve(merges.size());
    for (size_t rank = 0; rank < merges.size(); ++rank) {
      std::string left;
      std::string right;
      if (merges[rank].is_string()) {
        const std::string pair = merges[rank].get<std::string>();
        const size_t space = pair.find(' ');
        if (space == std::string::npos || pair.find(' ', space + 1) != std::string::npos) {
          return InvalidArgument(Str("model.merges[", rank, "]: not two tokens"));
        }
        left = pair.substr(0, space);
        right = pair.substr(space + 1);
      } else if (merges[rank].is_array() && merges[rank].size() == 2 &&
                 merges[rank][0].is_string() && merges[rank][1].is_string()) {
        left = merges[rank][0].get<std::string>();
        right = merges[rank][1].get<std::string>();
      } else {
        return InvalidArgument(Str("model.merges[", rank, "]: not two tokens"));
      }
      uint32_t ids[3];
      const std::string* texts[3] = {&left, &right, nullptr};
      const std::string merged = left + right;
      texts[2] = &merged;
      for (int i = 0; i < 3; ++i) {
        const auto it = out_.id_of_text.find(*texts[i]);
        if (it == out_.id_of_text.end()) {
          return InvalidArgument(
              Str("model.merges[", rank, "]: '", *texts[i], "' is not in the vocabulary"));
        }
        ids[i] = it->second;
      }
      out_.model.merges.Insert(ids[0], ids[1], {static_cast<uint32_t>(rank), ids[2]});
    }
    return OkStatus();
  }

  Status ReadAddedTokens(const json& list) {
    out_.added.resize(2);
    if (list.is_null()) return FinishAddedTokens();
    if (!list.is_array()) return InvalidArgument("added_tokens: must be an array");
    for (size_t i = 0; i < list.size(); ++i) {
      const json& entry = list[i];
      const json& content = Member(entry, "content");
      const json& id = Member(entry, "id");
      if (!entry.is_object() || !content.is_string() || !id.is_number_integer()) {
        return InvalidArgument(Str("added_tokens[", i, "]: needs content and id"));
      }
      AddedToken token;
      token.content = content.get<std::string>();
      for (const char* key : {"single_word", "lstrip", "rstrip"}) {
        if (IsTrue(entry, key)) {
          return InvalidArgument(
              Str("added token '", token.content, "': ", key, " is not supported"));
        }
      }
      const auto known = out_.id_of_text.find(token.content);
      if (known == out_.id_of_text.end()) {
        RETURN_IF_ERROR(AddToken(token.content, id.get<int64_t>()));
      } else if (static_cast<int64_t>(known->second) != id.get<int64_t>()) {
        return InvalidArgument(Str("added token '", token.content, "': id ", id.get<int64_t>(),
                                   ", but the vocabulary says ", known->second));
      }
      token.id = static_cast<uint32_t>(id.get<int64_t>());
      token.special = IsTrue(entry, "special");
      token.normalized = IsTrue(entry, "normalized");
      out_.added[token.normalized ? 1 : 0].push_back(std::move(token));
    }
    return FinishAddedTokens();
  }

  Status FinishAddedTokens() {
    out_.special.assign(out_.model.bytes_of.size(), false);
    for (std::vector<AddedToken>& group : out_.added) {
      for (const AddedToken& token : group) out_.special[token.id] = token.special;
      // Longest first: the first that fits at a place is the one to take.
      std::stable_sort(group.begin(), group.end(), [](const AddedToken& a, const AddedToken& b) {
        return a.content.size() > b.content.size();
      });
    }
    return OkStatus();
  }

  Status AddStep(const std::string& pattern, Gaps gaps, const std::string& where) {
    StatusOr<std::unique_ptr<SplitPattern>> compiled = SplitPattern::Compile(pattern);
    if (!compiled.ok()) return Annotate(compiled.status(), where);
    SplitStep step;
    step.pattern = *std::move(compiled);
    step.gaps = gaps;
    out_.steps.push_back(std::move(step));
    return OkStatus();
  }

  Status ReadPreTokenizer(const json& part) {
    const std::string type = TypeOf(part);
    if (has_byte_level_) {
      return InvalidArgument(Str("pre_tokenizer: ", type, " after ByteLevel is not supported"));
    }
    if (type == "Sequence") {
      const json& list = Member(part, "pretokenizers");
      if (!list.is_array()) return InvalidArgument("pre_tokenizer.pretokenizers: must be an array");
      for (const json& entry : list) {
        if (TypeOf(entry) == "Sequence") {
          return InvalidArgument("pre_tokenizer: a Sequence in a Sequence is not supported");
        }
        RETURN_IF_ERROR(ReadPreTokenizer(entry));
      }
      return OkStatus();
    }
    if (type == "ByteLevel") return ReadByteLevel(part);
    if (type == "Split") return ReadSplit(part);
    if (type == "Digits") {
      return AddStep(IsTrue(part, "individual_digits") ? R"(\p{N})" : R"(\p{N}+)", Gaps::kKeep,
                     "pre_tokenizer Digits");
    }
    return InvalidArgument(Str("pre_tokenizer of type ", type, " is not supported"));
  }

  Status ReadByteLevel(const json& part) {
    has_byte_level_ = true;
    const json& prefix = Member(part, "add_prefix_space");
    out_.add_prefix_space = prefix.is_null() || IsTrue(part, "add_prefix_space");
    if (out_.add_prefix_space && !out_.steps.empty()) {
      return InvalidArgument(
          "pre_tokenizer ByteLevel: add_prefix_space after a split is not supported");
    }
    const json& use_regex = Member(part, "use_regex");
    if (use_regex.is_null() || IsTrue(part, "use_regex")) {
      return AddStep(kGpt2Pattern, Gaps::kKeep, "pre_tokenizer ByteLevel");
    }
    return OkStatus();
  }

  Status ReadSplit(const json& part) {
    const json& pattern = Member(part, "pattern");
    const json& regex = Member(pattern, "Regex");
    if (!pattern.is_object() || !regex.is_string()) {
      return InvalidArgument("pre_tokenizer Split: only a Regex pattern is supported");
    }
    const json& behavior = Member(part, "behavior");
    const std::string text = behavior.is_string() ? behavior.get<std::string>() : "(none)";
    const bool invert = IsTrue(part, "invert");
    Gaps gaps = Gaps::kKeep;
    if (text == "Removed" && invert) {
      gaps = Gaps::kDrop;
    } else if (text != "Isolated") {
      return InvalidArgument(Str("pre_tokenizer Split: behavior ", text,
                                 invert ? " with invert" : "", " is not supported"));
    }
    return AddStep(regex.get<std::string>(), gaps, "pre_tokenizer Split");
  }

  Status ReadPostProcessor(const json& part) {
    if (part.is_null()) return OkStatus();
    const std::string type = TypeOf(part);
    if (type == "ByteLevel") return OkStatus();  // changes offsets only
    if (type == "Sequence") {
      const json& list = Member(part, "processors");
      if (!list.is_array()) return InvalidArgument("post_processor.processors: must be an array");
      for (const json& entry : list) {
        if (TypeOf(entry) == "Sequence") {
          return InvalidArgument("post_processor: a Sequence in a Sequence is not supported");
        }
        RETURN_IF_ERROR(ReadPostProcessor(entry));
      }
      return OkStatus();
    }
    if (type != "TemplateProcessing") {
      return InvalidArgument(Str("post_processor of type ", type, " is not supported"));
    }
    return ReadTemplate(part);
  }

  Status ReadTemplate(const json& part) {
    const json& single = Member(part, "single");
    if (!single.is_array()) return InvalidArgument("post_processor.single: must be an array");
    bool behind = false;
    for (const json& piece : single) {
      if (piece.is_object() && piece.contains("Sequence")) {
        if (behind) return InvalidArgument("post_processor.single: the text occurs twice");
        behind = true;
        continue;
      }
      const json& token = Member(Member(piece, "SpecialToken"), "id");
      if (!token.is_string()) {
        return InvalidArgument("post_processor.single: neither Sequence nor SpecialToken");
      }
      const auto it = out_.id_of_text.find(token.get<std::string>());
      if (it == out_.id_of_text.end()) {
        return InvalidArgument(
            Str("post_processor: '", token.get<std::string>(), "' is not in the vocabulary"));
      }
      (behind ? out_.suffix_ids : out_.prefix_ids).push_back(it->second);
    }
    if (!behind) return InvalidArgument("post_processor.single: no Sequence");
    return OkStatus();
  }

  static Status ReadDecoder(const json& part) {
    if (TypeOf(part) == "ByteLevel") return OkStatus();
    const json& list = Member(part, "decoders");
    if (TypeOf(part) == "Sequence" && list.is_array() && list.size() == 1 &&
        TypeOf(list[0]) == "ByteLevel") {
      return OkStatus();
    }
    return InvalidArgument(Str("decoder of type ", TypeOf(part), " is not supported"));
  }

  void FindEndTokens() {
    const auto find = [this](const char* name) -> std::optional<uint32_t> {
      const auto it = out_.id_of_text.find(name);
      if (it == out_.id_of_text.end() || !out_.special[it->second]) return std::nullopt;
      return it->second;
    };
    for (const char* name : kEosNames) {
      if (!out_.eos_id.has_value()) out_.eos_id = find(name);
    }
    for (const char* name : kBosNames) {
      if (!out_.bos_id.has_value()) out_.bos_id = find(name);
    }
  }

  TokenizerImpl& out_;
  bool has_byte_level_ = false;
};

}  // namespace

StatusOr<std::unique_ptr<TokenizerImpl>> ParseTokenizerJson(std::string_view bytes,
                                                            const std::string& name) {
  if (bytes.size() > kFileBytesMax) return InvalidArgument(Str(name, ": larger than 256 MiB"));
  json root;
  try {
    root = json::parse(bytes);
  } catch (const json::parse_error& error) {
    return InvalidArgument(Str(name, ": byte ", error.byte, ": not valid JSON"));
  }
  auto impl = std::make_unique<TokenizerImpl>();
  const Status status = Parser(impl.get()).Run(root);
  if (!status.ok()) return Annotate(status, name);
  impl->json = std::string(bytes);
  impl->sha256 = Sha256Hex(bytes);
  return impl;
}

}  // namespace heddle::tokenizer
