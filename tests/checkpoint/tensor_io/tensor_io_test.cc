#include <fcntl.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <atomic>
#include <cmath>
#include <filesystem>
#include <limits>
#include <map>

#include "checkpoint/catalog/coverage.h"
#include "checkpoint/catalog/tensors.h"
#include "checkpoint/format/verify.h"
#include "checkpoint/tensor_io/load.h"
#include "checkpoint/tensor_io/save.h"
#include "tests/checkpoint/temp_dir.h"
#include "tests/support/bad_disk.h"
#include "tests/support/status_matchers.h"

namespace heddle::checkpoint {
namespace {

using heddle::v1::CheckpointRecord;
using heddle::v1::TensorClass;
using heddle::v1::TensorInfo;

constexpr TensorClass kClasses[] = {heddle::v1::TENSOR_CLASS_MASTER,
                                    heddle::v1::TENSOR_CLASS_MOMENT1,
                                    heddle::v1::TENSOR_CLASS_MOMENT2};

// A model of three tensors, one of several chunks, whose values tell (tensor, class, element).
class Fixture {
 public:
  Fixture() {
    std::vector<TensorInfo> infos;
    for (const auto& [name, rows, columns] : std::vector<std::tuple<const char*, int64_t, int64_t>>{
             {"z.weight", 1000, 700}, {"a.bias", 3, 1}, {"m.norm", 64, 5}}) {
      TensorInfo info;
      info.set_name(name);
      info.add_shape(rows);
      info.add_shape(columns);
      for (const TensorClass tensor_class : kClasses) {
        info.add_classes(tensor_class);
      }
      infos.push_back(info);
    }
    tensors = *NumberTensors(infos);
    for (const TensorInfo& info : tensors) {
      for (const TensorClass tensor_class : kClasses) {
        std::vector<float>& values = data[{info.id(), tensor_class}];
        values.resize(Elements(info));
        for (size_t i = 0; i < values.size(); ++i) {
          values[i] = ValueAt(info.id(), tensor_class, i);
        }
      }
    }
  }

  static float ValueAt(uint32_t tensor, TensorClass tensor_class, uint64_t element) {
    return static_cast<float>(tensor) * 1e6f + static_cast<float>(tensor_class) * 1e5f +
           static_cast<float>(element % 90001) / 1024.0f;
  }

  std::vector<LocalRange> Whole() const {
    std::vector<LocalRange> ranges;
    for (const auto& [key, values] : data) {
      ranges.push_back({.tensor = key.first,
                        .tensor_class = key.second,
                        .first = 0,
                        .count = values.size(),
                        .data = values.data()});
    }
    return ranges;
  }

  // What rank `rank` owns when every tensor is cut into `world` nearly equal element ranges that
  // respect no chunk border.
  std::vector<LocalRange> Cut(uint32_t rank, uint32_t world) const {
    std::vector<LocalRange> ranges;
    for (LocalRange range : Whole()) {
      const uint64_t begin = range.count * rank / world;
      const uint64_t end = range.count * (rank + 1) / world;
      range.data = static_cast<const float*>(range.data) + begin;
      range.first = begin;
      range.count = end - begin;
      if (range.count > 0) {
        ranges.push_back(range);
      }
    }
    return ranges;
  }

  // Writes with `world` ranks, as replicas or as shards.
  StatusOr<CheckpointRecord> Save(const std::string& root, uint32_t world, bool sharded,
                                  uint64_t roll_bytes = uint64_t{256} << 20) const {
    CheckpointRecord record;
    record.set_job(1);
    record.set_fence(2);
    record.set_step(3);
    record.set_world_size(world);
    record.set_dir("j-1/f2/step-3");
    for (const TensorInfo& info : tensors) {
      *record.add_tensors() = info;
    }
    for (uint32_t rank = 0; rank < world; ++rank) {
      Snapshot snapshot;
      RETURN_IF_ERROR(snapshot.Stage(
          tensors, sharded ? Cut(rank, world) : ReplicaShare(tensors, Whole(), rank, world)));
      ShardWriterOptions options;
      options.root = root;
      options.dir = record.dir();
      options.roll_bytes = roll_bytes;
      options.header.set_job(1);
      options.header.set_fence(2);
      options.header.set_step(3);
      options.header.set_rank(rank);
      options.header.set_world_size(world);
      ASSIGN_OR_RETURN(const auto files, snapshot.Write(options));
      heddle::v1::RankSeal* seal = record.add_seals();
      seal->set_rank(rank);
      for (const heddle::v1::ShardFile& file : files) {
        *seal->add_files() = file;
      }
    }
    return record;
  }

  std::vector<TensorInfo> tensors;
  std::map<std::pair<uint32_t, TensorClass>, std::vector<float>> data;
};

std::vector<WantedRange> WantAll(const Fixture& model,
                                 std::map<std::string, std::vector<float>>* out) {
  std::vector<WantedRange> wanted;
  for (const TensorInfo& info : model.tensors) {
    for (const TensorClass tensor_class : kClasses) {
      std::vector<float>& buffer = (*out)[Str(info.name(), " ", ToText(tensor_class))];
      buffer.assign(Elements(info), -1);
      wanted.push_back({.name = info.name(),
                        .shape = {info.shape().begin(), info.shape().end()},
                        .tensor_class = tensor_class,
                        .first = 0,
                        .count = buffer.size(),
                        .data = buffer.data()});
    }
  }
  return wanted;
}

TEST(TensorIo, AnyWorldSizeReadsWhatAnyOtherWrote) {
  const Fixture model;
  for (const bool sharded : {false, true}) {
    for (const uint32_t world : {1u, 2u, 3u, 7u}) {
      SCOPED_TRACE(testing::Message() << "sharded " << sharded << " world " << world);
      const TempDir root;
      const StatusOr<CheckpointRecord> record = model.Save(root.path(), world, sharded);
      ASSERT_OK(record.status());
      ASSERT_OK(CheckCoverage(*record));
      const VerifyReport report = VerifyCheckpoint(*record, root.path());
      ASSERT_TRUE(report.good()) << ToText(report.problems.front());
      // Another cut than any that wrote: five readers.
      for (uint32_t reader = 0; reader < 5; ++reader) {
        std::vector<std::vector<float>> buffers;
        std::vector<WantedRange> wanted;
        for (const LocalRange& part : model.Cut(reader, 5)) {
          const TensorInfo& info = model.tensors[part.tensor - 1];
          buffers.emplace_back(part.count, -1.0f);
          wanted.push_back({.name = info.name(),
                            .shape = {info.shape().begin(), info.shape().end()},
                            .tensor_class = part.tensor_class,
                            .first = part.first,
                            .count = part.count,
                            .data = buffers.back().data()});
        }
        ASSERT_OK(LoadRanges(*record, root.path(), wanted, {.refuse_unexpected = false}));
        for (size_t i = 0; i < wanted.size(); ++i) {
          uint32_t id = 0;
          for (const TensorInfo& info : model.tensors) {
            id = info.name() == wanted[i].name ? info.id() : id;
          }
          for (uint64_t e = 0; e < wanted[i].count; ++e) {
            ASSERT_EQ(buffers[i][e],
                      Fixture::ValueAt(id, wanted[i].tensor_class, wanted[i].first + e));
          }
        }
      }
    }
  }
}

TEST(TensorIo, ReplicasShareTheWork) {
  const Fixture model;
  std::vector<uint64_t> elements;
  for (uint32_t rank = 0; rank < 2; ++rank) {
    uint64_t sum = 0;
    for (const LocalRange& range : ReplicaShare(model.tensors, model.Whole(), rank, 2)) {
      sum += range.count;
    }
    elements.push_back(sum);
  }
  EXPECT_EQ(elements[0] + elements[1], 3u * (700000 + 3 + 320));
  EXPECT_GT(elements[0], 800000u);
  EXPECT_GT(elements[1], 800000u);
}

TEST(TensorIo, ASnapshotIsACopy) {
  Fixture model;
  const TempDir root;
  Snapshot snapshot;
  ASSERT_OK(snapshot.Stage(model.tensors, model.Whole()));
  for (auto& [key, values] : model.data) {
    std::fill(values.begin(), values.end(), -7.0f);  // training goes on
  }
  ShardWriterOptions options;
  options.root = root.path();
  options.dir = "j-1/f2/step-3";
  options.header.set_world_size(1);
  const auto files = snapshot.Write(options);
  ASSERT_OK(files.status());
  CheckpointRecord record;
  record.set_world_size(1);
  record.set_dir(options.dir);
  for (const TensorInfo& info : model.tensors) {
    *record.add_tensors() = info;
  }
  for (const auto& file : *files) {
    heddle::v1::RankSeal* seal =
        record.seals_size() == 0 ? record.add_seals() : record.mutable_seals(0);
    *seal->add_files() = file;
  }
  const auto weights = ReadModelWeights(record, root.path());
  ASSERT_OK(weights.status());
  ASSERT_EQ(weights->size(), 3u);
  EXPECT_EQ((*weights)[0].name, "a.bias");
  EXPECT_EQ((*weights)[2].shape, (std::vector<int64_t>{1000, 700}));
  EXPECT_EQ((*weights)[2].values[699999],
            Fixture::ValueAt(3, heddle::v1::TENSOR_CLASS_MASTER, 699999));
}

// Offloaded experts are copied one after the other into a file, the rest at last: the files of the
// checkpoint are those of one copy in memory.
TEST(TensorIo, ACopyOnDiskGivesTheSameValues) {
  const Fixture model;
  const TempDir root;
  const TempDir spill;
  std::map<std::string, std::vector<float>> expected;
  const StatusOr<CheckpointRecord> whole = model.Save(root.path(), 1, false);
  ASSERT_OK(whole.status());
  ASSERT_OK(LoadRanges(*whole, root.path(), WantAll(model, &expected)));
  Snapshot disk;
  for (int round = 0; round < 2; ++round) {  // the second in what the first left
    disk.Clear();
    std::vector<LocalRange> rest;
    for (const LocalRange& range : model.Whole()) {
      if (range.tensor == 2) {
        rest.push_back(range);
        continue;
      }
      const float* from = static_cast<const float*>(range.data);
      std::vector<float> passing(from, from + range.count);
      LocalRange one = range;
      one.data = passing.data();
      ASSERT_OK(disk.CopyToDisk(model.tensors, {one}, spill.path()));
    }
    ASSERT_OK(disk.Copy(model.tensors, rest));
    EXPECT_TRUE(std::filesystem::is_empty(spill.path())) << "the file has a name";
    ShardWriterOptions options;
    options.root = root.path();
    options.dir = Str("disk", round);
    options.header.set_job(1);
    options.header.set_fence(2);
    options.header.set_step(3);
    options.header.set_world_size(1);
    const auto files = disk.Write(options);
    ASSERT_OK(files.status());
    CheckpointRecord record = *whole;
    record.set_dir(options.dir);
    record.mutable_seals(0)->clear_files();
    for (const auto& file : *files) *record.mutable_seals(0)->add_files() = file;
    std::map<std::string, std::vector<float>> got;
    ASSERT_OK(LoadRanges(record, root.path(), WantAll(model, &got)));
    EXPECT_EQ(got, expected);
  }
}

TEST(TensorIo, ACopyOnDiskFailsWithTheFolderAndCountsBadValues) {
  Fixture model;
  Snapshot snapshot;
  const Status missing = snapshot.CopyToDisk(model.tensors, model.Whole(), "/no/such/folder");
  EXPECT_EQ(missing.code(), StatusCode::kNotFound);
  EXPECT_NE(Message(missing).find("/no/such/folder"), std::string::npos);
  const TempDir spill;
  model.data[{1, heddle::v1::TENSOR_CLASS_MASTER}][0] = std::nanf("");
  snapshot.Clear();
  ASSERT_OK(snapshot.CopyToDisk(model.tensors, model.Whole(), spill.path()));
  EXPECT_EQ(snapshot.non_finite(), 1u);
  EXPECT_EQ(snapshot.first_non_finite(), "a.bias (master)");
}

// A bad disk under the copy must not get into a checkpoint, whose digests would then vouch for it.
TEST(TensorIo, ACopyThatChangedOnTheDiskIsNotWritten) {
  const Fixture model;
  const TempDir root;
  const TempDir spill;
  Snapshot snapshot;
  ASSERT_OK(snapshot.CopyToDisk(model.tensors, model.Whole(), spill.path()));
  ASSERT_EQ(FlipBits(spill.path()), 1);
  ShardWriterOptions options;
  options.root = root.path();
  options.dir = "d";
  const Status written = snapshot.Write(options).status();
  EXPECT_EQ(written.code(), StatusCode::kDataLoss);
  EXPECT_NE(Message(written).find(spill.path()), std::string::npos) << Message(written);
  EXPECT_TRUE(std::filesystem::is_empty(root.path() + "/d"));
}

// A range that is handed over comes whole and in order of its places, and its failure ends the
// load.
TEST(TensorIo, ARangeCanBeHandedOverPieceByPiece) {
  const Fixture model;
  const TempDir root;
  const StatusOr<CheckpointRecord> record = model.Save(root.path(), 3, true);
  ASSERT_OK(record.status());
  std::map<std::string, std::vector<float>> buffers;
  std::vector<WantedRange> wanted = WantAll(model, &buffers);
  ASSERT_OK(LoadRanges(*record, root.path(), wanted));
  std::map<std::string, std::vector<float>> handed;
  for (WantedRange& range : wanted) {
    std::vector<float>* to = &handed[Str(range.name, "/", static_cast<int>(range.tensor_class))];
    to->assign(range.count, -1.0f);
    range.data = nullptr;
    range.take = [to](uint64_t first, std::span<const std::byte> bytes) {
      std::memcpy(to->data() + first, bytes.data(), bytes.size());
      return OkStatus();
    };
  }
  ASSERT_OK(LoadRanges(*record, root.path(), wanted));
  size_t same = 0;
  for (const auto& [name, values] : buffers) {
    for (const auto& [other, got] : handed) same += got == values ? 1 : 0;
  }
  EXPECT_GE(same, buffers.size());
  wanted.back().take = [](uint64_t, std::span<const std::byte>) { return DataLoss("bad disk"); };
  EXPECT_EQ(LoadRanges(*record, root.path(), wanted).code(), StatusCode::kDataLoss);
}

TEST(TensorIo, NeverWritesAValueThatIsNotFinite) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    Fixture model;
    const TempDir root;
    model.data[{3, heddle::v1::TENSOR_CLASS_MOMENT2}][123456] = bad;
    Snapshot snapshot;
    ASSERT_OK(snapshot.Stage(model.tensors, model.Whole()));
    EXPECT_EQ(snapshot.non_finite(), 1u);
    EXPECT_EQ(snapshot.first_non_finite(), "z.weight (moment2)");
    ShardWriterOptions options;
    options.root = root.path();
    options.dir = "d";
    EXPECT_EQ(snapshot.Write(options).status().code(), StatusCode::kFailedPrecondition);
  }
}

TEST(TensorIo, FilesThatAreWrittenAtOnceAreInOrderAndWhole) {
  const Fixture model;
  const TempDir root;
  const StatusOr<CheckpointRecord> record = model.Save(root.path(), 1, false, 1 << 20);
  ASSERT_OK(record.status());
  EXPECT_OK(CheckCoverage(*record));
  const auto& files = record->seals(0).files();
  ASSERT_GE(files.size(), 4);
  for (int i = 0; i < files.size(); ++i) {
    EXPECT_EQ(files[i].name(), Str("rank-0-", i, ".sst"));
    if (i > 0) {
      EXPECT_LT(files[i - 1].last_key(), files[i].first_key());
    }
  }
  const VerifyReport report = VerifyCheckpoint(*record, root.path());
  EXPECT_TRUE(report.good()) << ToText(report.problems[0]);
}

TEST(TensorIo, AFailedWriteGivesItsRoomBack) {
  const Fixture model;
  const TempDir root;
  Snapshot snapshot;
  ASSERT_OK(snapshot.Stage(model.tensors, model.Whole()));
  std::atomic<int> asked = 0;
  ShardWriterOptions options;
  options.root = root.path();
  options.dir = "d";
  options.roll_bytes = 1 << 20;
  options.permit = [&] { return ++asked > 4 ? Unavailable("no write permit") : OkStatus(); };
  EXPECT_EQ(snapshot.Write(options).status().code(), StatusCode::kUnavailable);
  EXPECT_TRUE(std::filesystem::is_empty(root.path() + "/d"));
}

TEST(TensorIo, ListsMissingUnexpectedAndMisshapedTensorsByName) {
  const Fixture model;
  const TempDir root;
  const StatusOr<CheckpointRecord> record = model.Save(root.path(), 1, false);
  ASSERT_OK(record.status());
  std::map<std::string, std::vector<float>> buffers;
  std::vector<WantedRange> wanted = WantAll(model, &buffers);
  ASSERT_OK(LoadRanges(*record, root.path(), wanted));
  wanted[0].name = "a.other";
  wanted[3].shape = {5, 64};
  const Status status = LoadRanges(*record, root.path(), wanted);
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  const std::string text = Message(status);
  EXPECT_NE(text.find("a.other (master) is missing"), std::string::npos) << text;
  EXPECT_NE(text.find("a.bias (master) is unexpected"), std::string::npos) << text;
  EXPECT_NE(text.find("m.norm (master) has the shape [64, 5], expected [5, 64]"), std::string::npos)
      << text;
}

// A model of another shape does not fill the screen: a tensor once for all its classes, eight
// names.
TEST(TensorIo, ListsATensorOnceAndNoMoreThanEight) {
  const Fixture model;
  const TempDir root;
  const StatusOr<CheckpointRecord> record = model.Save(root.path(), 1, false);
  ASSERT_OK(record.status());
  std::map<std::string, std::vector<float>> buffers;
  std::vector<WantedRange> wanted = WantAll(model, &buffers);
  for (size_t i = 0; i < 3; ++i) {
    wanted[i].shape = {1, 3};
  }
  WantedRange half = wanted[0];  // two ranges of one class are one class still
  wanted.push_back(half);
  EXPECT_EQ(Message(LoadRanges(*record, root.path(), wanted)),
            "the checkpoint does not fit the model; a.bias (master, moment1, moment2) has the "
            "shape [3, 1], expected [1, 3]");
  wanted.clear();
  for (int i = 0; i < 11; ++i) {
    for (const TensorClass tensor_class : kClasses) {
      wanted.push_back(
          {.name = Str("other.", i), .shape = {1}, .tensor_class = tensor_class, .count = 1});
    }
  }
  const std::string text = Message(LoadRanges(*record, root.path(), wanted));
  EXPECT_NE(text.find("other.7 (master, moment1, moment2) is missing; and 6 more: in all 11 "
                      "missing, 3 unexpected"),
            std::string::npos)
      << text;
  EXPECT_EQ(text.find("other.8"), std::string::npos) << text;
}

TEST(TensorIo, DamageIsDataLossAndNamesTheFile) {
  const Fixture model;
  const TempDir root;
  const StatusOr<CheckpointRecord> record = model.Save(root.path(), 2, false);
  ASSERT_OK(record.status());
  const std::string path = root.path() + "/j-1/f2/step-3/rank-1-0.sst";
  const int fd = open(path.c_str(), O_RDWR);
  ASSERT_EQ(pwrite(fd, "zz", 2, 100000), 2);
  close(fd);
  std::map<std::string, std::vector<float>> buffers;
  const std::vector<WantedRange> wanted = WantAll(model, &buffers);
  for (const bool digests : {true, false}) {
    const Status status = LoadRanges(*record, root.path(), wanted, {.check_digests = digests});
    EXPECT_EQ(status.code(), StatusCode::kDataLoss);
    EXPECT_NE(Message(status).find("rank-1-0.sst"), std::string::npos) << status;
  }
  ASSERT_EQ(unlink(path.c_str()), 0);
  EXPECT_EQ(LoadRanges(*record, root.path(), wanted).code(), StatusCode::kDataLoss);
}

TEST(TensorIo, ARecordThatOmitsAFileIsNotLoadedInPart) {
  const Fixture model;
  const TempDir root;
  StatusOr<CheckpointRecord> record = model.Save(root.path(), 2, true);
  ASSERT_OK(record.status());
  record->mutable_seals()->RemoveLast();
  std::map<std::string, std::vector<float>> buffers;
  const Status status = LoadRanges(*record, root.path(), WantAll(model, &buffers));
  EXPECT_EQ(status.code(), StatusCode::kDataLoss);
  EXPECT_NE(Message(status).find("are missing"), std::string::npos) << status;
}

}  // namespace
}  // namespace heddle::checkpoint
