#include "data/tokenizer/tokenizer.h"

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <utility>

#include "data/text/utf8.h"
#include "data/tokenizer/tokenizer_impl.h"
#include "data/tokenizer/word_cache.h"

namespace heddle::tokenizer {
namespace {

// Words are cut and encoded in parts of a text this long, to bound the list of ranges; the part
// ends only where the text or an added token ends, so it is a hint for reservations, not a limit.
constexpr size_t kRangesReserved = 4096;

// An added token found in a text.
struct Found {
  size_t begin = 0;
  const AddedToken* token = nullptr;
};

// Leftmost, then longest, of `tokens` (longest first) at or after `from`.
Found FindAdded(const std::vector<const AddedToken*>& tokens, const std::vector<bool>& first_bytes,
                std::string_view text, size_t from) {
  for (size_t i = from; i < text.size(); ++i) {
    if (!first_bytes[static_cast<unsigned char>(text[i])]) continue;
    for (const AddedToken* token : tokens) {
      if (text.substr(i, token->content.size()) == token->content) return {i, token};
    }
  }
  return {text.size(), nullptr};
}

}  // namespace

Tokenizer::Tokenizer(std::unique_ptr<TokenizerImpl> impl) : impl_(std::move(impl)) {}
Tokenizer::~Tokenizer() = default;

StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Parse(std::string_view json,
                                                      const std::string& name) {
  ASSIGN_OR_RETURN(std::unique_ptr<TokenizerImpl> impl, ParseTokenizerJson(json, name));
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(impl)));
}

StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& path) {
  // A device or a pipe may have no end, a folder has nothing to read.
  std::error_code error;
  if (std::filesystem::exists(path, error) && !std::filesystem::is_regular_file(path, error)) {
    return InvalidArgument(Str("tokenizer ", path, ": not a regular file"));
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) return FromErrno("cannot open tokenizer", path, errno == 0 ? ENOENT : errno);
  std::ostringstream bytes;
  bytes << file.rdbuf();
  if (file.bad() || bytes.bad()) return Unavailable(Str("cannot read tokenizer ", path));
  return Parse(bytes.str(), path);
}

uint32_t Tokenizer::vocab_size() const {
  return static_cast<uint32_t>(impl_->model.bytes_of.size());
}
std::optional<uint32_t> Tokenizer::eos_id() const { return impl_->eos_id; }
std::optional<uint32_t> Tokenizer::bos_id() const { return impl_->bos_id; }
const std::string& Tokenizer::sha256() const { return impl_->sha256; }
const std::string& Tokenizer::json() const { return impl_->json; }

std::optional<uint32_t> Tokenizer::TokenId(std::string_view token) const {
  const auto it = impl_->id_of_text.find(std::string(token));
  if (it == impl_->id_of_text.end()) return std::nullopt;
  return it->second;
}

bool Tokenizer::IsSpecial(uint32_t id) const {
  return id < impl_->special.size() && impl_->special[id];
}

StatusOr<std::vector<uint32_t>> Tokenizer::Encode(std::string_view text,
                                                  const EncodeOptions& options) const {
  Encoder encoder(*this);
  std::vector<uint32_t> ids;
  RETURN_IF_ERROR(encoder.Encode(text, options, &ids));
  return ids;
}

StatusOr<std::string> Tokenizer::Decode(std::span<const uint32_t> ids,
                                        bool skip_special_tokens) const {
  std::string bytes;
  for (const uint32_t id : ids) {
    if (id >= impl_->model.bytes_of.size() || impl_->model.bytes_of[id].empty()) {
      return InvalidArgument(
          Str("token id ", id, " is not in the vocabulary of ", impl_->model.bytes_of.size()));
    }
    if (skip_special_tokens && impl_->special[id]) continue;
    bytes += impl_->model.bytes_of[id];
  }
  return bytes;
}

struct Encoder::State {
  explicit State(const TokenizerImpl& tokenizer) : impl(tokenizer), splitter(tokenizer.steps) {
    for (int parse_special = 0; parse_special < 2; ++parse_special) {
      for (int group = 0; group < 2; ++group) {
        AddedSet& set = added[parse_special][group];
        set.first_bytes.assign(256, false);
        for (const AddedToken& token : impl.added[static_cast<size_t>(group)]) {
          if (token.special && parse_special == 0) continue;
          set.tokens.push_back(&token);
          set.first_bytes[static_cast<unsigned char>(token.content[0])] = true;
        }
      }
    }
    words.reserve(kRangesReserved);
  }

  struct AddedSet {
    std::vector<const AddedToken*> tokens;  // longest first
    std::vector<bool> first_bytes;
  };

  // Encodes text[range] with the added tokens of `group` and the groups behind it.
  Status EncodeGroup(std::string_view text, Range range, int parse_special, int group,
                     std::vector<uint32_t>* ids) {
    if (group == 2) return EncodeOrdinary(text, range, ids);
    const AddedSet& set = added[parse_special][group];
    if (set.tokens.empty()) return EncodeGroup(text, range, parse_special, group + 1, ids);
    const std::string_view part = text.substr(0, range.end);
    size_t from = range.begin;
    while (true) {
      const Found found = FindAdded(set.tokens, set.first_bytes, part, from);
      if (found.begin > from) {
        RETURN_IF_ERROR(EncodeGroup(text, {from, found.begin}, parse_special, group + 1, ids));
      }
      if (found.token == nullptr) return OkStatus();
      ids->push_back(found.token->id);
      from = found.begin + found.token->content.size();
    }
  }

  Status EncodeOrdinary(std::string_view text, Range range, std::vector<uint32_t>* ids) {
    if (impl.add_prefix_space && range.begin < range.end && text[range.begin] != ' ') {
      const std::string prefixed = Str(" ", text.substr(range.begin, range.end - range.begin));
      return EncodeWords(prefixed, {0, prefixed.size()}, ids);
    }
    return EncodeWords(text, range, ids);
  }

  Status EncodeWords(std::string_view text, Range range, std::vector<uint32_t>* ids) {
    words.clear();
    RETURN_IF_ERROR(splitter.Split(text, range, &words));
    for (const Range& word : words) {
      const size_t size = word.end - word.begin;
      if (size > WordCache::kWordBytesMax) {
        impl.model.Encode(text.substr(word.begin, size), ids);
        continue;
      }
      const WordCache::Key key =
          WordCache::MakeKey(text.data() + word.begin, size, text.size() - word.begin);
      WordCache::Entry& entry = cache.At(key);
      if (WordCache::Holds(entry, key)) {
        ids->insert(ids->end(), entry.ids, entry.ids + entry.count);
        continue;
      }
      const size_t before = ids->size();
      impl.model.Encode(text.substr(word.begin, size), ids);
      const size_t count = ids->size() - before;
      if (count <= WordCache::kIdsMax) WordCache::Fill(&entry, key, ids->data() + before, count);
    }
    return OkStatus();
  }

  const TokenizerImpl& impl;
  Splitter splitter;
  WordCache cache;
  AddedSet added[2][2];  // by parse_special_tokens, group
  std::vector<Range> words;
};

Encoder::Encoder(const Tokenizer& tokenizer)
    : tokenizer_(tokenizer), state_(std::make_unique<State>(*tokenizer.impl_)) {}
Encoder::~Encoder() = default;

Status Encoder::Encode(std::string_view text, const EncodeOptions& options,
                       std::vector<uint32_t>* ids) {
  const size_t bad = text::FindInvalidUtf8(text);
  if (bad != std::string_view::npos) {
    return InvalidArgument(Str("byte ", bad, ": not UTF-8 text"));
  }
  const size_t before = ids->size();
  const TokenizerImpl& impl = *tokenizer_.impl_;
  if (options.add_special_tokens) {
    ids->insert(ids->end(), impl.prefix_ids.begin(), impl.prefix_ids.end());
  }
  Status status =
      state_->EncodeGroup(text, {0, text.size()}, options.parse_special_tokens ? 1 : 0, 0, ids);
  if (!status.ok()) {
    ids->resize(before);
    return status;
  }
  if (options.add_special_tokens) {
    ids->insert(ids->end(), impl.suffix_ids.begin(), impl.suffix_ids.end());
  }
  return OkStatus();
}

}  // namespace heddle::tokenizer
