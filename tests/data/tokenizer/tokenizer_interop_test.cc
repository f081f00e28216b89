// Random texts against PyPI `tokenizers`, where it is installed: HEDDLE_ORACLE_PYTHON, else
// python3. The golden files prove the same without it on fewer texts.
#include <gtest/gtest.h>
#include <sys/wait.h>

#include <cstdio>
#include <nlohmann/json.hpp>
#include <string>

#include "data/tokenizer/bpe_trainer.h"
#include "tests/data/data_test_util.h"
#include "tests/data/tokenizer/oracle_case.h"

namespace heddle::tokenizer {
namespace {

struct OracleRun {
  int exit_status = -1;
  std::string out;
};

OracleRun RunOracle(const std::string& arguments) {
  const char* python = std::getenv("HEDDLE_ORACLE_PYTHON");
  const std::string command = Str(python == nullptr ? "python3" : python, " '", SourceFolder(),
                                  "/tests/data/tokenizer/oracle.py' ", arguments);
  OracleRun run;
  FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return run;
  char buffer[1 << 16];
  for (size_t got; (got = fread(buffer, 1, sizeof(buffer), pipe)) > 0;) run.out.append(buffer, got);
  const int status = pclose(pipe);
  run.exit_status = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return run;
}

class TokenizerInterop : public ::testing::TestWithParam<const char*> {};

TEST_P(TokenizerInterop, GivesTheReferencesIdsOnRandomTexts) {
  const std::string path = Golden(GetParam());
  constexpr int kSeed = 1;
  const OracleRun run = RunOracle(Str("cases '", path, "' ", kSeed, " 7000"));
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
  const OracleRun run = RunOracle(Str("cases '", folder / "trained.json", "' 2 3000"));
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
  const OracleRun trained =
      RunOracle(Str("train '", Golden("corpus.txt"), "' ", options.vocab_size));
  ASSERT_EQ(trained.exit_status, 0);
  EXPECT_EQ(nlohmann::json::parse(trained.out)["model"]["vocab"],
            nlohmann::json::parse(json)["model"]["vocab"]);
}

}  // namespace
}  // namespace heddle::tokenizer
