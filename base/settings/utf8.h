// Well-formed UTF-8: no surrogates, no overlong forms, at most U+10FFFF.
#pragma once

#include <cstddef>
#include <string>

namespace heddle::settings {

// Bytes of the character that starts at `i`; 0 if what stands there is not well formed.
// REQUIRES: i < text.size().
size_t Utf8Length(const std::string& text, size_t i);

// True if all of `text` is well formed. Otherwise *offset is the first bad byte.
bool IsUtf8(const std::string& text, size_t* offset);

}  // namespace heddle::settings
