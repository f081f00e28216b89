#include "data/pack/checksum.h"

#include <gtest/gtest.h>

#include <string>

#include "base/rng/rng.h"

namespace heddle::pack {
namespace {

TEST(Checksum, MatchesPublishedCrc32cValues) {
  // RFC 3720, appendix B.4, and the check value of the CRC catalogue.
  EXPECT_EQ(Crc32c("123456789", 9), 0xE3069283u);
  EXPECT_EQ(Crc32c(std::string(32, '\0').data(), 32), 0x8A9136AAu);
  EXPECT_EQ(Crc32c(std::string(32, '\xFF').data(), 32), 0x62A8AB43u);
  EXPECT_EQ(Crc32c("", 0), 0u);
}

TEST(Checksum, FastAndPortableCrcAgree) {
  RngCursor random(Rng(1, "test.crc"));
  std::string bytes(5000, '\0');
  for (char& byte : bytes) byte = static_cast<char>(random.Next());
  for (int round = 0; round < 300; ++round) {
    const size_t begin = random.Below(1000);
    const size_t size = random.Below(4000);
    ASSERT_EQ(Crc32c(bytes.data() + begin, size), Crc32cPortable(bytes.data() + begin, size))
        << begin << " " << size;
  }
}

TEST(Checksum, MatchesPublishedXxh3Values) {
  // xxHash's own test vector for the empty input: stored hashes depend on it.
  EXPECT_EQ(Xxh3Hex(""), "99aa06d3014798d86001c324468d497f");
  EXPECT_EQ(Xxh3("", 0), 0x2D06800538D394C2u);
}

TEST(Checksum, StreamsLikeOnePiece) {
  std::string bytes;
  Xxh3Stream stream;
  for (int i = 0; i < 500; ++i) {
    const std::string part(static_cast<size_t>(i % 37), static_cast<char>('a' + i % 26));
    stream.Update(part);
    bytes += part;
  }
  EXPECT_EQ(stream.Hex(), Xxh3Hex(bytes));
}

}  // namespace
}  // namespace heddle::pack
