#include "data/text/utf8.h"

#include <gtest/gtest.h>

#include <cstdint>
#include <string>

namespace heddle::text {
namespace {

// Decodes by arithmetic instead of tables: the value, then shortest form, range and surrogates.
bool IsWellFormed(const std::string& bytes) {
  size_t i = 0;
  while (i < bytes.size()) {
    const auto lead = static_cast<unsigned char>(bytes[i]);
    const int length = lead < 0x80       ? 1
                       : lead >> 5 == 6  ? 2
                       : lead >> 4 == 14 ? 3
                       : lead >> 3 == 30 ? 4
                                         : 0;
    if (length == 0 || i + static_cast<size_t>(length) > bytes.size()) return false;
    uint32_t value = length == 1 ? lead : lead & (0x7Fu >> length);
    for (int k = 1; k < length; ++k) {
      const auto next = static_cast<unsigned char>(bytes[i + static_cast<size_t>(k)]);
      if (next >> 6 != 2) return false;
      value = value << 6 | (next & 0x3F);
    }
    const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    if (value < least[length] || value > 0x10FFFF || (value >= 0xD800 && value < 0xE000))
      return false;
    i += static_cast<size_t>(length);
  }
  return true;
}

TEST(Utf8, AgreesWithADecoderOnAllThreeByteStrings) {
  std::string bytes(3, '\0');
  int64_t differing = 0;
  for (uint32_t value = 0; value < 1u << 24; ++value) {
    // Leads below 0x80 in front add nothing that two bytes do not show.
    if ((value >> 16) > 0 && (value >> 16) < 0x70) continue;
    bytes[0] = static_cast<char>(value >> 16);
    bytes[1] = static_cast<char>(value >> 8);
    bytes[2] = static_cast<char>(value);
    if ((FindInvalidUtf8(bytes) == std::string::npos) != IsWellFormed(bytes)) ++differing;
  }
  EXPECT_EQ(differing, 0);
}

TEST(Utf8, AgreesWithADecoderOnFourByteBorders) {
  const unsigned char edges[] = {0x00, 0x7F, 0x80, 0x8F, 0x90, 0x9F, 0xA0, 0xBF, 0xC0, 0xC1,
                                 0xC2, 0xDF, 0xE0, 0xED, 0xEF, 0xF0, 0xF3, 0xF4, 0xF5, 0xFF};
  for (const unsigned char a : edges) {
    for (const unsigned char b : edges) {
      for (const unsigned char c : edges) {
        for (const unsigned char d : edges) {
          const std::string bytes = {static_cast<char>(a), static_cast<char>(b),
                                     static_cast<char>(c), static_cast<char>(d)};
          EXPECT_EQ(FindInvalidUtf8(bytes) == std::string::npos, IsWellFormed(bytes))
              << int{a} << " " << int{b} << " " << int{c} << " " << int{d};
        }
      }
    }
  }
}

TEST(Utf8, NamesTheFirstBadByteBehindLongAscii) {
  for (size_t good = 0; good < 40; ++good) {
    EXPECT_EQ(FindInvalidUtf8(std::string(good, 'x') + "\xC3"), good);
    EXPECT_EQ(FindInvalidUtf8(std::string(good, 'x') + "\xFFyyyyyyyyyyyyyyyy"), good);
  }
}

TEST(Utf8, ReplacesEachMaximalPartOnce) {
  // The example of the Unicode standard, table 3-11, and a cut character.
  EXPECT_EQ(ToPrintableUtf8("a\xE1\x80\xE2\xF0\x91\x92\xF1\xBF"
                            "A"),
            "a\uFFFD\uFFFD\uFFFD\uFFFD"
            "A");
  EXPECT_EQ(ToPrintableUtf8("ok \xE2\x82"), "ok \uFFFD");
  EXPECT_EQ(ToPrintableUtf8("gr\u00FC\u00DFe \U0001F600"), "gr\u00FC\u00DFe \U0001F600");
}

}  // namespace
}  // namespace heddle::text
