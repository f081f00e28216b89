#include "worker/control/control_frame.h"

#include <gtest/gtest.h>

#include <random>
#include <string>

namespace heddle::control {
namespace {

TEST(Crc32c, MatchesThePublishedVectors) {
  EXPECT_EQ(Crc32c("123456789"), 0xe3069283u);
  EXPECT_EQ(Crc32c(""), 0u);
  EXPECT_EQ(Crc32c(std::string(32, '\0')), 0x8a9136aau);
  EXPECT_EQ(Crc32c(std::string(32, '\xff')), 0x62a8ab43u);
}

TEST(ControlFrame, HasTheDocumentedLayout) {
  const std::string bytes = EncodeFrame(FrameType::kSeal, 0x1122334455667788, 0xaabbccdd, "ab");
  ASSERT_EQ(bytes.size(), kFrameHeaderBytes + 2);
  EXPECT_EQ(bytes.substr(0, 4), std::string("\x02\0\0\0", 4));
  EXPECT_EQ(bytes.substr(4, 2), std::string("\x06\0", 2));
  EXPECT_EQ(bytes.substr(6, 2), std::string("\x01\0", 2));
  EXPECT_EQ(bytes.substr(8, 8), "\x88\x77\x66\x55\x44\x33\x22\x11");
  EXPECT_EQ(bytes.substr(16, 4), "\xdd\xcc\xbb\xaa");
}

TEST(FrameReader, CutsAStreamThatArrivesByteByByte) {
  std::string stream;
  for (int i = 0; i < 50; ++i) {
    stream +=
        EncodeFrame(FrameType::kProgress, 7, 3, std::string(static_cast<size_t>(i * 37), 'x'));
  }
  FrameReader reader;
  Frame frame;
  int frames = 0;
  for (const char byte : stream) {
    reader.Append(std::string_view(&byte, 1));
    while (reader.Next(&frame) == FrameReader::Result::kFrame) {
      EXPECT_EQ(frame.payload.size(), static_cast<size_t>(frames * 37));
      EXPECT_EQ(frame.header.fence, 7u);
      ++frames;
    }
  }
  EXPECT_EQ(frames, 50);
  EXPECT_TRUE(reader.AtBoundary());
}

TEST(FrameReader, RefusesEachDamagedField) {
  const std::string good = EncodeFrame(FrameType::kHello, 1, 0, "payload");
  struct Case {
    size_t offset;
    char value;
    const char* part;
  };
  for (const Case& one :
       {Case{2, '\x11', "bytes"}, Case{4, '\x7f', "type"}, Case{6, '\x02', "version"},
        Case{6, '\0', "version"}, Case{20, '\x55', "checksum"}, Case{26, 'X', "checksum"}}) {
    std::string bytes = good;
    bytes[one.offset] = one.value;
    FrameReader reader;
    reader.Append(bytes);
    Frame frame;
    EXPECT_EQ(reader.Next(&frame), FrameReader::Result::kBad) << one.offset;
    EXPECT_NE(reader.error().find(one.part), std::string::npos) << reader.error();
    reader.Append(good);
    EXPECT_EQ(reader.Next(&frame), FrameReader::Result::kBad) << "a lost stream stays lost";
  }
}

TEST(FrameReader, TakesTheLongestFrameAndRefusesOneByteMore) {
  FrameReader reader;
  reader.Append(EncodeFrame(FrameType::kSeal, 1, 0, std::string(kMaxPayloadBytes, 'z')));
  Frame frame;
  EXPECT_EQ(reader.Next(&frame), FrameReader::Result::kFrame);
  reader.Append(EncodeFrame(FrameType::kSeal, 1, 0, std::string(kMaxPayloadBytes + 1, 'z')));
  EXPECT_EQ(reader.Next(&frame), FrameReader::Result::kBad);
}

TEST(FrameReader, NeverCrashesOnRandomBytes) {
  const unsigned seed = std::random_device()();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 random(seed);
  const std::string good = EncodeFrame(FrameType::kHello, 1, 0, "0123456789");
  int accepted = 0;
  for (int round = 0; round < 20'000; ++round) {
    // Half of the rounds start from a good frame, so that later checks are reached too.
    std::string bytes = good;
    if (round % 2 == 0) bytes.resize(random() % 200);
    for (int flips = static_cast<int>(random() % 8); flips > 0 && !bytes.empty(); --flips) {
      bytes[random() % bytes.size()] = static_cast<char>(random());
    }
    FrameReader reader;
    reader.Append(bytes);
    Frame frame;
    while (reader.Next(&frame) == FrameReader::Result::kFrame) {
      EXPECT_LE(frame.payload.size(), bytes.size());
      ++accepted;
    }
  }
  EXPECT_GT(accepted, 0);
}

TEST(FrameType, StickyFramesAreReliableAndNamed) {
  int known = 0;
  for (int type = 0; type < 65536; ++type) {
    if (!IsKnownFrameType(static_cast<uint16_t>(type))) continue;
    ++known;
    const auto frame_type = static_cast<FrameType>(type);
    if (IsSticky(frame_type)) {
      EXPECT_TRUE(IsReliable(frame_type)) << ToText(frame_type);
    }
  }
  EXPECT_EQ(known, 20);
  EXPECT_FALSE(IsReliable(FrameType::kProgress));
  EXPECT_FALSE(IsSticky(FrameType::kSeal));
}

}  // namespace
}  // namespace heddle::control
