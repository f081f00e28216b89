// GPT-2's printable alphabet: each byte has one Unicode character, so that vocabularies of byte
// strings can be written as JSON text. Printable Latin-1 bytes stand for themselves, the other 68
// are U+0100 onwards.
#pragma once

#include <optional>
#include <string>
#include <string_view>

namespace heddle::tokenizer {

// The character of `byte`, as UTF-8 of one or two bytes.
std::string_view ByteCharacter(unsigned char byte);

// The text form of a byte string.
std::string ToAlphabet(std::string_view bytes);

// The byte string of a text form; nullopt if a character is not in the alphabet.
std::optional<std::string> FromAlphabet(std::string_view text);

}  // namespace heddle::tokenizer
