#include "data/pack/dataset.h"

#include <gtest/gtest.h>
#include <sys/resource.h>

#include <filesystem>
#include <string>
#include <vector>

#include "base/rng/rng.h"
#include "data/pack/inspect.h"
#include "data/pack/shard_format.h"
#include "tests/data/data_test_util.h"
#include "tests/support/status_matchers.h"

namespace heddle::pack {
namespace {

using test::PackedSetOptions;
using test::TempFolder;
using test::WritePackedSet;

std::vector<std::vector<uint32_t>> RandomDocuments(size_t count, uint32_t vocabulary,
                                                   uint64_t seed) {
  RngCursor random(Rng(seed, "test.documents"));
  std::vector<std::vector<uint32_t>> documents(count);
  for (std::vector<uint32_t>& document : documents) {
    for (uint64_t n = random.Below(300); n > 0; --n) {
      document.push_back(static_cast<uint32_t>(1 + random.Below(vocabulary - 1)));
    }
    document.push_back(0);
  }
  return documents;
}

void ExpectDocuments(const Dataset& dataset, const std::vector<std::vector<uint32_t>>& documents) {
  ASSERT_EQ(dataset.documents(), static_cast<int64_t>(documents.size()));
  for (size_t d = 0; d < documents.size(); ++d) {
    const auto number = static_cast<int64_t>(d);
    ASSERT_EQ(dataset.DocumentLength(number), static_cast<int64_t>(documents[d].size()));
    std::vector<uint32_t> tokens(documents[d].size());
    ASSERT_OK(dataset.ReadTokens(number, 0, tokens));
    ASSERT_EQ(tokens, documents[d]);
  }
}

TEST(Dataset, GivesBackTheDocumentsOfAllShards) {
  for (const uint32_t vocabulary : {1000u, 65536u, 65537u, 200000u}) {
    const TempFolder root;
    const auto documents = RandomDocuments(500, vocabulary, 1);
    PackedSetOptions options;
    options.vocab_size = vocabulary;
    options.shard_tokens_max = 10000;
    WritePackedSet(root.path(), documents, options);
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Dataset> dataset, Dataset::Open(root.path()));
    EXPECT_GT(dataset->manifest().shards.size(), 3u);
    EXPECT_EQ(dataset->manifest().token_bytes, vocabulary <= 65536 ? 2 : 4);
    ExpectDocuments(*dataset, documents);
    EXPECT_OK(dataset->Verify());
  }
}

TEST(Dataset, ReadsPartsOfDocuments) {
  const TempFolder root;
  std::vector<uint32_t> document;
  for (uint32_t i = 0; i < 900; ++i) document.push_back(i);
  WritePackedSet(root.path(), {{7, 0}, document});
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Dataset> dataset, Dataset::Open(root.path()));
  std::vector<uint32_t> part(10);
  ASSERT_OK(dataset->ReadTokens(1, 890, part));
  EXPECT_EQ(part, std::vector<uint32_t>(document.end() - 10, document.end()));
  ASSERT_OK(dataset->ReadTokens(1, 900, {}));
}

TEST(Dataset, RefusesAnotherTokenizerOrManifest) {
  const TempFolder root;
  WritePackedSet(root.path(), RandomDocuments(3, 1000, 1));
  OpenOptions options;
  options.tokenizer_sha256 = std::string(64, 'b');
  EXPECT_STATUS(Dataset::Open(root.path(), options), StatusCode::kFailedPrecondition,
                "made with another tokenizer");
  options.tokenizer_sha256 = std::string(64, 'a');
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Dataset> dataset, Dataset::Open(root.path(), options));
  options.manifest_hash = std::string(32, '0');
  EXPECT_STATUS(Dataset::Open(root.path(), options), StatusCode::kFailedPrecondition,
                dataset->manifest_hash());
  options.manifest_hash = dataset->manifest_hash();
  EXPECT_OK(Dataset::Open(root.path(), options));
}

TEST(Dataset, NamesWhatIsMissing) {
  const TempFolder root;
  EXPECT_STATUS(Dataset::Open(root / "none"), StatusCode::kNotFound, "no data set here");
  PackedSetOptions options;
  options.shard_tokens_max = 2000;
  WritePackedSet(root.path(), RandomDocuments(60, 1000, 1), options);
  std::filesystem::remove(root / "shard-00001.tok");
  EXPECT_STATUS(Dataset::Open(root.path()), StatusCode::kDataLoss,
                "shard-00001.tok: shard is missing");
}

TEST(Dataset, NamesTheTruncatedFile) {
  const TempFolder root;
  WritePackedSet(root.path(), RandomDocuments(60, 1000, 1));
  const auto size = std::filesystem::file_size(root / "shard-00000.tok");
  std::filesystem::resize_file(root / "shard-00000.tok", size - 1);
  EXPECT_STATUS(Dataset::Open(root.path()), StatusCode::kDataLoss,
                Str("shard-00000.tok: truncated: ", size - 1, " bytes instead of ", size));
  std::filesystem::resize_file(root / "shard-00000.tok", 100);
  EXPECT_STATUS(Dataset::Open(root.path()), StatusCode::kDataLoss,
                Str("truncated: 100 bytes instead of ", size));
}

TEST(Dataset, AShardCutShortWhileInUseIsDamageNotACrash) {
  const TempFolder root;
  const auto documents = RandomDocuments(200, 1000, 1);
  PackedSetOptions options;
  options.shard_tokens_max = 10000;
  WritePackedSet(root.path(), documents, options);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Dataset> dataset, Dataset::Open(root.path()));
  const auto size = std::filesystem::file_size(root / "shard-00001.tok");
  std::filesystem::resize_file(root / "shard-00001.tok", 100);
  Status seen;
  for (int64_t d = 0; d < dataset->documents(); ++d) {
    ASSERT_EQ(dataset->DocumentLength(d), static_cast<int64_t>(documents[d].size()));
    std::vector<uint32_t> tokens(documents[d].size());
    const Status read = dataset->ReadTokens(d, 0, tokens);
    if (!read.ok()) {
      seen = read;
    } else {
      EXPECT_EQ(tokens, documents[d]);
    }
  }
  EXPECT_STATUS(seen, StatusCode::kDataLoss,
                Str(root / "shard-00001.tok",
                    ": shard 1 was cut short while in use: 100 bytes "
                    "instead of ",
                    size, "; copy the data set anew or prepare it again"));
  EXPECT_STATUS(dataset->Verify(), StatusCode::kDataLoss, "cut short while in use");
}

TEST(Dataset, OpensMoreShardsThanTheUsualLimitOfOpenFiles) {
  const TempFolder root;
  const auto documents = RandomDocuments(100, 1000, 1);
  PackedSetOptions options;
  options.shard_tokens_max = 1;
  WritePackedSet(root.path(), documents, options);
  rlimit before = {};
  ASSERT_EQ(getrlimit(RLIMIT_NOFILE, &before), 0);
  rlimit few = before;
  few.rlim_cur = 50;
  ASSERT_EQ(setrlimit(RLIMIT_NOFILE, &few), 0);
  const StatusOr<std::unique_ptr<Dataset>> dataset = Dataset::Open(root.path());
  setrlimit(RLIMIT_NOFILE, &before);
  ASSERT_OK(dataset);
  ExpectDocuments(**dataset, documents);
}

TEST(Dataset, NamesFileAndBlockOfAFlippedBitOnFirstUseOnly) {
  const TempFolder root;
  // Three blocks of 1 MiB: 2 bytes a token.
  std::vector<std::vector<uint32_t>> documents(3, std::vector<uint32_t>(500000, 5));
  WritePackedSet(root.path(), documents);
  std::string bytes = test::ReadBytes(root / "shard-00000.tok");
  bytes[(1 << 20) + 12345] ^= 4;
  test::WriteFile(root / "shard-00000.tok", bytes);
  // The damage is behind the tables that Open reads.
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Dataset> dataset, Dataset::Open(root.path()));
  std::vector<uint32_t> tokens(1000);
  EXPECT_OK(dataset->ReadTokens(0, 0, tokens));
  EXPECT_STATUS(dataset->ReadTokens(1, 100000, tokens), StatusCode::kDataLoss,
                "shard-00000.tok: block 1");
  EXPECT_STATUS(dataset->Verify(), StatusCode::kDataLoss, "block 1");
  EXPECT_STATUS(Inspect(root.path(), true), StatusCode::kDataLoss, "block 1");
}

TEST(Dataset, RefusesATokenOutsideTheVocabularyThoughItsChecksumIsRight) {
  const TempFolder root;
  PackedSetOptions options;
  options.vocab_size = 1000;
  WritePackedSet(root.path(), {{1, 2, 1000, 0}}, options);
  EXPECT_STATUS(Dataset::Open(root.path()), StatusCode::kDataLoss,
                "byte 4100: token 1000 is not in the vocabulary of 1000");
}

TEST(Dataset, RefusesNewerVersionsAsSuch) {
  const TempFolder root;
  WritePackedSet(root.path(), {{1, 0}});
  std::string manifest = test::ReadBytes(root / "dataset.json");
  const std::string version = "\"version\": 1";
  manifest.replace(manifest.find(version), version.size(), "\"version\": 2");
  const std::string key = "\"checksum\": \"";
  const size_t at = manifest.find(key) + key.size();
  manifest.replace(at, 32, std::string(32, '0'));
  manifest.replace(at, 32, Xxh3Hex(manifest));
  EXPECT_STATUS(ParseManifest(manifest, "dataset.json"), StatusCode::kFailedPrecondition,
                "version 2 is newer");
  ShardHeader header;
  header.version = 2;
  header.tokenizer_sha256 = std::string(64, 'a');
  SetShardOffsets(&header);
  EXPECT_STATUS(DecodeShardHeader(EncodeShardHeader(header), header.file_bytes),
                StatusCode::kFailedPrecondition, "version 2 is newer");
}

TEST(Dataset, RefusesShardNamesThatLeaveTheFolder) {
  for (const char* name : {"../shard-00000.tok", "/etc/passwd", ".hidden", ""}) {
    Manifest manifest;
    manifest.vocab_size = 10;
    ShardEntry entry;
    entry.file = name;
    manifest.shards.push_back(entry);
    EXPECT_STATUS(ParseManifest(SerializeManifest(manifest), "dataset.json"), StatusCode::kDataLoss,
                  "not a plain file name");
  }
}

TEST(Manifest, KeepsEverythingItIsGiven) {
  Manifest manifest;
  manifest.split = "eval";
  manifest.tokenizer_sha256 = std::string(64, 'c');
  manifest.vocab_size = 123;
  manifest.eos_id = 7;
  manifest.token_bytes = 4;
  manifest.seed = ~uint64_t{0};
  manifest.eval_fraction = 0.1;
  manifest.sources = {"a \"quoted\" name", "b"};
  manifest.source_digest = "d";
  manifest.documents = 3;
  manifest.tokens = 99;
  manifest.text_bytes = 400;
  manifest.shards = {{"shard-00000.tok", 99, 3, 5000, "h", 0xFFFFFFFFu}};
  const std::string text = SerializeManifest(manifest);
  ASSERT_OK_AND_ASSIGN(const Manifest read, ParseManifest(text, "dataset.json"));
  EXPECT_EQ(read.hash, Xxh3Hex(text));
  EXPECT_EQ(read.seed, ~uint64_t{0});
  EXPECT_EQ(SerializeManifest(read), text);
}

}  // namespace
}  // namespace heddle::pack
