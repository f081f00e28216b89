// Random texts against PyPI `tokenizers`, where it is installed: HEDDLE_ORACLE_PYTHON, else
// python3. The golden files prove the same without it on fewer texts.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "data/tokenizer/bpe_trainer.h"
#include "tests/data/data_test_util.h"
#include "tests/data/tokenizer/oracle_case.h"

namespace heddle::tokenizer {
namespace {

struct OracleRun {
  int exit_status = -1;
  std::string out;
};

// Runs oracle.py with these arguments. Exit status 127: no Python.
OracleRun RunOracle(std::vector<std::string> arguments) {
  const char* python = std::getenv("HEDDLE_ORACLE_PYTHON");
  arguments.insert(arguments.begin(), {python == nullptr ? "python3" : python,
                                       SourceFolder() + "/tests/data/tokenizer/oracle.py"});
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  const test::TempFolder folder;
  const std::string out = folder / "out";
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_addopen(&actions, 1, out.c_str(), O_WRONLY | O_CREAT, 0600);
  OracleRun run;
  pid_t child = 0;
  const int error = posix_spawnp(&child, argv[0], &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (error != 0) {
    run.exit_status = 127;
    return run;
  }
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  run.exit_status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  run.out = test::ReadBytes(out);
  return run;
}

class TokenizerInterop : public ::testing::TestWithParam<const char*> {};

TEST_P(TokenizerInterop, GivesTheReferencesIdsOnRandomTexts) {
  const std::string path = Golden(GetParam());
  constexpr int kSeed = 1;
  const OracleRun run = RunOracle({"cases", path, Str(kSeed), "7000"});
  if (run.exit_status == 77 || run.exit_status == 127) {
    GTEST_SKIP() << "PyPI package tokenizers is not installed";
  }
  ASSERT_EQ(run.exit_status, 0) << run.out.substr(0, 500);
  const std::vector<OracleCase> cases = ParseCases(run.out);
  ASSERT_EQ(cases.size(), 7000u);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Tokenizer> tokenizer, Tokenizer::Load(path));
  Encoder encoder(*tokenizer);
  for (const OracleCase& one : cases) {
    ExpectEqualToOracle(*tokenizer, encoder, one);
    if (HasFailure()) FAIL() << "seed " << kSeed;
  }
}

INSTANTIATE_TEST_SUITE_P(Styles, TokenizerInterop,
                         ::testing::Values("gpt2_style.json", "llama3_style.json",
                                           "prefix_space.json"));

TEST(BpeTrainerInterop, IsReadByTheReferenceWithEqualIds) {
  const test::TempFolder folder;
  const std::string corpus = test::ReadBytes(Golden("corpus.txt"));
  BpeTrainerOptions options;
  options.vocab_size = 900;
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<BpeTrainer> trainer, BpeTrainer::Create(options));
  ASSERT_OK(trainer->Add(corpus));
  ASSERT_OK_AND_ASSIGN(const std::string json, trainer->Finish({}));
  test::WriteFile(folder / "trained.json", json);
  const OracleRun run = RunOracle({"cases", folder / "trained.json", "2", "3000"});
  if (run.exit_status == 77 || run.exit_status == 127) {
    GTEST_SKIP() << "PyPI package tokenizers is not installed";
  }
  ASSERT_EQ(run.exit_status, 0) << run.out.substr(0, 500);
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Tokenizer> tokenizer, Tokenizer::Parse(json, "ours"));
  Encoder encoder(*tokenizer);
  for (const OracleCase& one : ParseCases(run.out)) {
    ExpectEqualToOracle(*tokenizer, encoder, one);
    if (HasFailure()) break;
  }
  const OracleRun trained = RunOracle({"train", Golden("corpus.txt"), Str(options.vocab_size)});
  ASSERT_EQ(trained.exit_status, 0);
  EXPECT_EQ(nlohmann::json::parse(trained.out)["model"]["vocab"],
            nlohmann::json::parse(json)["model"]["vocab"]);
}

}  // namespace
}  // namespace heddle::tokenizer
