#include "worker/control/rank_link.h"

#include <gtest/gtest.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <atomic>
#include <future>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "heddle/v1/worker_link.pb.h"
#include "tests/support/status_matchers.h"
#include "tests/support/worker/temp_dir.h"
#include "worker/control/control_frame.h"

namespace heddle::control {
namespace {

using std::chrono::milliseconds;

constexpr uint64_t kFence = 42;
constexpr uint32_t kRank = 5;

// A link and the other end of its socket.
struct Pair {
  Pair() {
    int fds[2];
    EXPECT_EQ(socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, fds), 0);
    shim = fds[0];
    RankLink::Handlers handlers;
    handlers.on_stop = [this](const v1::StopRank& stop) { grace_ms = stop.grace_ms(); };
    handlers.on_checkpoint = [this](const v1::CheckpointReply&) { ++news; };
    handlers.on_lost = [this](const Status& status) {
      lost_code = static_cast<int>(status.code());
      lost = true;
    };
    StatusOr<std::unique_ptr<RankLink>> made =
        RankLink::Adopt(fds[1], {.fence = kFence, .rank = kRank}, std::move(handlers));
    EXPECT_OK(made);
    link = *std::move(made);
  }
  ~Pair() {
    link.reset();
    if (shim >= 0) close(shim);
  }

  std::optional<Frame> Receive(milliseconds limit = milliseconds(5'000)) {
    Frame frame;
    while (reader.Next(&frame) != FrameReader::Result::kFrame) {
      pollfd fd = {shim, POLLIN, 0};
      char buffer[65536];
      if (poll(&fd, 1, static_cast<int>(limit.count())) <= 0) return std::nullopt;
      const ssize_t count = read(shim, buffer, sizeof(buffer));
      if (count <= 0) return std::nullopt;
      reader.Append(std::string_view(buffer, static_cast<size_t>(count)));
    }
    return frame;
  }
  void Give(FrameType type, const google::protobuf::MessageLite& message, uint64_t fence = kFence) {
    const std::string bytes = EncodeFrame(type, fence, kRank, message.SerializeAsString());
    ASSERT_EQ(write(shim, bytes.data(), bytes.size()), static_cast<ssize_t>(bytes.size()));
  }

  int shim = -1;
  FrameReader reader;
  std::atomic<int64_t> grace_ms = -1;
  std::atomic<int> news = 0;
  std::atomic<bool> lost = false;
  std::atomic<int> lost_code = 0;
  std::unique_ptr<RankLink> link;
};

v1::CheckpointReply Reply(uint64_t request, uint64_t step, v1::CheckpointVerdict verdict) {
  v1::CheckpointReply reply;
  reply.set_request(request);
  reply.set_step(step);
  reply.set_verdict(verdict);
  return reply;
}

TEST(RankLink, SpeaksTheLaunchInOrder) {
  Pair pair;
  v1::RankHello hello;
  hello.set_pid(123);
  ASSERT_OK(pair.link->Hello(hello));
  const std::optional<Frame> first = pair.Receive();
  ASSERT_TRUE(first.has_value());
  EXPECT_EQ(first->header.type, FrameType::kHello);
  EXPECT_EQ(first->header.fence, kFence);
  EXPECT_EQ(first->header.rank, kRank);
  v1::RankSpec spec;
  spec.set_threads(3);
  pair.Give(FrameType::kSpec, spec);
  spec.set_threads(4);
  pair.Give(FrameType::kSpec, spec);  // of a daemon that restarted
  const StatusOr<v1::RankSpec> got = pair.link->WaitForSpec(milliseconds(5'000));
  ASSERT_OK(got);
  EXPECT_EQ(got->threads(), 3u);
  EXPECT_STATUS(pair.link->WaitForStart(milliseconds(10)), StatusCode::kDeadlineExceeded, "START");
  pair.Give(FrameType::kStart, v1::StartRank());
  EXPECT_OK(pair.link->WaitForStart(milliseconds(5'000)));
}

TEST(RankLink, IgnoresFramesOfAnotherFence) {
  Pair pair;
  pair.Give(FrameType::kStart, v1::StartRank(), kFence - 1);
  pair.Give(FrameType::kStop, v1::StopRank(), kFence - 1);
  EXPECT_STATUS(pair.link->WaitForStart(milliseconds(50)), StatusCode::kDeadlineExceeded, "START");
  EXPECT_FALSE(pair.link->StopRequested());
}

TEST(RankLink, MatchesOverlappingRequestsByNumber) {
  Pair pair;
  const auto ask = [&pair](uint64_t step) {
    return std::async(std::launch::async, [&pair, step] {
      v1::SealShard seal;
      seal.set_step(step);
      return pair.link->SealShard(seal, milliseconds(5'000));
    });
  };
  auto one = ask(1);
  auto two = ask(2);
  std::vector<v1::SealShard> seals(2);
  for (v1::SealShard& seal : seals) {
    const std::optional<Frame> frame = pair.Receive();
    ASSERT_TRUE(frame.has_value());
    ASSERT_TRUE(seal.ParseFromString(frame->payload));
  }
  ASSERT_NE(seals[0].request(), seals[1].request());
  for (auto it = seals.rbegin(); it != seals.rend(); ++it) {
    pair.Give(FrameType::kCheckpointReply,
              Reply(it->request(), it->step(), v1::CHECKPOINT_VERDICT_OK));
  }
  const StatusOr<v1::CheckpointReply> first = one.get();
  const StatusOr<v1::CheckpointReply> second = two.get();
  ASSERT_OK(first);
  ASSERT_OK(second);
  EXPECT_EQ(first->step(), 1u);
  EXPECT_EQ(second->step(), 2u);
  EXPECT_EQ(pair.news, 0);
}

TEST(RankLink, AsksAgainWithTheSameNumberWhenUnavailable) {
  Pair pair;
  auto asked = std::async(std::launch::async, [&pair] {
    return pair.link->OpenCheckpoint(v1::OpenCheckpoint(), milliseconds(5'000));
  });
  v1::OpenCheckpoint first, second;
  std::optional<Frame> frame = pair.Receive();
  ASSERT_TRUE(frame.has_value() && first.ParseFromString(frame->payload));
  pair.Give(FrameType::kCheckpointReply,
            Reply(first.request(), 0, v1::CHECKPOINT_VERDICT_UNAVAILABLE));
  frame = pair.Receive();
  ASSERT_TRUE(frame.has_value() && second.ParseFromString(frame->payload));
  EXPECT_EQ(first.request(), second.request());
  pair.Give(FrameType::kCheckpointReply, Reply(first.request(), 0, v1::CHECKPOINT_VERDICT_REFUSED));
  const StatusOr<v1::CheckpointReply> reply = asked.get();
  ASSERT_OK(reply);
  EXPECT_EQ(reply->verdict(), v1::CHECKPOINT_VERDICT_REFUSED);
}

// A coordinator that is away for long leaves one question, not one for each time it was asked.
TEST(RankLink, AsksAgainWithTheSameNumberUntilThereIsAnAnswer) {
  Pair pair;
  const auto ask = [&pair](uint64_t step) {
    v1::SealShard seal;
    seal.set_step(step);
    EXPECT_STATUS(pair.link->SealShard(seal, milliseconds(20)), StatusCode::kDeadlineExceeded, "");
    const std::optional<Frame> frame = pair.Receive();
    EXPECT_TRUE(frame.has_value() && seal.ParseFromString(frame->payload));
    return seal.request();
  };
  const uint64_t first = ask(1);
  EXPECT_EQ(ask(1), first);
  const uint64_t second = ask(2);
  EXPECT_NE(second, first);
  EXPECT_EQ(ask(2), second);
  auto asked = std::async(std::launch::async, [&pair] {
    v1::SealShard seal;
    seal.set_step(2);
    return pair.link->SealShard(seal, milliseconds(5'000));
  });
  ASSERT_TRUE(pair.Receive().has_value());
  pair.Give(FrameType::kCheckpointReply, Reply(second, 2, v1::CHECKPOINT_VERDICT_OK));
  ASSERT_OK(asked.get());
  EXPECT_NE(ask(2), second) << "answered: this asks for what became of it since";
}

TEST(RankLink, CommitIsNewsForEveryRank) {
  Pair pair;
  auto waiting = std::async(std::launch::async,
                            [&pair] { return pair.link->WaitForCommit(20, milliseconds(5'000)); });
  pair.Give(FrameType::kCheckpointReply, Reply(0, 10, v1::CHECKPOINT_VERDICT_COMMITTED));
  pair.Give(FrameType::kCheckpointReply, Reply(0, 20, v1::CHECKPOINT_VERDICT_COMMITTED));
  const StatusOr<v1::CheckpointReply> reply = waiting.get();
  ASSERT_OK(reply);
  EXPECT_EQ(reply->step(), 20u);
  EXPECT_OK(pair.link->WaitForCommit(10, milliseconds(10))) << "known before anyone asked";
  EXPECT_TRUE(test::WaitUntil([&] { return pair.news == 2; }));
  EXPECT_STATUS(pair.link->WaitForCommit(30, milliseconds(10)), StatusCode::kDeadlineExceeded,
                "30");
  pair.Give(FrameType::kCheckpointReply, Reply(0, 0, v1::CHECKPOINT_VERDICT_FENCED));
  const StatusOr<v1::CheckpointReply> fenced = pair.link->WaitForCommit(30, milliseconds(5'000));
  ASSERT_OK(fenced);
  EXPECT_EQ(fenced->verdict(), v1::CHECKPOINT_VERDICT_FENCED);
}

TEST(RankLink, ProgressNeverBlocksAndDropsItsOldest) {
  Pair pair;  // nobody reads
  v1::RankProgress progress;
  for (int i = 0; i < 2'000; ++i) progress.add_points()->set_step(static_cast<uint64_t>(i));
  for (uint64_t step = 1; step <= 3'000; ++step) {
    progress.set_step(step);
    ASSERT_OK(pair.link->Progress(progress));
  }
  const uint64_t dropped = pair.link->progress_dropped();
  EXPECT_GT(dropped, 1'000u);
  uint64_t last = 0, received = 0;
  while (last < 3'000) {
    const std::optional<Frame> frame = pair.Receive();
    ASSERT_TRUE(frame.has_value());
    v1::RankProgress got;
    ASSERT_TRUE(got.ParseFromString(frame->payload));
    EXPECT_GT(got.step(), last);
    last = got.step();
    ++received;
  }
  EXPECT_EQ(received + dropped, 3'000u);
}

TEST(RankLink, LosesTheLinkOnceAndFailsEveryWait) {
  Pair pair;
  auto waiting = std::async(std::launch::async,
                            [&pair] { return pair.link->WaitForSpec(milliseconds(60'000)); });
  close(pair.shim);
  pair.shim = -1;
  EXPECT_STATUS(waiting.get(), StatusCode::kUnavailable, "closed");
  EXPECT_TRUE(test::WaitUntil([&] { return pair.lost.load(); }));
  EXPECT_EQ(pair.lost_code, static_cast<int>(StatusCode::kUnavailable));
  EXPECT_STATUS(pair.link->Ready(v1::RankReady()), StatusCode::kUnavailable, "");
  EXPECT_STATUS(pair.link->SealShard(v1::SealShard(), milliseconds(60'000)),
                StatusCode::kUnavailable, "");
}

TEST(RankLink, NonsenseFromTheShimIsALostLink) {
  Pair pair;
  const std::string bytes(100, '\xee');
  ASSERT_EQ(write(pair.shim, bytes.data(), bytes.size()), 100);
  EXPECT_TRUE(test::WaitUntil([&] { return pair.lost.load(); }));
}

TEST(RankLink, ExitLeavesBeforeItReturns) {
  Pair pair;
  v1::RankExit exit;
  exit.set_code(88);
  ASSERT_OK(pair.link->Exit(exit));
  const std::optional<Frame> frame = pair.Receive(milliseconds(0));
  ASSERT_TRUE(frame.has_value());
  EXPECT_EQ(frame->header.type, FrameType::kExit);
  v1::StopRank stop;
  stop.set_grace_ms(1'234);
  pair.Give(FrameType::kStop, stop);
  EXPECT_TRUE(test::WaitUntil([&] { return pair.grace_ms == 1'234; }));
  EXPECT_TRUE(pair.link->StopRequested());
}

TEST(RankLink, RefusesToRunOutsideAShim) {
  unsetenv("HEDDLE_CONTROL");
  EXPECT_STATUS(RankLink::FromEnvironment({}), StatusCode::kFailedPrecondition, "heddle-shim");
  setenv("HEDDLE_CONTROL", "fd:x", 1);
  setenv("HEDDLE_FENCE", "1", 1);
  setenv("HEDDLE_RANK", "0", 1);
  EXPECT_STATUS(RankLink::FromEnvironment({}), StatusCode::kFailedPrecondition, "");
  unsetenv("HEDDLE_CONTROL");
}

}  // namespace
}  // namespace heddle::control
