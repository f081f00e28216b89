#include <gtest/gtest.h>

#include <functional>
#include <nlohmann/json.hpp>
#include <string>

#include "base/rng/rng.h"
#include "tests/data/data_test_util.h"
#include "tests/data/tokenizer/oracle_case.h"

namespace heddle::tokenizer {
namespace {

using nlohmann::json;

json Load(const std::string& name) { return json::parse(test::ReadBytes(Golden(name))); }

TEST(TokenizerJson, RefusesUnknownPartsByName) {
  const struct {
    std::function<void(json&)> change;
    const char* message;
  } cases[] = {
      {[](json& j) {
         j["normalizer"] = {{"type", "NFKC"}};
       },
       "normalizer of type NFKC"},
      {[](json& j) { j["model"]["type"] = "Unigram"; }, "model of type Unigram"},
      {[](json& j) { j["model"]["dropout"] = 0.1; }, "model.dropout"},
      {[](json& j) { j["model"]["byte_fallback"] = true; }, "model.byte_fallback"},
      {[](json& j) { j["model"]["end_of_word_suffix"] = "</w>"; }, "model.end_of_word_suffix"},
      {[](json& j) {
         j["pre_tokenizer"] = {{"type", "Metaspace"}};
       },
       "pre_tokenizer of type Metaspace"},
      {[](json& j) { j["pre_tokenizer"] = nullptr; }, "pre_tokenizer"},
      {[](json& j) { j["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "MergedWithNext"; },
       "behavior MergedWithNext"},
      {[](json& j) {
         j["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {{"String", " "}};
       },
       "only a Regex pattern"},
      {[](json& j) { j["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "a("; },
       "pre_tokenizer Split: pattern"},
      {[](json& j) {
         j["post_processor"] = {{"type", "BertProcessing"}};
       },
       "post_processor of type BertProcessing"},
      {[](json& j) {
         j["decoder"] = {{"type", "WordPiece"}};
       },
       "decoder of type WordPiece"},
      {[](json& j) {
         j["truncation"] = {{"max_length", 5}};
       },
       "truncation"},
      {[](json& j) {
         j["padding"] = {{"strategy", "BatchLongest"}};
       },
       "padding"},
      {[](json& j) { j["added_tokens"][0]["lstrip"] = true; }, "lstrip is not supported"},
      {[](json& j) { j["added_tokens"][0]["id"] = 3; }, "but the vocabulary says"},
      {[](json& j) { j["model"]["vocab"]["zzz"] = 0; }, "is taken by another token"},
      {[](json& j) { j["model"]["vocab"]["zzz"] = -1; }, "out of range"},
      {[](json& j) { j["model"]["vocab"]["zzz"] = 1 << 30; }, "out of range"},
      {[](json& j) { j["model"]["vocab"]["zzz"] = "1"; }, "is not an integer"},
      {[](json& j) { j["model"]["vocab"].erase("!"); }, "no token for byte 33"},
      {[](json& j) { j["model"]["merges"][1] = "a b c"; }, "model.merges[1]: not two tokens"},
      {[](json& j) {
         j["model"]["merges"][1] = {"a", "\u2603"};
       },
       "is not in the vocabulary"},
      {[](json& j) { j = json::array(); }, "not a JSON object"},
  };
  for (const auto& test_case : cases) {
    json changed = Load("llama3_style.json");
    test_case.change(changed);
    EXPECT_STATUS(Tokenizer::Parse(changed.dump(), "T.json"), StatusCode::kInvalidArgument,
                  test_case.message);
    EXPECT_STATUS(Tokenizer::Parse(changed.dump(), "T.json"), StatusCode::kInvalidArgument,
                  "T.json");
  }
}

TEST(TokenizerJson, NamesFileAndByteOfBrokenJson) {
  EXPECT_STATUS(Tokenizer::Parse("{\"model\": }", "T.json"), StatusCode::kInvalidArgument,
                "T.json: byte 11: not valid JSON");
  EXPECT_STATUS(Tokenizer::Load("/nowhere/T.json"), StatusCode::kNotFound, "/nowhere/T.json");
}

TEST(TokenizerJson, ReadsMergesInBothForms) {
  json pairs = Load("gpt2_style.json");
  json strings = pairs;
  for (json& merge : strings["model"]["merges"]) {
    if (merge.is_array()) merge = merge[0].get<std::string>() + " " + merge[1].get<std::string>();
  }
  for (json& merge : pairs["model"]["merges"]) {
    const std::string text = merge.is_string() ? merge.get<std::string>() : "";
    if (!text.empty()) merge = {text.substr(0, text.find(' ')), text.substr(text.find(' ') + 1)};
  }
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Tokenizer> a, Tokenizer::Parse(pairs.dump(), "pairs"));
  ASSERT_OK_AND_ASSIGN(const std::unique_ptr<Tokenizer> b,
                       Tokenizer::Parse(strings.dump(), "strings"));
  const std::string text = test::ReadBytes(Golden("corpus.txt"));
  ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> ids_a, a->Encode(text));
  ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> ids_b, b->Encode(text));
  EXPECT_EQ(ids_a, ids_b);
}

// Random damage to bytes and to structure: an error or a tokenizer that works, never a crash.
TEST(TokenizerJson, SurvivesDamage) {
  const std::string whole = test::ReadBytes(Golden("llama3_style.json"));
  const uint64_t seed = 3;
  RngCursor random(Rng(seed, "test.damage"));
  int refused = 0;
  for (int round = 0; round < 1000; ++round) {
    std::string bytes = whole;
    switch (random.Below(3)) {
      case 0:
        bytes[random.Below(bytes.size())] = static_cast<char>(random.Below(256));
        break;
      case 1:
        bytes.resize(random.Below(bytes.size()));
        break;
      default: {
        const uint64_t from = random.Below(bytes.size());
        const uint64_t length = random.Below(200);
        bytes.erase(from, length);
      }
    }
    const StatusOr<std::unique_ptr<Tokenizer>> tokenizer = Tokenizer::Parse(bytes, "damaged");
    if (!tokenizer.ok()) {
      EXPECT_EQ(tokenizer.status().code(), StatusCode::kInvalidArgument)
          << tokenizer.status().ToString() << " seed " << seed << " round " << round;
      ++refused;
      continue;
    }
    // Damage to a pattern can make it explode; that is an error too.
    (void)(*tokenizer)->Encode("Some text, 123 and \U0001F600\n\n  more.");
  }
  EXPECT_GT(refused, 600);
}

}  // namespace
}  // namespace heddle::tokenizer
