// UTF-8 validity, shared by readers and tokenizers.
#pragma once

#include <cstddef>
#include <string>
#include <string_view>

namespace heddle::text {

// Offset of the first byte that is not part of well-formed UTF-8 (Unicode table 3-7), or npos.
size_t FindInvalidUtf8(std::string_view bytes);

// Replaces each maximal ill-formed part by U+FFFD, as Unicode recommends and Rust does: for
// printing decoded text that may be cut inside a character.
std::string ToPrintableUtf8(std::string_view bytes);

}  // namespace heddle::text
