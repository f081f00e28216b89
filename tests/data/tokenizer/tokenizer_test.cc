#include "data/tokenizer/tokenizer.h"

#include <gtest/gtest.h>

#include <map>
#include <string>
#include <vector>

#include "base/rng/rng.h"
#include "data/tokenizer/bpe_model.h"
#include "data/tokenizer/splitter.h"
#include "tests/data/data_test_util.h"
#include "tests/data/tokenizer/oracle_case.h"

namespace heddle::tokenizer {
namespace {

TEST(Tokenizer, GivesTheReferencesIdsOnGoldenTexts) {
  const std::vector<OracleCase> cases = ParseCases(test::ReadBytes(Golden("cases.jsonl")));
  ASSERT_GT(cases.size(), 500u);
  std::map<std::string, std::unique_ptr<Tokenizer>> tokenizers;
  std::map<std::string, std::unique_ptr<Encoder>> encoders;
  for (const OracleCase& one : cases) {
    std::unique_ptr<Tokenizer>& tokenizer = tokenizers[one.tokenizer];
    if (tokenizer == nullptr) {
      ASSERT_OK_AND_ASSIGN(tokenizer, Tokenizer::Load(Golden(one.tokenizer + ".json")));
      encoders[one.tokenizer] = std::make_unique<Encoder>(*tokenizer);
    }
    ExpectEqualToOracle(*tokenizer, *encoders[one.tokenizer], one);
  }
  EXPECT_EQ(tokenizers.size(), 3u);
}

TEST(Tokenizer, KnowsItsSpecialTokens) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Tokenizer> gpt2,
                       Tokenizer::Load(Golden("gpt2_style.json")));
  EXPECT_EQ(gpt2->vocab_size(), 700u);
  EXPECT_EQ(gpt2->eos_id(), 0u);
  EXPECT_FALSE(gpt2->bos_id().has_value());
  EXPECT_TRUE(gpt2->IsSpecial(0));
  EXPECT_FALSE(gpt2->IsSpecial(1));
  EXPECT_EQ(gpt2->sha256(), Sha256Hex(test::ReadBytes(Golden("gpt2_style.json"))));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Tokenizer> llama3,
                       Tokenizer::Load(Golden("llama3_style.json")));
  EXPECT_EQ(llama3->eos_id(), llama3->TokenId("<|end_of_text|>"));
  EXPECT_EQ(llama3->bos_id(), llama3->TokenId("<|begin_of_text|>"));
}

TEST(Tokenizer, LeavesSpelledSpecialTokensOrdinaryWhenAsked) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Tokenizer> tokenizer,
                       Tokenizer::Load(Golden("gpt2_style.json")));
  const std::string text = "a<|endoftext|>b";
  ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> parsed, tokenizer->Encode(text));
  EXPECT_EQ(std::count(parsed.begin(), parsed.end(), 0u), 1);
  EncodeOptions ordinary;
  ordinary.parse_special_tokens = false;
  ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> ids, tokenizer->Encode(text, ordinary));
  EXPECT_EQ(std::count(ids.begin(), ids.end(), 0u), 0);
  ASSERT_OK_AND_ASSIGN(const std::string decoded, tokenizer->Decode(ids));
  EXPECT_EQ(decoded, text);
}

TEST(Tokenizer, DecodesWhatItEncodedForAnyText) {
  const uint64_t seed = 7;
  RngCursor random(Rng(seed, "test.roundtrip"));
  for (const char* name : {"gpt2_style.json", "llama3_style.json"}) {
    ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Tokenizer> tokenizer, Tokenizer::Load(Golden(name)));
    Encoder encoder(*tokenizer);
    for (int round = 0; round < 2000; ++round) {
      std::string bytes;
      for (uint64_t n = random.Below(60); n > 0; --n) {
        // Mostly ASCII, so that words form; random bytes become U+FFFD.
        bytes.push_back(
            static_cast<char>(random.Below(4) != 0 ? 32 + random.Below(95) : random.Below(256)));
      }
      const std::string text = text::ToPrintableUtf8(bytes);
      std::vector<uint32_t> ids;
      ASSERT_OK(encoder.Encode(text, {}, &ids));
      ASSERT_OK_AND_ASSIGN(const std::string decoded, tokenizer->Decode(ids, false));
      ASSERT_EQ(decoded, text) << "seed " << seed << " round " << round;
    }
  }
}

TEST(Tokenizer, RefusesTextThatIsNotUtf8AndLeavesIdsAlone) {
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Tokenizer> tokenizer,
                       Tokenizer::Load(Golden("gpt2_style.json")));
  Encoder encoder(*tokenizer);
  std::vector<uint32_t> ids = {5};
  EXPECT_STATUS(encoder.Encode("abc\xFFz", {}, &ids), StatusCode::kInvalidArgument, "byte 3");
  EXPECT_EQ(ids, std::vector<uint32_t>{5});
  EXPECT_STATUS(tokenizer->Decode(std::vector<uint32_t>{1, 700}), StatusCode::kInvalidArgument,
                "token id 700 is not in the vocabulary of 700");
}

// Merges by the definition: the lowest rank anywhere, leftmost first, until none applies.
std::vector<uint32_t> MergeByDefinition(const BpeModel& model, std::string_view word) {
  std::vector<uint32_t> symbols;
  for (const char byte : word) symbols.push_back(model.byte_id[static_cast<unsigned char>(byte)]);
  while (true) {
    size_t best = symbols.size();
    PairTable::Merge merge;
    for (size_t i = 0; i + 1 < symbols.size(); ++i) {
      const PairTable::Merge found = model.merges.Find(symbols[i], symbols[i + 1]);
      if (found.rank < merge.rank) {
        merge = found;
        best = i;
      }
    }
    if (best == symbols.size()) return symbols;
    symbols[best] = merge.id;
    symbols.erase(symbols.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
}

TEST(BpeModel, MergesWordsOfAnyLengthByTheDefinition) {
  const uint64_t seed = 11;
  RngCursor random(Rng(seed, "test.merge"));
  for (int round = 0; round < 300; ++round) {
    // A random vocabulary over three letters, with merges of merges.
    BpeModel model;
    for (uint32_t byte = 0; byte < 256; ++byte) model.byte_id[byte] = byte;
    const uint32_t merges = static_cast<uint32_t>(1 + random.Below(30));
    model.merges.Reserve(merges);
    const auto symbol = [&](uint32_t made) {
      const uint64_t pick = random.Below(3 + made);
      return static_cast<uint32_t>(pick < 3 ? 'a' + pick : 256 + pick - 3);
    };
    for (uint32_t rank = 0; rank < merges; ++rank) {
      const uint32_t left = symbol(rank);
      model.merges.Insert(left, symbol(rank), {rank, 256 + rank});
    }
    for (int i = 0; i < 20; ++i) {
      std::string word;
      for (uint64_t n = 1 + random.Below(120); n > 0; --n) {
        word.push_back(static_cast<char>('a' + random.Below(3)));
      }
      std::vector<uint32_t> ids;
      model.Encode(word, &ids);
      ASSERT_EQ(ids, MergeByDefinition(model, word)) << "seed " << seed << " word " << word;
    }
  }
}

TEST(Splitter, SplitsAtWhiteSpaceLikeTheReference) {
  // U+180E is a space for PCRE2's \s and not for the reference; U+0085 is one for both.
  ASSERT_OK_AND_ASSIGN(const std::string rewritten, RewriteWhitespaceClasses(R"(\s+|[^\s]+)"));
  SplitStep step;
  ASSERT_OK_AND_ASSIGN(step.pattern, SplitPattern::Compile(R"(\s+|[^\s]+)"));
  std::vector<SplitStep> steps;
  steps.push_back(std::move(step));
  Splitter splitter(steps);
  const std::string text = "a\u180Eb\u0085c";
  std::vector<Range> words;
  ASSERT_OK(splitter.Split(text, {0, text.size()}, &words));
  ASSERT_EQ(words.size(), 3u);
  EXPECT_EQ(text.substr(words[0].begin, words[0].end - words[0].begin), "a\u180Eb");
}

TEST(Splitter, RefusesPatternsWhoseMeaningDiffers) {
  for (const char* pattern : {R"(\w+)", R"(\bx)", R"([\S])", "[a[bc]]", "[]a]", "[a&&b]"}) {
    EXPECT_STATUS(SplitPattern::Compile(pattern), StatusCode::kInvalidArgument, "not supported")
        << pattern;
  }
  EXPECT_STATUS(SplitPattern::Compile("a("), StatusCode::kInvalidArgument, "offset");
}

TEST(Splitter, GivesUpOnPatternsThatBacktrackForever) {
  SplitStep step;
  ASSERT_OK_AND_ASSIGN(step.pattern, SplitPattern::Compile("(a+)+b"));
  std::vector<SplitStep> steps;
  steps.push_back(std::move(step));
  Splitter splitter(steps);
  // A b somewhere, or PCRE2 sees at once that nothing can match.
  const std::string text = std::string(200, 'a') + "cb";
  std::vector<Range> words;
  EXPECT_STATUS(splitter.Split(text, {0, text.size()}, &words), StatusCode::kResourceExhausted,
                "gave up");
}

}  // namespace
}  // namespace heddle::tokenizer
