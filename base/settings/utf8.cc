#include "base/settings/utf8.h"

#include <cstdint>

namespace heddle::settings {

size_t Utf8Length(const std::string& text, size_t i) {
  const unsigned char first = static_cast<unsigned char>(text[i]);
  size_t length = 1;
  uint32_t code = first;
  if (first < 0x80) {
    return 1;
  }
  if (first >= 0xC2 && first <= 0xDF) {
    length = 2;
    code = first & 0x1Fu;
  } else if (first >= 0xE0 && first <= 0xEF) {
    length = 3;
    code = first & 0x0Fu;
  } else if (first >= 0xF0 && first <= 0xF4) {
    length = 4;
    code = first & 0x07u;
  } else {
    return 0;
  }
  for (size_t k = 1; k < length; ++k) {
    const unsigned char next = i + k < text.size() ? static_cast<unsigned char>(text[i + k])
                                                   : static_cast<unsigned char>(0);
    if ((next & 0xC0) != 0x80) {
      return 0;
    }
    code = (code << 6) | (next & 0x3Fu);
  }
  const bool overlong = (length == 3 && code < 0x800) || (length == 4 && code < 0x10000);
  return overlong || (code >= 0xD800 && code <= 0xDFFF) || code > 0x10FFFF ? 0 : length;
}

bool IsUtf8(const std::string& text, size_t* offset) {
  for (size_t i = 0; i < text.size();) {
    const size_t length = Utf8Length(text, i);
    if (length == 0) {
      *offset = i;
      return false;
    }
    i += length;
  }
  return true;
}

}  // namespace heddle::settings
