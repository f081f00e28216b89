#include "checkpoint/catalog/coverage.h"

#include <gtest/gtest.h>

#include "checkpoint/catalog/tensors.h"

namespace heddle::checkpoint {
namespace {

using heddle::v1::CheckpointRecord;
using heddle::v1::ElementRange;
using heddle::v1::RankSeal;
using heddle::v1::ShardFile;
using heddle::v1::TensorInfo;

void AddTensor(CheckpointRecord* record, const std::string& name, std::vector<int64_t> shape) {
  TensorInfo* tensor = record->add_tensors();
  tensor->set_id(static_cast<uint32_t>(record->tensors_size()));
  tensor->set_name(name);
  for (const int64_t size : shape) {
    tensor->add_shape(size);
  }
  tensor->add_classes(heddle::v1::TENSOR_CLASS_MASTER);
  tensor->add_classes(heddle::v1::TENSOR_CLASS_MOMENT1);
}

ShardFile* AddFile(RankSeal* seal, int number) {
  ShardFile* file = seal->add_files();
  file->set_name("rank-" + std::to_string(seal->rank()) + "-" + std::to_string(number) + ".sst");
  file->set_bytes(100);
  file->set_entries(2);
  file->set_digest(std::string(16, 'd'));
  return file;
}

void AddRange(ShardFile* file, uint32_t tensor, heddle::v1::TensorClass tensor_class,
              uint64_t first, uint64_t count) {
  ElementRange* range = file->add_ranges();
  range->set_tensor(tensor);
  range->set_tensor_class(tensor_class);
  range->set_first(first);
  range->set_count(count);
}

// Two ranks, two tensors: rank 0 holds a and the first half of b, rank 1 the rest.
CheckpointRecord Whole() {
  CheckpointRecord record;
  record.set_world_size(2);
  AddTensor(&record, "a", {4, 5});
  AddTensor(&record, "b", {10});
  for (uint32_t rank = 0; rank < 2; ++rank) {
    RankSeal* seal = record.add_seals();
    seal->set_rank(rank);
    ShardFile* file = AddFile(seal, 0);
    for (const auto tensor_class :
         {heddle::v1::TENSOR_CLASS_MASTER, heddle::v1::TENSOR_CLASS_MOMENT1}) {
      if (rank == 0) {
        AddRange(file, 1, tensor_class, 0, 20);
      }
      AddRange(file, 2, tensor_class, rank * 5, 5);
    }
  }
  return record;
}

std::string Problems(const CheckpointRecord& record) {
  std::string all;
  for (const std::string& problem : CoverageProblems(record)) {
    all += problem + "\n";
  }
  return all;
}

TEST(Coverage, AcceptsAnExactCover) {
  EXPECT_EQ(Problems(Whole()), "");
  EXPECT_TRUE(CheckCoverage(Whole()).ok());
  EXPECT_EQ(TotalBytes(Whole()), 200u);
}

TEST(Coverage, NamesAGap) {
  CheckpointRecord record = Whole();
  record.mutable_seals(1)->mutable_files(0)->mutable_ranges(1)->set_first(6);
  record.mutable_seals(1)->mutable_files(0)->mutable_ranges(1)->set_count(4);
  EXPECT_EQ(Problems(record), "b (moment1): elements [5, 6) are missing\n");
  EXPECT_EQ(CheckCoverage(record).code(), StatusCode::kFailedPrecondition);
}

TEST(Coverage, ListsNoMoreThanEight) {
  CheckpointRecord record = Whole();
  for (int i = 0; i < 12; ++i) {
    record.add_seals()->set_rank(0);
  }
  const size_t all = CoverageProblems(record).size();
  const std::string text = Message(CheckCoverage(record));
  EXPECT_EQ(std::count(text.begin(), text.end(), ';'), 9) << text;
  EXPECT_NE(text.find(Str("; and ", all - 8, " more")), std::string::npos) << text;
}

TEST(Coverage, NamesAnOverlap) {
  CheckpointRecord record = Whole();
  record.mutable_seals(1)->mutable_files(0)->mutable_ranges(0)->set_first(3);
  record.mutable_seals(1)->mutable_files(0)->mutable_ranges(0)->set_count(7);
  EXPECT_EQ(Problems(record), "b (master): elements [3, 5) are there twice\n");
}

TEST(Coverage, NamesElementsBeyondTheEnd) {
  CheckpointRecord record = Whole();
  record.mutable_seals(1)->mutable_files(0)->mutable_ranges(0)->set_count(6);
  EXPECT_EQ(Problems(record), "b (master): elements [5, +6) of 10\n");
}

TEST(Coverage, RefusesARangeWhoseEndOverflows) {
  CheckpointRecord record = Whole();
  record.mutable_seals(1)->mutable_files(0)->mutable_ranges(0)->set_count(~uint64_t{0});
  EXPECT_NE(Problems(record), "");
}

TEST(Coverage, NamesAMissingRankAndOneThatSealedTwice) {
  CheckpointRecord record = Whole();
  *record.add_seals() = record.seals(1);
  record.mutable_seals()->DeleteSubrange(0, 1);
  const std::string problems = Problems(record);
  EXPECT_NE(problems.find("rank 1 has sealed twice"), std::string::npos) << problems;
  EXPECT_NE(problems.find("rank 0 has not sealed"), std::string::npos) << problems;
}

TEST(Coverage, NamesAnUnlistedTensorAndClass) {
  CheckpointRecord record = Whole();
  AddRange(record.mutable_seals(0)->mutable_files(0), 9, heddle::v1::TENSOR_CLASS_MASTER, 0, 1);
  AddRange(record.mutable_seals(0)->mutable_files(0), 1, heddle::v1::TENSOR_CLASS_MOMENT2, 0, 20);
  const std::string problems = Problems(record);
  EXPECT_NE(problems.find("tensor 9 (master)"), std::string::npos) << problems;
  EXPECT_NE(problems.find("a (moment2)"), std::string::npos) << problems;
}

TEST(Coverage, WantsIdsInSortedOrderOfNames) {
  CheckpointRecord record = Whole();
  record.mutable_tensors(1)->set_name("A");
  EXPECT_NE(Problems(record).find("not sorted"), std::string::npos);
}

TEST(Coverage, ATensorWithoutElementsNeedsNoRange) {
  CheckpointRecord record = Whole();
  AddTensor(&record, "c", {0, 7});
  EXPECT_EQ(Problems(record), "");
}

TEST(Coverage, RefusesNamesThatAreNotTheRanksOwn) {
  EXPECT_TRUE(IsShardName("rank-3-0.sst", 3));
  EXPECT_TRUE(IsShardName("rank-3-17.sst", 3));
  for (const char* name : {"rank-30-0.sst", "rank-3-.sst", "rank-3-x.sst", "../rank-3-0.sst",
                           "rank-3-0.sst/x", "rank-3-0.tmp", "rank-3--1.sst", ""}) {
    EXPECT_FALSE(IsShardName(name, 3)) << name;
  }
  CheckpointRecord record = Whole();
  record.mutable_seals(0)->mutable_files(0)->set_name("../../x.sst");
  EXPECT_NE(Problems(record).find("is no file name of rank 0"), std::string::npos);
}

TEST(Coverage, RefusesSealsWithoutDigestOrFiles) {
  RankSeal seal;
  EXPECT_EQ(SealProblems(seal).size(), 1u);
  AddFile(&seal, 0)->set_digest("short");
  AddFile(&seal, 0);
  EXPECT_EQ(SealProblems(seal).size(), 2u);  // digest, name twice
}

TEST(Tensors, ElementsGuardsAgainstOverflowAndNegativeSizes) {
  TensorInfo tensor;
  EXPECT_EQ(Elements(tensor), 1u);  // scalar
  tensor.add_shape(int64_t{1} << 40);
  EXPECT_EQ(Elements(tensor), uint64_t{1} << 40);
  tensor.add_shape(int64_t{1} << 40);
  EXPECT_EQ(Elements(tensor), 0u);
  tensor.clear_shape();
  tensor.add_shape(-3);
  EXPECT_EQ(Elements(tensor), 0u);
}

}  // namespace
}  // namespace heddle::checkpoint
