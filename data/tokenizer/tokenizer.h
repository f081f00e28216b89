// Byte-level BPE tokenizers in Hugging Face's `tokenizer.json` form: load, encode, decode. Ids are
// those of the reference implementation (PyPI `tokenizers`). Source: formats.md section 4
// (F20-F22).
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status/status.h"

namespace heddle::tokenizer {

struct TokenizerImpl;

struct EncodeOptions {
  // Adds what the file's post-processor adds (Llama-3: the bos token).
  bool add_special_tokens = false;
  // Text that spells a special token becomes its id (as the reference does); otherwise it is
  // ordinary text. Packing uses false, so that the eos id stands only at document ends.
  bool parse_special_tokens = true;
};

// An immutable tokenizer; thread-safe.
class Tokenizer {
 public:
  // Reads `path`. NOT_FOUND, or INVALID_ARGUMENT that names file and part: no regular file, broken
  // JSON, a normalizer, pre-tokenizer, decoder, model or option that heddle does not implement, a
  // merge or id that does not exist.
  static StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& path);
  // The same of a file's bytes; `name` stands in messages.
  static StatusOr<std::unique_ptr<Tokenizer>> Parse(std::string_view json, const std::string& name);
  ~Tokenizer();
  Tokenizer(const Tokenizer&) = delete;
  Tokenizer& operator=(const Tokenizer&) = delete;

  // Largest id + 1: what a model's embedding needs.
  uint32_t vocab_size() const;
  // End-of-text token, if the file has one of the known names (`<|endoftext|>`, `<|end_of_text|>`,
  // `</s>`, ...).
  std::optional<uint32_t> eos_id() const;
  std::optional<uint32_t> bos_id() const;
  // Hex SHA-256 of the file's bytes (F5).
  const std::string& sha256() const;
  // The file's bytes, to be copied beside data and models.
  const std::string& json() const;
  // Id of an added or vocabulary token by its exact spelling ("Ġthe", "<|endoftext|>").
  std::optional<uint32_t> TokenId(std::string_view token) const;
  bool IsSpecial(uint32_t id) const;

  // Convenience without a word cache that survives the call; for bulk work use an Encoder.
  // INVALID_ARGUMENT with the byte offset when `text` is not UTF-8.
  StatusOr<std::vector<uint32_t>> Encode(std::string_view text,
                                         const EncodeOptions& options = {}) const;

  // The raw bytes of `ids`; unknown ids are INVALID_ARGUMENT. Bytes need not be valid UTF-8 where a
  // character is cut. `skip_special_tokens` leaves special tokens out.
  StatusOr<std::string> Decode(std::span<const uint32_t> ids,
                               bool skip_special_tokens = true) const;

 private:
  friend class Encoder;
  explicit Tokenizer(std::unique_ptr<TokenizerImpl> impl);
  std::unique_ptr<TokenizerImpl> impl_;
};

// Encodes many texts with a bounded word cache. One per thread; `tokenizer` must outlive it.
class Encoder {
 public:
  explicit Encoder(const Tokenizer& tokenizer);
  ~Encoder();
  Encoder(const Encoder&) = delete;
  Encoder& operator=(const Encoder&) = delete;

  // Appends the ids of `text` to `ids`. On error (as Tokenizer::Encode) `ids` is as before.
  Status Encode(std::string_view text, const EncodeOptions& options, std::vector<uint32_t>* ids);

 private:
  struct State;
  const Tokenizer& tokenizer_;
  std::unique_ptr<State> state_;
};

// Hex SHA-256 of bytes.
std::string Sha256Hex(std::string_view bytes);

}  // namespace heddle::tokenizer
