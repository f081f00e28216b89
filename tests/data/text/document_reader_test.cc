#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "base/rng/rng.h"
#include "data/text/document_source.h"
#include "tests/data/data_test_util.h"
#include "tests/support/status_matchers.h"

namespace heddle::text {
namespace {

using test::TempFolder;
using test::WriteFile;

struct ReadAll {
  Status status;
  std::vector<std::string> texts;
  std::vector<std::string> names;
  std::map<std::string, int64_t> skipped;
};

ReadAll Read(const SourceOptions& options) {
  ReadAll all;
  StatusOr<SourceListing> listing = ListFiles(options);
  if (!listing.ok()) {
    all.status = listing.status();
    return all;
  }
  DocumentReader reader(*listing, options);
  while (true) {
    StatusOr<std::optional<Document>> document = reader.Next();
    all.skipped = reader.skipped();
    if (!document.ok()) {
      all.status = document.status();
      return all;
    }
    if (!document->has_value()) return all;
    all.texts.push_back((*document)->text);
    all.names.push_back((*document)->name);
  }
}

ReadAll ReadFile(const std::string& path) {
  SourceOptions options;
  options.inputs = {path};
  return Read(options);
}

TEST(DocumentReader, MakesOneDocumentOfEachFile) {
  const TempFolder root;
  WriteFile(root / "1.txt", "first\n");
  WriteFile(root / "2.txt", "");
  WriteFile(root / "3.txt", "third, without a line end");
  const ReadAll all = ReadFile(root.path());
  ASSERT_OK(all.status);
  EXPECT_EQ(all.texts, (std::vector<std::string>{"first\n", "third, without a line end"}));
  EXPECT_EQ(all.names[1], root / "3.txt");
}

TEST(DocumentReader, SkipsBinaryFilesOfTrees) {
  const TempFolder root;
  WriteFile(root / "a.bin", std::string_view("ab\0cd", 5));
  WriteFile(root / "b.txt", "text");
  WriteFile(root / "c.txt", "latin \xE4");
  const ReadAll all = ReadFile(root.path());
  ASSERT_OK(all.status);
  EXPECT_EQ(all.texts, std::vector<std::string>{"text"});
  EXPECT_EQ(all.skipped, (std::map<std::string, int64_t>{{"binary", 1}, {"not UTF-8", 1}}));
}

TEST(DocumentReader, NamesFileAndByteOfBadText) {
  const TempFolder root;
  WriteFile(root / "c.txt", "latin \xE4");
  EXPECT_STATUS(ReadFile(root / "c.txt").status, StatusCode::kInvalidArgument,
                "c.txt: byte 6: not UTF-8");
}

TEST(DocumentReader, CutsLongFilesAtLineEndsWithoutLosingAByte) {
  const TempFolder root;
  const uint64_t seed = 20240611;
  RngCursor random(Rng(seed, "test.cut"));
  for (int round = 0; round < 60; ++round) {
    std::string text;
    const uint64_t size = random.Below(3000);
    while (text.size() < size) {
      const char* parts[] = {"word ", "\n", "\u00E9", "\U0001F600", "a long stretch without end "};
      text += parts[random.Below(5)];
    }
    WriteFile(root / "long.txt", text);
    SourceOptions options;
    options.inputs = {root / "long.txt"};
    options.document_bytes_max = static_cast<int64_t>(16 + random.Below(500));
    const ReadAll all = Read(options);
    ASSERT_OK(all.status) << "seed " << seed << " round " << round;
    std::string joined;
    for (size_t i = 0; i < all.texts.size(); ++i) {
      const std::string& piece = all.texts[i];
      ASSERT_LE(static_cast<int64_t>(piece.size()), options.document_bytes_max);
      // A piece that could have ended a line does.
      if (i + 1 < all.texts.size() && piece.find('\n') != std::string::npos) {
        ASSERT_EQ(piece.back(), '\n') << "seed " << seed << " round " << round;
      }
      joined += piece;
    }
    ASSERT_EQ(joined, text) << "seed " << seed << " round " << round;
  }
}

TEST(DocumentReader, ReadsJsonLines) {
  const TempFolder root;
  WriteFile(root / "a.jsonl",
            "{\"text\":\"one \\u00e9\\n\",\"id\":1}\n\n  \r\n{\"text\":\"\"}\n{\"text\":\"two\"}");
  const ReadAll all = ReadFile(root / "a.jsonl");
  ASSERT_OK(all.status);
  EXPECT_EQ(all.texts, (std::vector<std::string>{"one \u00E9\n", "two"}));
  EXPECT_EQ(all.names,
            (std::vector<std::string>{(root / "a.jsonl") + ":1", (root / "a.jsonl") + ":5"}));
}

TEST(DocumentReader, ReadsJsonLinesLongerThanAReadBlock) {
  const TempFolder root;
  const std::string text(3 << 20, 'x');
  WriteFile(root / "a.jsonl", "{\"body\":\"" + text + "\"}\n{\"body\":\"end\"}\n");
  SourceOptions options;
  options.inputs = {root / "a.jsonl"};
  options.jsonl_key = "body";
  const ReadAll all = Read(options);
  ASSERT_OK(all.status);
  ASSERT_EQ(all.texts.size(), 2u);
  EXPECT_EQ(all.texts[0], text);
  EXPECT_EQ(all.texts[1], "end");
}

TEST(DocumentReader, NamesTheLineOfBadJson) {
  const TempFolder root;
  const struct {
    const char* line;
    const char* message;
  } cases[] = {{"{\"text\":", ":2: not valid JSON"},
               {"[1]", ":2: not a JSON object"},
               {"{\"txt\":\"x\"}", ":2: no string member \"text\""},
               {"{\"text\":5}", ":2: no string member \"text\""},
               {"{\"text\":\"\xFF\"}", ":2: not valid JSON"}};
  for (const auto& test_case : cases) {
    WriteFile(root / "a.jsonl", Str("{\"text\":\"fine\"}\n", test_case.line, "\n"));
    EXPECT_STATUS(ReadFile(root / "a.jsonl").status, StatusCode::kInvalidArgument,
                  test_case.message);
  }
}

TEST(DocumentReader, RefusesAJsonLineWithoutEnd) {
  const TempFolder root;
  WriteFile(root / "a.jsonl", std::string(5 << 20, '['));
  SourceOptions options;
  options.inputs = {root / "a.jsonl"};
  options.document_bytes_max = 1000;
  EXPECT_STATUS(Read(options).status, StatusCode::kInvalidArgument, ":1: line longer than 6000");
}

}  // namespace
}  // namespace heddle::text
