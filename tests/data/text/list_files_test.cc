#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "data/text/document_source.h"
#include "tests/data/data_test_util.h"
#include "tests/support/status_matchers.h"

namespace heddle::text {
namespace {

using test::TempFolder;
using test::WriteFile;

std::vector<std::string> Keys(const SourceListing& listing) {
  std::vector<std::string> keys;
  for (const SourceFile& file : listing.files) keys.push_back(file.key);
  return keys;
}

SourceOptions Of(const std::vector<std::string>& inputs) {
  SourceOptions options;
  options.inputs = inputs;
  return options;
}

TEST(ListFiles, WalksTreesInTheOrderOfNames) {
  const TempFolder root;
  for (const char* name : {"b.txt", "a/z.py", "a/b/c.py", "a.txt", "B.txt", "c/1"}) {
    WriteFile(root / name, "text");
  }
  ASSERT_OK_AND_ASSIGN(const SourceListing listing, ListFiles(Of({root.path()})));
  EXPECT_EQ(Keys(listing),
            (std::vector<std::string>{"B.txt", "a/b/c.py", "a/z.py", "a.txt", "b.txt", "c/1"}));
  EXPECT_EQ(listing.bytes, 6 * 4);
}

TEST(ListFiles, LeavesOutWhatIsNoSourceTextAndSaysWhy) {
  const TempFolder root;
  WriteFile(root / "keep.txt", "text");
  WriteFile(root / ".git/config", "x");
  WriteFile(root / ".hidden", "x");
  WriteFile(root / "CVS/Root", "x");
  WriteFile(root / "data.parquet", "x");
  WriteFile(root / "large.txt", std::string(101, 'x'));
  std::filesystem::create_symlink("nowhere", root / "dangling");
  SourceOptions options = Of({root.path()});
  options.tree_file_bytes_max = 100;
  ASSERT_OK_AND_ASSIGN(const SourceListing listing, ListFiles(options));
  EXPECT_EQ(Keys(listing), std::vector<std::string>{"keep.txt"});
  const std::map<std::string, int64_t> expected = {
      {"version control", 2}, {"hidden", 1}, {"binary", 1}, {"too large", 1}, {"not readable", 1}};
  EXPECT_EQ(listing.skipped, expected);
}

TEST(ListFiles, EndsInFoldersThatContainThemselves) {
  const TempFolder root;
  WriteFile(root / "a/one.txt", "1");
  std::filesystem::create_directory_symlink(root.path(), root / "a/up");
  std::filesystem::create_directory_symlink(root / "a", root / "again");
  std::filesystem::create_symlink("loop", root / "loop");
  ASSERT_OK_AND_ASSIGN(const SourceListing listing, ListFiles(Of({root.path()})));
  EXPECT_EQ(Keys(listing), std::vector<std::string>{"a/one.txt"});
  EXPECT_EQ(listing.skipped.at("seen before"), 2);
}

TEST(ListFiles, CountsAFileReachedTwiceOnce) {
  const TempFolder root;
  WriteFile(root / "a.txt", "1");
  std::filesystem::create_symlink("a.txt", root / "b.txt");
  std::filesystem::create_hard_link(root / "a.txt", root / "c.txt");
  ASSERT_OK_AND_ASSIGN(const SourceListing listing, ListFiles(Of({root.path(), root / "a.txt"})));
  EXPECT_EQ(Keys(listing), std::vector<std::string>{"a.txt"});
  EXPECT_EQ(listing.skipped.at("seen before"), 3);
}

TEST(ListFiles, TakesOnlyTheExtensionsAskedFor) {
  const TempFolder root;
  WriteFile(root / "a.py", "1");
  WriteFile(root / "a.txt", "1");
  SourceOptions options = Of({root.path()});
  options.extensions = {".py"};
  ASSERT_OK_AND_ASSIGN(const SourceListing listing, ListFiles(options));
  EXPECT_EQ(Keys(listing), std::vector<std::string>{"a.py"});
}

TEST(ListFiles, RefusesWhatItCannotRead) {
  const TempFolder root;
  EXPECT_STATUS(ListFiles(Of({})), StatusCode::kInvalidArgument, "no input");
  EXPECT_STATUS(ListFiles(Of({root / "missing"})), StatusCode::kNotFound, "missing");
  EXPECT_STATUS(ListFiles(Of({"/dev/null"})), StatusCode::kInvalidArgument, "/dev/null");
  WriteFile(root / "x/data.jsonl.zst", "x");
  EXPECT_STATUS(ListFiles(Of({root / "x/data.jsonl.zst"})), StatusCode::kInvalidArgument, ".zst");
  EXPECT_STATUS(ListFiles(Of({root.path()})), StatusCode::kInvalidArgument,
                "no text files found; 1 binary");
}

}  // namespace
}  // namespace heddle::text
