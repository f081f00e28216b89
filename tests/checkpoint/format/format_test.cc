#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

#include <fstream>
#include <memory>
#include <random>

#include "checkpoint/format/key.h"
#include "checkpoint/format/shard_reader.h"
#include "checkpoint/format/shard_writer.h"
#include "checkpoint/format/verify.h"
#include "tests/checkpoint/temp_dir.h"
#include "tests/support/status_matchers.h"

namespace heddle::checkpoint {
namespace {

using heddle::v1::CheckpointRecord;
using heddle::v1::ShardFile;

constexpr char kDir[] = "j-test/f7/step-10";
constexpr auto kF32 = heddle::v1::ELEMENT_TYPE_F32;

ShardWriterOptions OptionsFor(const std::string& root) {
  ShardWriterOptions options;
  options.root = root;
  options.dir = kDir;
  options.header.set_job(5);
  options.header.set_fence(7);
  options.header.set_step(10);
  options.header.set_rank(0);
  options.header.set_world_size(1);
  return options;
}

std::string Values(uint64_t count, float start) {
  std::vector<float> values(count);
  for (uint64_t i = 0; i < count; ++i) {
    values[i] = start + static_cast<float>(i);
  }
  return std::string(reinterpret_cast<const char*>(values.data()), count * sizeof(float));
}

// A whole checkpoint of one rank.
StatusOr<CheckpointRecord> WriteTensors(
    const std::string& root, uint64_t roll_bytes,
    const std::vector<std::pair<std::string, uint64_t>>& tensors) {
  ShardWriterOptions options = OptionsFor(root);
  options.roll_bytes = roll_bytes;
  ASSIGN_OR_RETURN(const std::unique_ptr<SstShardWriter> writer, SstShardWriter::Create(options));
  const uint64_t chunk = ChunkElements(kF32);
  CheckpointRecord record;
  record.set_job(5);
  record.set_fence(7);
  record.set_step(10);
  record.set_world_size(1);
  record.set_dir(kDir);
  uint32_t id = 0;
  for (const auto& [name, elements] : tensors) {
    heddle::v1::TensorInfo* tensor = record.add_tensors();
    tensor->set_id(++id);
    tensor->set_name(name);
    tensor->add_shape(static_cast<int64_t>(elements));
    tensor->add_classes(heddle::v1::TENSOR_CLASS_MASTER);
    for (uint64_t at = 0; at < elements; at += chunk) {
      RETURN_IF_ERROR(writer->Add({.tensor = id, .chunk = static_cast<uint32_t>(at / chunk)}, kF32,
                                  Values(std::min(chunk, elements - at), static_cast<float>(at))));
    }
  }
  ASSIGN_OR_RETURN(const std::vector<ShardFile> files, writer->Finish());
  heddle::v1::RankSeal* seal = record.add_seals();
  seal->set_rank(0);
  for (const ShardFile& file : files) {
    *seal->add_files() = file;
  }
  record.set_state(heddle::v1::CHECKPOINT_STATE_COMMITTED);
  return record;
}

// Tensor 1 of two chunks and a bit, tensor 2 small.
StatusOr<CheckpointRecord> WriteCheckpoint(const std::string& root, uint64_t roll_bytes) {
  return WriteTensors(root, roll_bytes, {{"big", 2 * ChunkElements(kF32) + 17}, {"small", 5}});
}

std::string PathOf(const std::string& root, const CheckpointRecord& record, int file) {
  return root + "/" + record.dir() + "/" + record.seals(0).files(file).name();
}

TEST(Key, OrderOfBytesIsOrderOfKeys) {
  const EntryKey low{.tensor = 1, .tensor_class = heddle::v1::TENSOR_CLASS_MOMENT2, .chunk = 255};
  const EntryKey high{.tensor = 1, .tensor_class = heddle::v1::TENSOR_CLASS_MOMENT2, .chunk = 256};
  EXPECT_LT(EncodeKey(low), EncodeKey(high));
  EXPECT_LT(HeaderKey(), EncodeKey({.tensor = 1}));
  EXPECT_EQ(EncodeKey(low).size(), kKeyBytes);
  EXPECT_EQ(*DecodeKey(EncodeKey(high)), high);
}

TEST(Key, RefusesOtherLengthsAndClasses) {
  EXPECT_EQ(DecodeKey("short").status().code(), StatusCode::kDataLoss);
  std::string bytes = EncodeKey({.tensor = 1});
  bytes[4] = 9;
  EXPECT_EQ(DecodeKey(bytes).status().code(), StatusCode::kDataLoss);
}

TEST(ShardWriter, WritesWhatTheReaderReads) {
  const TempDir root;
  const StatusOr<CheckpointRecord> record = WriteCheckpoint(root.path(), 256 << 20);
  ASSERT_OK(record.status());
  ASSERT_EQ(record->seals(0).files_size(), 1);
  const ShardFile& file = record->seals(0).files(0);
  EXPECT_EQ(file.entries(), 5u);  // header, three chunks, one
  EXPECT_EQ(file.first_key(), EncodeKey({.tensor = 1}));
  EXPECT_EQ(file.last_key(), EncodeKey({.tensor = 2}));
  ASSERT_EQ(file.ranges_size(), 2);  // neighbouring chunks are one range
  EXPECT_EQ(file.ranges(0).count(), 2 * ChunkElements(kF32) + 17);
  auto reader = ShardReader::Open(PathOf(root.path(), *record, 0), file, DigestCheck::kWholeFile);
  ASSERT_OK(reader.status());
  EXPECT_EQ((*reader)->header().fence(), 7u);
  EXPECT_EQ((*reader)->header().format_version(), kFormatVersion);
  std::string small;
  ASSERT_OK((*reader)->Scan({.tensor = 2}, {.tensor = 3}, [&](const EntryKey&, std::string_view v) {
    small = v;
    return OkStatus();
  }));
  EXPECT_EQ(small, Values(5, 0));
  ASSERT_OK((*reader)->VerifyBlocks());
}

TEST(ShardWriter, RollsToANewFile) {
  const TempDir root;
  const StatusOr<CheckpointRecord> record = WriteCheckpoint(root.path(), 1);
  ASSERT_OK(record.status());
  EXPECT_EQ(record->seals(0).files_size(), 4);
  const VerifyReport report = VerifyCheckpoint(*record, root.path());
  EXPECT_TRUE(report.good()) << ToText(report.problems.front());
  EXPECT_EQ(report.files, 4u);
}

TEST(ShardWriter, ARankWithoutElementsStillWritesAFile) {
  const TempDir root;
  auto writer = SstShardWriter::Create(OptionsFor(root.path()));
  ASSERT_OK(writer.status());
  auto files = (*writer)->Finish();
  ASSERT_OK(files.status());
  ASSERT_EQ(files->size(), 1u);
  EXPECT_EQ((*files)[0].entries(), 1u);
  EXPECT_EQ((*files)[0].ranges_size(), 0);
  EXPECT_FALSE((*writer)->Finish().ok());
}

TEST(ShardWriter, NeverWritesTheSameStepTwice) {
  const TempDir root;
  ASSERT_OK(WriteCheckpoint(root.path(), 256 << 20).status());
  EXPECT_EQ(WriteCheckpoint(root.path(), 256 << 20).status().code(), StatusCode::kAlreadyExists);
}

TEST(ShardWriter, RefusesKeysThatDoNotRiseAndValuesThatDoNotFit) {
  const TempDir root;
  auto writer = SstShardWriter::Create(OptionsFor(root.path()));
  ASSERT_OK(writer.status());
  ASSERT_OK((*writer)->Add({.tensor = 2}, kF32, Values(1, 0)));
  EXPECT_EQ((*writer)->Add({.tensor = 2}, kF32, Values(1, 0)).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ((*writer)->Add({.tensor = 1}, kF32, Values(1, 0)).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ((*writer)->Add({.tensor = 3}, kF32, "abc").code(), StatusCode::kInvalidArgument);
  EXPECT_EQ((*writer)->Add({.tensor = 3}, kF32, "").code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(
      (*writer)->Add({.tensor = 3, .first = 2}, kF32, Values(ChunkElements(kF32) - 1, 0)).code(),
      StatusCode::kInvalidArgument);
  ASSERT_OK((*writer)->Add({.tensor = 3}, kF32, Values(1, 0)));
}

TEST(ShardWriter, RefusesFoldersOutsideTheRoot) {
  const TempDir root;
  for (const char* dir : {"../x", "a/../../b", "/etc", "", "a//b"}) {
    ShardWriterOptions options = OptionsFor(root.path());
    options.dir = dir;
    EXPECT_EQ(SstShardWriter::Create(options).status().code(), StatusCode::kInvalidArgument) << dir;
  }
}

TEST(ShardWriter, StopsWithoutAPermit) {
  const TempDir root;
  int asked = 0;
  ShardWriterOptions options = OptionsFor(root.path());
  options.permit_every_bytes = 1;
  options.permit = [&] { return ++asked >= 3 ? Unavailable("no write permit") : OkStatus(); };
  auto writer = SstShardWriter::Create(options);
  ASSERT_OK(writer.status());  // asked once
  ASSERT_OK((*writer)->Add({.tensor = 1}, kF32, Values(4, 0)));
  ASSERT_OK((*writer)->Add({.tensor = 2}, kF32, Values(4, 0)));
  EXPECT_EQ((*writer)->Add({.tensor = 3}, kF32, Values(4, 0)).code(), StatusCode::kUnavailable);
  EXPECT_EQ((*writer)->Finish().status().code(), StatusCode::kUnavailable);
}

TEST(ShardWriter, ReportsAFullDisk) {
  const TempDir root;
  if (mount("tmpfs", root.path().c_str(), "tmpfs", 0, "size=1m") != 0) {
    GTEST_SKIP() << "needs the right to mount a small tmpfs";
  }
  const StatusOr<CheckpointRecord> record = WriteCheckpoint(root.path(), 256 << 20);
  umount2(root.path().c_str(), MNT_DETACH);
  EXPECT_EQ(record.status().code(), StatusCode::kResourceExhausted) << record.status();
}

TEST(Verify, FindsEveryKindOfDamage) {
  struct Damage {
    const char* name;
    std::function<void(CheckpointRecord*, const std::string& path)> apply;
    const char* expected;
  };
  const std::vector<Damage> damages = {
      {"missing", [](auto*, const auto& path) { unlink(path.c_str()); }, "ENOENT"},
      {"truncated", [](auto*, const auto& path) { EXPECT_EQ(truncate(path.c_str(), 5000), 0); },
       "5000 bytes, the record says"},
      {"gap in the record",
       [](auto* record, const auto&) { record->mutable_tensors(1)->set_shape(0, 6); },
       "small (master): elements [5, 6) are missing"},
      {"other fence", [](auto* record, const auto&) { record->set_fence(8); }, "fence 7"},
      {"missing rank", [](auto* record, const auto&) { record->set_world_size(2); },
       "1 of 2 ranks have sealed"},
      {"unlisted class", [](auto* record, const auto&) { record->mutable_tensors()->RemoveLast(); },
       "is not in the record"},
  };
  for (const Damage& damage : damages) {
    const TempDir root;
    StatusOr<CheckpointRecord> record = WriteCheckpoint(root.path(), 256 << 20);
    ASSERT_OK(record.status());
    ASSERT_TRUE(VerifyCheckpoint(*record, root.path()).good());
    damage.apply(&*record, PathOf(root.path(), *record, 0));
    const VerifyReport report = VerifyCheckpoint(*record, root.path());
    std::string all;
    for (const VerifyProblem& problem : report.problems) {
      all += ToText(problem) + "\n";
    }
    EXPECT_NE(all.find(damage.expected), std::string::npos) << damage.name << ": " << all;
  }
}

std::vector<std::string> Lines(const VerifyReport& report) {
  std::vector<std::string> lines;
  for (const VerifyProblem& problem : report.problems) {
    lines.push_back(ToText(problem));
  }
  return lines;
}

// One damaged file is not told again for each of the tensors that lie in it.
TEST(Verify, TellsOfAnUnreadableFileOnce) {
  std::vector<std::pair<std::string, uint64_t>> tensors;
  for (int i = 10; i < 70; ++i) {
    tensors.push_back({Str("tensor.", i), 1000});
  }
  const TempDir root;
  StatusOr<CheckpointRecord> record = WriteTensors(root.path(), 256 << 20, tensors);
  ASSERT_OK(record.status());
  const std::string path = PathOf(root.path(), *record, 0);
  const std::string name = record->seals(0).files(0).name();
  const std::string lost = name + ": 60 ranges of 60 tensors lie in it";

  const int fd = open(path.c_str(), O_RDWR);
  char byte = 0;
  ASSERT_EQ(pread(fd, &byte, 1, 100'000), 1);
  byte = static_cast<char>(byte ^ 1);
  ASSERT_EQ(pwrite(fd, &byte, 1, 100'000), 1);
  close(fd);
  std::vector<std::string> lines = Lines(VerifyCheckpoint(*record, root.path()));
  ASSERT_EQ(lines.size(), 3u) << testing::PrintToString(lines);
  EXPECT_NE(lines[0].find("the digest of the file"), std::string::npos);
  EXPECT_NE(lines[1].find(name + ": after chunk 0: tensor."), std::string::npos) << lines[1];
  EXPECT_EQ(lines[2], lost);

  ASSERT_EQ(truncate(path.c_str(), 5000), 0);
  lines = Lines(VerifyCheckpoint(*record, root.path()));
  ASSERT_EQ(lines.size(), 2u) << testing::PrintToString(lines);
  EXPECT_NE(lines[0].find(name + ": 5000 bytes, the record says"), std::string::npos) << lines[0];
  EXPECT_EQ(lines[1], lost);

  ASSERT_EQ(unlink(path.c_str()), 0);
  record->mutable_tensors(3)->set_shape(0, 1001);  // what else is wrong is still found
  lines = Lines(VerifyCheckpoint(*record, root.path()));
  ASSERT_EQ(lines.size(), 3u) << testing::PrintToString(lines);
  EXPECT_NE(lines[0].find("ENOENT"), std::string::npos) << lines[0];
  EXPECT_EQ(lines[1], lost);
  EXPECT_EQ(lines[2], "tensor.13 (master): elements [1000, 1001) are missing");
}

TEST(Verify, ListsNoMoreThanEightOfAKind) {
  std::vector<std::pair<std::string, uint64_t>> tensors;
  for (int i = 10; i < 30; ++i) {
    tensors.push_back({Str("tensor.", i), 10});
  }
  const TempDir root;
  StatusOr<CheckpointRecord> record = WriteTensors(root.path(), 256 << 20, tensors);
  ASSERT_OK(record.status());
  CheckpointRecord longer = *record;
  for (heddle::v1::TensorInfo& tensor : *longer.mutable_tensors()) {
    tensor.set_shape(0, 11);
  }
  std::vector<std::string> lines = Lines(VerifyCheckpoint(longer, root.path()));
  ASSERT_EQ(lines.size(), 9u) << testing::PrintToString(lines);
  EXPECT_EQ(lines[7], "tensor.17 (master): elements [10, 11) are missing");
  EXPECT_EQ(lines[8], "and 12 more ranges that are missing, twice or beyond the end");

  record->clear_tensors();
  lines = Lines(VerifyCheckpoint(*record, root.path()));
  ASSERT_EQ(lines.size(), 18u) << testing::PrintToString(lines);
  EXPECT_NE(lines[8].find(": and 12 more entries that do not fit"), std::string::npos) << lines[8];
}

// T6 in small: every flipped bit is found, also in bytes that no block checksum covers.
TEST(Verify, FindsEveryFlippedBit) {
  const uint64_t seed = std::random_device()();
  SCOPED_TRACE(testing::Message() << "seed " << seed);
  std::mt19937_64 random(seed);
  const TempDir root;
  const StatusOr<CheckpointRecord> record = WriteCheckpoint(root.path(), 256 << 20);
  ASSERT_OK(record.status());
  const std::string path = PathOf(root.path(), *record, 0);
  const uint64_t size = record->seals(0).files(0).bytes();
  constexpr int kFlips = 60;
  int detected = 0;
  for (int i = 0; i < kFlips; ++i) {
    // Half of them in the footer and properties at the end.
    const uint64_t at = i % 2 == 0 ? random() % size : size - 1 - random() % 2000;
    std::fstream file(path, std::ios::in | std::ios::out | std::ios::binary);
    char byte = 0;
    file.seekg(static_cast<int64_t>(at));
    file.get(byte);
    const char flipped = static_cast<char>(byte ^ (1 << random() % 8));
    file.seekp(static_cast<int64_t>(at));
    file.put(flipped);
    file.flush();
    detected += VerifyCheckpoint(*record, root.path()).good() ? 0 : 1;
    file.seekp(static_cast<int64_t>(at));
    file.put(byte);
  }
  EXPECT_EQ(detected, kFlips);
  EXPECT_TRUE(VerifyCheckpoint(*record, root.path()).good());
}

TEST(Verify, NamesTheTensorOfADamagedBlock) {
  const TempDir root;
  const StatusOr<CheckpointRecord> record = WriteCheckpoint(root.path(), 256 << 20);
  ASSERT_OK(record.status());
  const int fd = open(PathOf(root.path(), *record, 0).c_str(), O_RDWR);
  ASSERT_EQ(pwrite(fd, "zzzz", 4, 1500000), 4);  // within the second chunk of "big"
  close(fd);
  const VerifyReport report = VerifyCheckpoint(*record, root.path());
  bool named = false;
  for (const VerifyProblem& problem : report.problems) {
    named |= problem.tensor == "big (master)" && problem.block == "after chunk 0";
  }
  EXPECT_TRUE(named);
}

}  // namespace
}  // namespace heddle::checkpoint
