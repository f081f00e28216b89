#include "data/pack/prepare.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "base/rng/rng.h"
#include "data/pack/dataset.h"
#include "data/pack/files.h"
#include "data/pack/inspect.h"
#include "data/pack/journal.h"
#include "data/tokenizer/tokenizer.h"
#include "tests/data/data_test_util.h"
#include "tests/support/status_matchers.h"

namespace heddle::pack {
namespace {

using test::TempFolder;
using test::WriteFile;

// A tree of `files` texts of made-up words; some texts are equal.
void WriteCorpus(const std::string& dir, int files, uint64_t words_max = 400) {
  RngCursor random(Rng(1, "test.corpus"));
  const char* words[] = {"warp ",   "weft ", "heddle ",        "shuttle(", "x = 1\n",
                         "return ", "\n\n",  "\u00E9t\u00E9 ", "123 "};
  for (int i = 0; i < files; ++i) {
    std::string text = Str("file ", i % 17 == 3 ? 0 : i, "\n");
    if (i % 17 != 3) {
      for (uint64_t n = random.Below(words_max); n > 0; --n) text += words[random.Below(9)];
    }
    WriteFile(Str(dir, "/d", i % 7, "/f", i, ".txt"), text);
  }
}

PrepareOptions Options(const TempFolder& root) {
  PrepareOptions options;
  options.source.inputs = {root / "in"};
  options.tokenizer = "bpe:300";
  options.out = root / "out";
  options.threads = 2;
  options.shard_tokens_max = 8000;
  options.eval_fraction = 0.1;
  options.seed = 5;
  return options;
}

// Every file that counts, by name. The journal holds times of the sources.
std::map<std::string, std::string> Files(const std::string& dir) {
  std::map<std::string, std::string> files;
  for (const auto& entry : std::filesystem::recursive_directory_iterator(dir)) {
    if (!entry.is_regular_file() || entry.path().filename() == kJournalName) continue;
    files[std::filesystem::relative(entry.path(), dir)] = test::ReadBytes(entry.path());
  }
  return files;
}

std::vector<std::string> DecodeAll(const std::string& dir) {
  const auto dataset = *Dataset::Open(dir);
  const auto tokenizer = *tokenizer::Tokenizer::Load(dir + "/tokenizer.json");
  std::vector<std::string> texts;
  for (int64_t d = 0; d < dataset->documents(); ++d) {
    std::vector<uint32_t> tokens(static_cast<size_t>(dataset->DocumentLength(d)));
    EXPECT_OK(dataset->ReadTokens(d, 0, tokens));
    EXPECT_EQ(tokens.back(), dataset->manifest().eos_id);
    tokens.pop_back();
    texts.push_back(*tokenizer->Decode(tokens, false));
  }
  return texts;
}

TEST(Prepare, PacksEveryDocumentOnce) {
  const TempFolder root;
  WriteCorpus(root / "in", 150);
  const PrepareOptions options = Options(root);
  ASSERT_OK_AND_ASSIGN(const PrepareReport report, Prepare(options));
  EXPECT_EQ(report.train.documents + report.eval.documents, 150);
  EXPECT_GT(report.train.shards, 2);
  EXPECT_EQ(report.vocab_size, 300u);
  EXPECT_GT(report.bytes_per_token, 2);
  std::multiset<std::string> expected;
  for (const auto& [name, text] : Files(root / "in")) expected.insert(text);
  std::multiset<std::string> actual;
  std::set<std::string> train;
  for (const std::string& text : DecodeAll(report.train.dir)) {
    actual.insert(text);
    train.insert(text);
  }
  for (const std::string& text : DecodeAll(report.eval.dir)) {
    actual.insert(text);
    EXPECT_EQ(train.count(text), 0u) << "on both sides: " << text.substr(0, 30);
  }
  EXPECT_EQ(actual, expected);
  ASSERT_OK_AND_ASSIGN(const InspectReport inspected, Inspect(report.train.dir, true));
  EXPECT_TRUE(inspected.verified);
  EXPECT_TRUE(inspected.has_tokenizer);
  EXPECT_EQ(inspected.manifest.hash, report.train.manifest_hash);
  ASSERT_OK_AND_ASSIGN(const std::vector<SampledDocument> samples, Sample(report.train.dir, {}));
  ASSERT_EQ(samples.size(), 3u);
  for (const SampledDocument& sample : samples) EXPECT_EQ(sample.text.substr(0, 5), "file ");
}

TEST(Prepare, WritesTheSameBytesAtAnyThreadCount) {
  const TempFolder root;
  WriteCorpus(root / "in", 120);
  std::map<std::string, std::string> first;
  for (const int threads : {1, 2, 4}) {
    PrepareOptions options = Options(root);
    options.threads = threads;
    options.out = root / Str("out", threads);
    ASSERT_OK(Prepare(options));
    if (first.empty()) first = Files(options.out);
    EXPECT_EQ(Files(options.out), first) << threads << " threads";
  }
  EXPECT_GT(first.size(), 6u);
}

// Stops at every progress call in turn, goes on, and compares with an undisturbed run.
TEST(Prepare, GoesOnWhereItWasStopped) {
  const TempFolder root;
  WriteCorpus(root / "in", 120, 20000);  // several batches
  PrepareOptions options = Options(root);
  options.shard_tokens_max = 200000;
  options.out = root / "whole";
  ASSERT_OK(Prepare(options));
  const std::map<std::string, std::string> whole = Files(options.out);
  options.out = root / "stopped";
  int64_t calls_until_stop = 1;
  int64_t stops = 0;
  int64_t reused = 0;
  while (true) {
    int64_t calls = 0;
    options.cancelled = [&] { return ++calls > calls_until_stop; };
    const StatusOr<PrepareReport> report = Prepare(options);
    if (report.ok()) {
      reused = report->shards_reused;
      break;
    }
    ASSERT_EQ(report.status().code(), StatusCode::kAborted) << report.status().ToString();
    ++stops;
    calls_until_stop += 13;
  }
  EXPECT_GT(stops, 3);
  EXPECT_GT(reused, 0);
  EXPECT_EQ(Files(options.out), whole);
}

// kill -9 at random times; what survives must lead to the same files.
TEST(Prepare, SurvivesBeingKilled) {
  const TempFolder root;
  WriteCorpus(root / "in", 60, 20000);
  PrepareOptions options = Options(root);
  options.shard_tokens_max = 100000;
  options.out = root / "whole";
  ASSERT_OK_AND_ASSIGN(const PrepareReport undisturbed, Prepare(options));
  const std::map<std::string, std::string> whole = Files(options.out);
  options.out = root / "killed";
  const uint64_t seed = 12;
  RngCursor random(Rng(seed, "test.kill"));
  const auto longest_us = static_cast<uint64_t>(undisturbed.seconds * 1e6);
  int killed = 0;
  for (int round = 0; round < 12; ++round) {
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) _exit(Prepare(options).ok() ? 0 : 1);
    usleep(static_cast<useconds_t>(random.Below(longest_us + 1)));
    kill(child, SIGKILL);
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    killed += WIFSIGNALED(status) ? 1 : 0;
    ASSERT_TRUE(WIFSIGNALED(status) || WEXITSTATUS(status) == 0) << "round " << round;
  }
  EXPECT_GT(killed, 0) << "seed " << seed;
  ASSERT_OK(Prepare(options));
  // A file under a temporary name may be left; it never counts and the next writer replaces it.
  std::map<std::string, std::string> files = Files(options.out);
  std::erase_if(files, [](const auto& file) { return file.first.ends_with(".tmp"); });
  EXPECT_EQ(files, whole);
}

TEST(Prepare, ReplacesAShardThatWasDamagedBetweenRuns) {
  const TempFolder root;
  WriteCorpus(root / "in", 120);
  PrepareOptions options = Options(root);
  ASSERT_OK(Prepare(options));
  const std::map<std::string, std::string> whole = Files(options.out);
  // As if the first run had been killed just before it wrote the manifests.
  ASSERT_OK_AND_ASSIGN(std::optional<Journal> journal, ReadJournal(options.out));
  journal->complete = false;
  ASSERT_OK(WriteJournal(options.out, *journal));
  std::filesystem::remove(root / "out/dataset.json");
  std::string bytes = test::ReadBytes(root / "out/shard-00001.tok");
  bytes[5000] ^= 1;
  WriteFile(root / "out/shard-00001.tok", bytes);
  ASSERT_OK_AND_ASSIGN(const PrepareReport report, Prepare(options));
  EXPECT_EQ(report.shards_reused, 1 + report.eval.shards);
  EXPECT_EQ(Files(options.out), whole);
}

TEST(Prepare, DoesNothingTwice) {
  const TempFolder root;
  WriteCorpus(root / "in", 40);
  const PrepareOptions options = Options(root);
  ASSERT_OK_AND_ASSIGN(const PrepareReport first, Prepare(options));
  const auto written = std::filesystem::last_write_time(root / "out/dataset.json");
  ASSERT_OK_AND_ASSIGN(const PrepareReport second, Prepare(options));
  EXPECT_FALSE(first.already_complete);
  EXPECT_TRUE(second.already_complete);
  EXPECT_EQ(second.train.manifest_hash, first.train.manifest_hash);
  EXPECT_EQ(second.eval.tokens, first.eval.tokens);
  EXPECT_EQ(std::filesystem::last_write_time(root / "out/dataset.json"), written);
}

TEST(Prepare, DoesNotReadItsOwnOutput) {
  const TempFolder root;
  WriteCorpus(root / "in", 40);
  PrepareOptions options = Options(root);
  options.out = root / "in/packed";
  ASSERT_OK_AND_ASSIGN(const PrepareReport first, Prepare(options));
  ASSERT_OK_AND_ASSIGN(const PrepareReport second, Prepare(options));
  EXPECT_EQ(first.train.documents + first.eval.documents, 40);
  EXPECT_TRUE(second.already_complete);
}

TEST(Prepare, RefusesAFolderOfOtherDataOrFiles) {
  const TempFolder root;
  WriteCorpus(root / "in", 40);
  PrepareOptions options = Options(root);
  ASSERT_OK(Prepare(options));
  WriteFile(root / "in/new.txt", "a new source");
  EXPECT_STATUS(Prepare(options), StatusCode::kAlreadyExists, "of other sources or options");
  WriteFile(root / "mine/thesis.txt", "do not touch");
  options.out = root / "mine";
  EXPECT_STATUS(Prepare(options), StatusCode::kAlreadyExists, "not empty");
  EXPECT_EQ(Files(options.out).size(), 1u);
}

TEST(Prepare, RefusesASecondWriterOfTheSameFolder) {
  const TempFolder root;
  WriteCorpus(root / "in", 4);
  std::filesystem::create_directories(root / "out");
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<FolderLock> lock, FolderLock::Take(root / "out"));
  EXPECT_STATUS(Prepare(Options(root)), StatusCode::kUnavailable, "another process");
}

TEST(Prepare, TakesAGivenTokenizerAndKeepsSpelledSpecialTokensOrdinary) {
  const TempFolder root;
  WriteFile(root / "in.jsonl", "{\"text\":\"one <|endoftext|> two\"}\n{\"text\":\"three\"}\n");
  PrepareOptions options;
  options.source.inputs = {root / "in.jsonl"};
  const char* source = std::getenv("HEDDLE_SOURCE_DIR");
  options.tokenizer =
      Str(source == nullptr ? "." : source, "/tests/golden/tokenizer/gpt2_style.json");
  options.out = root / "out";
  ASSERT_OK_AND_ASSIGN(const PrepareReport report, Prepare(options));
  EXPECT_EQ(report.train.documents, 2);
  EXPECT_EQ(DecodeAll(report.train.dir)[0], "one <|endoftext|> two");
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Dataset> dataset, Dataset::Open(options.out));
  std::vector<uint32_t> tokens(static_cast<size_t>(dataset->DocumentLength(0)));
  ASSERT_OK(dataset->ReadTokens(0, 0, tokens));
  EXPECT_EQ(std::count(tokens.begin(), tokens.end(), dataset->manifest().eos_id), 1);
}

TEST(Prepare, LeavesNothingBehindForBadOptions) {
  const TempFolder root;
  WriteCorpus(root / "in", 4);
  const auto expect = [&](void (*change)(PrepareOptions&), StatusCode code, const char* part) {
    PrepareOptions options = Options(root);
    change(options);
    EXPECT_STATUS(Prepare(options), code, part);
    EXPECT_FALSE(std::filesystem::exists(root / "out")) << part;
  };
  expect([](PrepareOptions& o) { o.tokenizer = "bpe:12"; }, StatusCode::kInvalidArgument, "bpe:12");
  expect([](PrepareOptions& o) { o.tokenizer = "/none.json"; }, StatusCode::kNotFound,
         "/none.json");
  expect([](PrepareOptions& o) { o.tokenizer = ""; }, StatusCode::kInvalidArgument, "no tokenizer");
  expect([](PrepareOptions& o) { o.eval_fraction = 1; }, StatusCode::kInvalidArgument, "[0, 1)");
  expect([](PrepareOptions& o) { o.source.inputs = {"/none"}; }, StatusCode::kNotFound, "/none");
}

TEST(Prepare, SaysWhenASideStaysEmpty) {
  const TempFolder root;
  WriteFile(root / "in/a.txt", "the only document");
  PrepareOptions options = Options(root);
  options.eval_fraction = 1e-9;
  EXPECT_STATUS(Prepare(options), StatusCode::kInvalidArgument,
                "no document for the evaluation part");
}

// What an adversary met: the failed call's journal blocked the repaired one.
TEST(Prepare, ARepairedSourceIsTakenAfterEveryFailedCall) {
  const struct {
    const char* file;
    std::string bad;
    std::string good;
  } cases[] = {{"a.txt", "bad \xff\xfe bytes", "good bytes"},
               {"a.txt", "", "no longer empty"},
               {"a.txt", std::string("ELF\0\xff\x80", 6), "text"},
               {"a.jsonl", "{\"text\": \"one\"}\n{\"text\": \n", "{\"text\": \"one\"}\n"}};
  for (const char* tokenizer : {"bpe:300", "given"}) {
    for (const auto& [file, bad, good] : cases) {
      const TempFolder root;
      SCOPED_TRACE(Str(tokenizer, " ", bad));
      PrepareOptions options = Options(root);
      options.eval_fraction = 0;
      options.source.inputs = {root / file};
      if (std::string(tokenizer) == "given") {
        const char* source = std::getenv("HEDDLE_SOURCE_DIR");
        options.tokenizer =
            Str(source == nullptr ? "." : source, "/tests/golden/tokenizer/gpt2_style.json");
      }
      WriteFile(root / file, bad);
      EXPECT_FALSE(Prepare(options).ok());
      WriteFile(root / file, good);
      ASSERT_OK_AND_ASSIGN(const PrepareReport report, Prepare(options));
      EXPECT_EQ(report.train.documents, 1);
    }
  }
}

TEST(Prepare, TakesOverOnlyWhatIsItsOwnAndHasNoShard) {
  const TempFolder root;
  WriteFile(root / "in/a.txt", "the only document");
  PrepareOptions options = Options(root);
  options.eval_fraction = 1e-9;
  ASSERT_FALSE(Prepare(options).ok());  // after the tokenizers and a shard that is not listed
  ASSERT_TRUE(std::filesystem::exists(root / "out/shard-00000.tok"));
  WriteFile(root / "out/eval/mine.txt", "do not touch");
  WriteFile(root / "out/shard-list.tok", "mine too");
  WriteFile(root / "out/shard-00001.tok.tmp", "a part");
  options.eval_fraction = 0;
  options.seed = 6;
  ASSERT_OK_AND_ASSIGN(const PrepareReport report, Prepare(options));
  EXPECT_FALSE(report.already_complete);
  EXPECT_EQ(test::ReadBytes(root / "out/eval/mine.txt"), "do not touch");
  EXPECT_EQ(test::ReadBytes(root / "out/shard-list.tok"), "mine too");
  EXPECT_FALSE(std::filesystem::exists(root / "out/eval/tokenizer.json"));
  EXPECT_FALSE(std::filesystem::exists(root / "out/shard-00001.tok.tmp"));
  // One with a finished shard is worth keeping.
  ASSERT_OK_AND_ASSIGN(std::optional<Journal> journal, ReadJournal(options.out));
  journal->complete = false;
  ASSERT_OK(WriteJournal(options.out, *journal));
  options.seed = 7;
  EXPECT_STATUS(Prepare(options), StatusCode::kAlreadyExists, "holds an unfinished data set");
}

TEST(Prepare, NamesTheFullDisk) {
  const TempFolder root;
  WriteCorpus(root / "in", 4);
  PrepareOptions options = Options(root);
  // /dev/full refuses every write; a folder cannot be made below a device.
  options.out = "/dev/full/out";
  const StatusOr<PrepareReport> report = Prepare(options);
  ASSERT_FALSE(report.ok());
  EXPECT_NE(Message(report.status()).find("/dev/full/out"), std::string::npos);
  std::filesystem::create_symlink("/dev/full", root / "blocked.tmp");
  EXPECT_STATUS(WriteFileAtomically(root / "blocked", "x"), StatusCode::kResourceExhausted,
                "blocked.tmp");
  EXPECT_FALSE(std::filesystem::exists(root / "blocked"));
}

}  // namespace
}  // namespace heddle::pack
