#include "data/tokenizer/byte_alphabet.h"

#include <array>
#include <cstdint>

namespace heddle::tokenizer {
namespace {

struct Alphabet {
  std::array<std::string, 256> characters;
  std::array<int, 0x200> byte_of;  // by code point, -1 = none
};

void AppendUtf8(uint32_t code_point, std::string* out) {
  if (code_point < 0x80) {
    out->push_back(static_cast<char>(code_point));
  } else {
    out->push_back(static_cast<char>(0xC0 | (code_point >> 6)));
    out->push_back(static_cast<char>(0x80 | (code_point & 0x3F)));
  }
}

Alphabet MakeAlphabet() {
  Alphabet alphabet;
  alphabet.byte_of.fill(-1);
  uint32_t next = 0x100;
  for (uint32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= '!' && byte <= '~') || (byte >= 0xA1 && byte != 0xAD);
    const uint32_t code_point = printable ? byte : next++;
    AppendUtf8(code_point, &alphabet.characters[byte]);
    alphabet.byte_of[code_point] = static_cast<int>(byte);
  }
  return alphabet;
}

const Alphabet& TheAlphabet() {
  static const Alphabet alphabet = MakeAlphabet();
  return alphabet;
}

}  // namespace

std::string_view ByteCharacter(unsigned char byte) { return TheAlphabet().characters[byte]; }

std::string ToAlphabet(std::string_view bytes) {
  std::string text;
  for (const char byte : bytes) text += ByteCharacter(static_cast<unsigned char>(byte));
  return text;
}

std::optional<std::string> FromAlphabet(std::string_view text) {
  const Alphabet& alphabet = TheAlphabet();
  std::string bytes;
  for (size_t i = 0; i < text.size();) {
    const auto lead = static_cast<unsigned char>(text[i]);
    uint32_t code_point = lead;
    size_t length = 1;
    if (lead >= 0x80) {
      if (lead < 0xC2 || lead > 0xDF || i + 1 >= text.size()) return std::nullopt;
      code_point = ((lead & 0x1Fu) << 6) | (static_cast<unsigned char>(text[i + 1]) & 0x3Fu);
      length = 2;
    }
    if (code_point >= alphabet.byte_of.size() || alphabet.byte_of[code_point] < 0) {
      return std::nullopt;
    }
    bytes.push_back(static_cast<char>(alphabet.byte_of[code_point]));
    i += length;
  }
  return bytes;
}

}  // namespace heddle::tokenizer
