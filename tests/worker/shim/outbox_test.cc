#include "worker/shim/outbox.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace heddle::shim {
namespace {

using control::Frame;
using control::FrameReader;
using control::FrameType;

Frame Make(FrameType type, uint32_t rank, const std::string& payload) {
  Frame frame;
  frame.header.type = type;
  frame.header.rank = rank;
  frame.payload = payload;
  return frame;
}

// Payloads of everything that is due.
std::vector<std::string> DrainAll(Outbox* outbox) {
  FrameReader reader;
  std::string bytes;
  while (!(bytes = outbox->Next()).empty()) reader.Append(bytes);
  std::vector<std::string> payloads;
  Frame frame;
  while (reader.Next(&frame) == FrameReader::Result::kFrame) payloads.push_back(frame.payload);
  return payloads;
}

using Texts = std::vector<std::string>;

TEST(Outbox, KeepsReliableFramesUntilAcknowledged) {
  Outbox outbox;
  outbox.Attach();
  outbox.Add(Make(FrameType::kHello, 0, "hello"));
  outbox.Add(Make(FrameType::kSeal, 0, "seal"));
  outbox.Add(Make(FrameType::kRendezvous, 0, "ask"));
  EXPECT_EQ(DrainAll(&outbox), (Texts{"hello", "seal", "ask"}));
  outbox.Acknowledge(2);
  outbox.Acknowledge(99);
  outbox.Attach();
  EXPECT_EQ(DrainAll(&outbox), (Texts{"hello", "ask"}));
  outbox.Acknowledge(1);  // sticky: stays
  outbox.Acknowledge(2);  // numbered anew: the rendezvous
  outbox.Attach();
  EXPECT_EQ(DrainAll(&outbox), (Texts{"hello"}));
  EXPECT_EQ(outbox.kept(), 1u);
}

TEST(Outbox, RepeatedStickyFrameReplacesTheFirst) {
  Outbox outbox;
  for (int i = 0; i < 1'000; ++i) outbox.Add(Make(FrameType::kHello, 3, std::to_string(i)));
  outbox.Add(Make(FrameType::kHello, 4, "other rank"));
  outbox.Attach();
  EXPECT_EQ(DrainAll(&outbox), (Texts{"999", "other rank"}));
}

TEST(Outbox, ProgressDropsItsOldestAndCountsWhatNobodySaw) {
  Outbox outbox;
  outbox.Add(Make(FrameType::kSeal, 0, "seal"));
  for (int i = 0; i < 1'500; ++i) outbox.Add(Make(FrameType::kProgress, 0, std::to_string(i)));
  EXPECT_EQ(outbox.progress_dropped(), 1'500u - 1'024u);
  outbox.Attach();
  Texts got = DrainAll(&outbox);
  ASSERT_EQ(got.size(), 1'025u);
  EXPECT_EQ(got[0], "seal");
  EXPECT_EQ(got[1], std::to_string(1'500 - 1'024));
  for (int i = 0; i < 1'024; ++i) outbox.Add(Make(FrameType::kProgress, 0, "new"));
  EXPECT_EQ(outbox.progress_dropped(), 1'500u - 1'024u) << "those were sent once";
  EXPECT_EQ(DrainAll(&outbox).size(), 1'024u);
}

TEST(Outbox, NextDaemonGetsRecentProgressAgain) {
  Outbox outbox;
  outbox.Attach();
  outbox.Add(Make(FrameType::kProgress, 0, "1"));
  EXPECT_EQ(DrainAll(&outbox), (Texts{"1"}));
  EXPECT_TRUE(outbox.Drained());
  outbox.Detach();
  outbox.Add(Make(FrameType::kProgress, 0, "2"));
  outbox.Attach();
  EXPECT_EQ(DrainAll(&outbox), (Texts{"1", "2"}));
}

TEST(Outbox, ReplayHoldsOnlyReliableFrames) {
  Outbox outbox;
  outbox.Attach();
  outbox.Add(Make(FrameType::kProgress, 0, "p"));
  outbox.Add(Make(FrameType::kRankEof, 0, "eof"));
  outbox.Add(Make(FrameType::kExit, 0, "words"));
  outbox.Add(Make(FrameType::kRankExited, 0, "exited"));
  DrainAll(&outbox);
  FrameReader reader;
  reader.Append(outbox.Replay());
  Frame frame;
  Texts payloads;
  while (reader.Next(&frame) == FrameReader::Result::kFrame) payloads.push_back(frame.payload);
  EXPECT_EQ(payloads, (Texts{"words", "exited"}));
}

}  // namespace
}  // namespace heddle::shim
