// A thousand damages to a packed set, every one of which must be found, and none may crash the
// reader (T6, I8).
#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "base/rng/rng.h"
#include "data/pack/dataset.h"
#include "tests/data/data_test_util.h"
#include "tests/support/status_matchers.h"

namespace heddle::pack {
namespace {

using test::PackedSetOptions;
using test::TempFolder;

constexpr int kDamages = 1000;

// Reads the whole set as a trainer would: open, then every document.
Status ReadEverything(const std::string& dir) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Dataset> dataset, Dataset::Open(dir));
  std::vector<uint32_t> tokens;
  for (int64_t d = 0; d < dataset->documents(); ++d) {
    tokens.resize(static_cast<size_t>(dataset->DocumentLength(d)));
    RETURN_IF_ERROR(dataset->ReadTokens(d, 0, tokens));
  }
  return OkStatus();
}

Status Verify(const std::string& dir) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Dataset> dataset, Dataset::Open(dir));
  return dataset->Verify();
}

// Damages `bytes`; returns what was done. Never leaves them as they were.
std::string Damage(RngCursor& random, std::string* bytes) {
  const std::string before = *bytes;
  while (true) {
    const uint64_t at = random.Below(bytes->size());
    std::string what;
    switch (random.Below(6)) {
      case 0:
        what = Str("flip a bit of byte ", at);
        (*bytes)[at] ^= static_cast<char>(1 << random.Below(8));
        break;
      case 1:
        what = Str("truncate to ", at);
        bytes->resize(at);
        break;
      case 2:
        what = Str("zero 4096 bytes from ", at / 4096 * 4096);
        bytes->replace(at / 4096 * 4096, 4096, std::string(4096, '\0'));
        break;
      case 3: {
        const uint64_t size = std::min<uint64_t>(1 + random.Below(64), bytes->size() - at);
        what = Str("overwrite ", size, " bytes at ", at);
        for (uint64_t i = 0; i < size; ++i) (*bytes)[at + i] = static_cast<char>(random.Next());
        break;
      }
      case 4:
        what = Str("append ", at % 100 + 1, " bytes");
        bytes->append(at % 100 + 1, 'x');
        break;
      default:
        what = Str("remove byte ", at);
        bytes->erase(at, 1);
    }
    if (*bytes != before) return what;
  }
}

TEST(Corruption, OfAnyKindIsFound) {
  const TempFolder root;
  const uint64_t seed = 42;
  RngCursor random(Rng(seed, "test.corruption"));
  std::vector<std::vector<uint32_t>> documents(90);
  for (std::vector<uint32_t>& document : documents) {
    for (uint64_t n = random.Below(20000); n > 0; --n) {
      document.push_back(static_cast<uint32_t>(1 + random.Below(60000)));
    }
    document.push_back(0);
  }
  PackedSetOptions options;
  options.vocab_size = 60001;
  options.shard_tokens_max = 600000;  // two shards, one of more than a block
  test::WritePackedSet(root.path(), documents, options);
  ASSERT_OK(ReadEverything(root.path()));
  ASSERT_OK(Verify(root.path()));
  const std::string names[] = {"dataset.json", "shard-00000.tok", "shard-00001.tok"};
  std::vector<std::string> good;
  for (const std::string& name : names) good.push_back(test::ReadBytes(root / name));
  int detected = 0;
  for (int i = 0; i < kDamages; ++i) {
    const size_t file = random.Below(4) == 0 ? 0 : 1 + random.Below(2);
    std::string bytes = good[file];
    const std::string what = Damage(random, &bytes);
    test::WriteFile(root / names[file], bytes);
    // What verification finds a trainer must find too, before it has used a wrong token; damage to
    // padding within a checked block included.
    const Status read = ReadEverything(root.path());
    EXPECT_FALSE(read.ok()) << names[file] << ": " << what << ", seed " << seed;
    if (!read.ok()) {
      EXPECT_EQ(read.code(), StatusCode::kDataLoss) << read.ToString() << ": " << what;
      EXPECT_NE(Message(read).find(names[file]), std::string::npos) << read.ToString();
      ++detected;
    }
    test::WriteFile(root / names[file], good[file]);
  }
  std::printf("corruptions %d, detected %d\n", kDamages, detected);
  EXPECT_EQ(detected, kDamages);
  EXPECT_OK(ReadEverything(root.path()));
}

TEST(Corruption, SwappedAndForeignShardsAreFound) {
  const TempFolder root;
  const TempFolder other;
  // Same counts everywhere, so that only contents tell the shards apart.
  std::vector<std::vector<uint32_t>> documents(4, std::vector<uint32_t>(100, 1));
  for (size_t d = 0; d < documents.size(); ++d) documents[d][5] = static_cast<uint32_t>(d);
  PackedSetOptions options;
  options.shard_tokens_max = 200;
  test::WritePackedSet(root.path(), documents, options);
  documents[3][6] = 77;
  test::WritePackedSet(other.path(), documents, options);
  const std::string first = test::ReadBytes(root / "shard-00000.tok");
  const std::string second = test::ReadBytes(root / "shard-00001.tok");
  test::WriteFile(root / "shard-00000.tok", second);
  test::WriteFile(root / "shard-00001.tok", first);
  EXPECT_STATUS(ReadEverything(root.path()), StatusCode::kDataLoss, "shard-00000.tok: block 0");
  test::WriteFile(root / "shard-00000.tok", first);
  test::WriteFile(root / "shard-00001.tok", test::ReadBytes(other / "shard-00001.tok"));
  EXPECT_STATUS(ReadEverything(root.path()), StatusCode::kDataLoss,
                "shard-00001.tok: block table: not the shard that dataset.json describes");
}

}  // namespace
}  // namespace heddle::pack
