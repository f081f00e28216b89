#include "data/text/utf8.h"

#include <cstdint>
#include <cstring>

namespace heddle::text {
namespace {

struct Scan {
  size_t length = 0;  // of the well-formed sequence, or of the ill-formed part to replace
  bool valid = false;
};

// Looks at the sequence that begins at `p`; `left` > 0 bytes are readable.
Scan ScanSequence(const unsigned char* p, size_t left) {
  const unsigned char lead = p[0];
  if (lead < 0x80) return {1, true};
  size_t length = 0;
  unsigned char low = 0x80;
  unsigned char high = 0xBF;
  if (lead >= 0xC2 && lead <= 0xDF) {
    length = 2;
  } else if (lead >= 0xE0 && lead <= 0xEF) {
    length = 3;
    if (lead == 0xE0) low = 0xA0;
    if (lead == 0xED) high = 0x9F;  // surrogates
  } else if (lead >= 0xF0 && lead <= 0xF4) {
    length = 4;
    if (lead == 0xF0) low = 0x90;
    if (lead == 0xF4) high = 0x8F;
  } else {
    return {1, false};
  }
  if (left < 2 || p[1] < low || p[1] > high) return {1, false};
  for (size_t i = 2; i < length; ++i) {
    if (i >= left || p[i] < 0x80 || p[i] > 0xBF) return {i, false};
  }
  return {length, true};
}

}  // namespace

size_t FindInvalidUtf8(std::string_view bytes) {
  const auto* p = reinterpret_cast<const unsigned char*>(bytes.data());
  size_t i = 0;
  while (i < bytes.size()) {
    if (bytes.size() - i >= 8) {
      uint64_t word;
      std::memcpy(&word, p + i, 8);
      if ((word & 0x8080808080808080u) == 0) {
        i += 8;
        continue;
      }
    }
    const Scan scan = ScanSequence(p + i, bytes.size() - i);
    if (!scan.valid) return i;
    i += scan.length;
  }
  return std::string_view::npos;
}

std::string ToPrintableUtf8(std::string_view bytes) {
  std::string out;
  const auto* p = reinterpret_cast<const unsigned char*>(bytes.data());
  for (size_t i = 0; i < bytes.size();) {
    const Scan scan = ScanSequence(p + i, bytes.size() - i);
    out += scan.valid ? bytes.substr(i, scan.length) : std::string_view("\xEF\xBF\xBD");
    i += scan.length;
  }
  return out;
}

}  // namespace heddle::text
