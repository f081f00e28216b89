// Cases made by the reference implementation, and their comparison with ours.
#pragma once

#include <gtest/gtest.h>

#include <cstdlib>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "data/text/utf8.h"
#include "data/tokenizer/tokenizer.h"
#include "tests/support/status_matchers.h"

namespace heddle::tokenizer {

inline std::string SourceFolder() {
  const char* folder = std::getenv("HEDDLE_SOURCE_DIR");
  return folder == nullptr ? "." : folder;
}

inline std::string Golden(const std::string& name) {
  return Str(SourceFolder(), "/tests/golden/tokenizer/", name);
}

// One line of oracle.py.
struct OracleCase {
  std::string tokenizer;
  std::string text;
  std::vector<uint32_t> ids;
  std::vector<uint32_t> with_special;
  std::string decoded;
  std::string decoded_all;
};

inline std::vector<OracleCase> ParseCases(const std::string& lines) {
  std::vector<OracleCase> cases;
  std::istringstream stream(lines);
  for (std::string line; std::getline(stream, line);) {
    const nlohmann::json fields = nlohmann::json::parse(line);
    OracleCase one;
    one.tokenizer = fields.value("tokenizer", "");
    one.text = fields.at("text").get<std::string>();
    one.ids = fields.at("ids").get<std::vector<uint32_t>>();
    one.with_special = fields.at("with_special").get<std::vector<uint32_t>>();
    one.decoded = fields.at("decoded").get<std::string>();
    one.decoded_all = fields.at("decoded_all").get<std::string>();
    cases.push_back(std::move(one));
  }
  return cases;
}

// Compares ids and both decodings. The encoder is the caller's, so that its cache carries over.
inline void ExpectEqualToOracle(const Tokenizer& tokenizer, Encoder& encoder,
                                const OracleCase& expected) {
  std::vector<uint32_t> ids;
  ASSERT_OK(encoder.Encode(expected.text, {}, &ids));
  EXPECT_EQ(ids, expected.ids) << "text: " << nlohmann::json(expected.text).dump();
  EncodeOptions special;
  special.add_special_tokens = true;
  ASSERT_OK_AND_ASSIGN(const std::vector<uint32_t> with_special,
                       tokenizer.Encode(expected.text, special));
  EXPECT_EQ(with_special, expected.with_special);
  ASSERT_OK_AND_ASSIGN(const std::string decoded, tokenizer.Decode(expected.ids, true));
  EXPECT_EQ(text::ToPrintableUtf8(decoded), expected.decoded);
  ASSERT_OK_AND_ASSIGN(const std::string decoded_all, tokenizer.Decode(expected.ids, false));
  EXPECT_EQ(text::ToPrintableUtf8(decoded_all), expected.decoded_all);
}

}  // namespace heddle::tokenizer
