#include "base/settings/json.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "heddle/v1/jobs.pb.h"

namespace heddle::settings {
namespace {

TEST(ToJson, PrintsTheShapesOtherToolsRead) {
  v1::MetricPoint point;
  point.set_step(9007199254740993);
  point.set_loss(0.1);
  point.set_batch_hash(0xFFFFFFFFFFFFFFFF);
  point.set_tokens(1'000'000'000'000);
  EXPECT_EQ(ToJson(point),
            "{\"step\":9007199254740993,\"loss\":0.1,\"tokens\":1000000000000,"
            "\"batch_hash\":\"18446744073709551615\"}");
  v1::Attempt attempt;
  attempt.set_number(2);
  attempt.set_fence(0x0100000000000001);
  attempt.add_workers("w\"1\n");
  EXPECT_EQ(ToJson(attempt),
            "{\"number\":2,\"fence\":\"72057594037927937\",\"workers\":[\"w\\\"1\\n\"]}");
}

TEST(ToJson, PrintsEnumsInLowerCaseWithoutPrefix) {
  v1::RunConfig config;
  config.mutable_model()->set_ffn(v1::ModelConfig::FFN_SWIGLU);
  config.mutable_model()->mutable_attention()->add_pattern(v1::ATTENTION_KIND_SWA);
  config.mutable_training()->set_gradient_checkpointing(
      v1::TrainingConfig::GRADIENT_CHECKPOINTING_NONE);
  EXPECT_EQ(ToJson(config),
            "{\"model\":{\"ffn\":\"swiglu\",\"attention\":{\"pattern\":[\"swa\"]}},"
            "\"training\":{\"gradient_checkpointing\":\"none\"}}");
}

TEST(ToJson, PrintsUnsetAsNullOnRequestAndOmits) {
  v1::Checkpoint checkpoint;
  checkpoint.set_step(3);
  const nlohmann::json full =
      nlohmann::json::parse(ToJson(checkpoint, {.print_unset = true, .omit = {"dir"}}));
  EXPECT_TRUE(full.at("bytes").is_null());
  EXPECT_FALSE(full.contains("dir"));
  EXPECT_EQ(full.at("step"), 3);
  v1::ListReply list;
  EXPECT_EQ(ToJson(list), "{}");
  EXPECT_EQ(ToJson(list, {.print_unset = true}), "{\"jobs\":[],\"next_page_token\":null}");
}

TEST(ToJson, SortsMapsAndIndents) {
  v1::CommandConfig command;
  (*command.mutable_env())["b"] = "2";
  (*command.mutable_env())["a"] = "1";
  EXPECT_EQ(ToJson(command), "{\"env\":{\"a\":\"1\",\"b\":\"2\"}}");
  EXPECT_EQ(ToJson(command, {.indent = 2}),
            "{\n  \"env\": {\n    \"a\": \"1\",\n    \"b\": \"2\"\n  }\n}");
}

TEST(ToJson, NumbersReadBackExactly) {
  for (const double value :
       {0.1, 1e-300, 5e-324, 1.7976931348623157e308, -0.0, 1.0 / 3, 1e21, 123456789012345680.0}) {
    const double back = nlohmann::json::parse(JsonNumber(value)).get<double>();
    EXPECT_EQ(back, value);
    EXPECT_EQ(std::signbit(back), std::signbit(value));
  }
  EXPECT_EQ(JsonNumber(NAN), "null");
  EXPECT_EQ(JsonNumber(std::numeric_limits<double>::infinity()), "null");
}

TEST(ToJson, EveryByteIsValidJson) {
  v1::LogLine line;
  std::string bytes;
  for (int i = 0; i < 256; ++i) {
    bytes += static_cast<char>(i);
  }
  line.set_data(bytes);
  EXPECT_EQ(nlohmann::json::parse(ToJson(line)).at("data").get<std::string>().size(), 512u)
      << "bytes are hex";
  const std::string text = nlohmann::json::parse(JsonQuote(bytes)).get<std::string>();
  EXPECT_EQ(text.substr(0, 128), bytes.substr(0, 128));
  EXPECT_NE(text.find("\xEF\xBF\xBD"), std::string::npos);
  EXPECT_EQ(nlohmann::json::parse(JsonQuote("\u00e9\U0001F600")).get<std::string>(),
            "\u00e9\U0001F600");
}

}  // namespace
}  // namespace heddle::settings
