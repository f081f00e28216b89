#include "data/tokenizer/bpe_trainer.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "base/rng/rng.h"
#include "tests/data/data_test_util.h"
#include "tests/data/tokenizer/oracle_case.h"

namespace heddle::tokenizer {
namespace {

using nlohmann::json;

StatusOr<std::string> Train(const std::vector<std::string>& texts, uint32_t size) {
  BpeTrainerOptions options;
  options.vocab_size = size;
  ASSIGN_OR_RETURN(const std::unique_ptr<BpeTrainer> trainer, BpeTrainer::Create(options));
  for (const std::string& text : texts) RETURN_IF_ERROR(trainer->Add(text));
  return trainer->Finish({});
}

std::vector<std::string> Merges(const json& tokenizer) {
  std::vector<std::string> merges;
  for (const json& merge : tokenizer["model"]["merges"]) {
    merges.push_back(merge.is_string()
                         ? merge.get<std::string>()
                         : merge[0].get<std::string>() + " " + merge[1].get<std::string>());
  }
  return merges;
}

TEST(BpeTrainer, LearnsTheReferencesMergesAndIds) {
  const std::string corpus = test::ReadBytes(Golden("corpus.txt"));
  ASSERT_OK_AND_ASSIGN(const std::string ours, Train({corpus}, 700));
  const json expected = json::parse(test::ReadBytes(Golden("gpt2_style.json")));
  const json actual = json::parse(ours);
  EXPECT_EQ(Merges(actual), Merges(expected));
  EXPECT_EQ(actual["model"]["vocab"], expected["model"]["vocab"]);
  EXPECT_EQ(actual["added_tokens"], expected["added_tokens"]);
  EXPECT_EQ(actual["pre_tokenizer"], expected["pre_tokenizer"]);
}

TEST(BpeTrainer, WritesAFileThatItsReaderTakes) {
  const std::string corpus = test::ReadBytes(Golden("corpus.txt"));
  ASSERT_OK_AND_ASSIGN(const std::string text, Train({corpus}, 512));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Tokenizer> tokenizer,
                       Tokenizer::Parse(text, "trained"));
  EXPECT_EQ(tokenizer->vocab_size(), 512u);
  EXPECT_EQ(tokenizer->eos_id(), 0u);
  ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> ids, tokenizer->Encode(corpus));
  EXPECT_LT(ids.size(), corpus.size() * 6 / 10);  // it has learnt to compress its corpus
  ASSERT_OK_AND_ASSIGN(const std::string decoded, tokenizer->Decode(ids, false));
  EXPECT_EQ(decoded, corpus);
}

TEST(BpeTrainer, DoesNotDependOnTheOrderOfTexts) {
  std::vector<std::string> texts;
  const std::string corpus = test::ReadBytes(Golden("corpus.txt"));
  for (size_t at = 0; at < corpus.size();) {
    const size_t end = std::min(corpus.find('\n', at), corpus.size() - 1) + 1;
    texts.push_back(corpus.substr(at, end - at));
    at = end;
  }
  ASSERT_OK_AND_ASSIGN(const std::string forward, Train(texts, 600));
  const uint64_t seed = 5;
  Shuffle(Rng(seed, "test.order"), texts);
  ASSERT_OK_AND_ASSIGN(const std::string shuffled, Train(texts, 600));
  EXPECT_EQ(forward, shuffled) << "seed " << seed;
}

TEST(BpeTrainer, StopsWhereNoPairOccursTwice) {
  ASSERT_OK_AND_ASSIGN(const std::string text, Train({"abc abc xyz"}, 5000));
  const json tokenizer = json::parse(text);
  // "abc" occurs without and with its space: ab, then abc; " abc" and "xyz" are unique.
  EXPECT_EQ(Merges(tokenizer), (std::vector<std::string>{"a b", "ab c"}));
}

TEST(BpeTrainer, CountsOverlappingPairsLikeItMergesThem) {
  ASSERT_OK_AND_ASSIGN(const std::string text, Train({"aaaaaa aaaaaa"}, 260));
  EXPECT_EQ(Merges(json::parse(text)), (std::vector<std::string>{"a a", "aa aa", "aaaa aa"}));
}

TEST(BpeTrainer, RefusesSizesAndTextsItCannotUse) {
  BpeTrainerOptions options;
  options.vocab_size = 256;
  EXPECT_STATUS(BpeTrainer::Create(options), StatusCode::kInvalidArgument, "[257,");
  EXPECT_STATUS(Train({}, 300), StatusCode::kInvalidArgument, "no text");
  EXPECT_STATUS(Train({"ok \xFF"}, 300), StatusCode::kInvalidArgument, "byte 3");
  EXPECT_STATUS(ParseBpeSpec("file.json"), StatusCode::kNotFound, "file.json");
  for (const char* bad : {"bpe:", "bpe:x", "bpe:256", "bpe:-1", "bpe:8192x", "bpe:99999999999"}) {
    EXPECT_STATUS(ParseBpeSpec(bad), StatusCode::kInvalidArgument, bad);
  }
  ASSERT_OK_AND_ASSIGN(const uint32_t size, ParseBpeSpec("bpe:8192"));
  EXPECT_EQ(size, 8192u);
}

}  // namespace
}  // namespace heddle::tokenizer
