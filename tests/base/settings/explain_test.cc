#include "base/settings/explain.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>

#include "tests/support/status_matchers.h"

namespace heddle::settings {
namespace {

TEST(AllKeys, EveryKeyHasItsDocAndEveryNumberItsRange) {
  std::set<std::string> seen;
  for (const KeyInfo& info : AllKeys()) {
    EXPECT_FALSE(info.doc.empty()) << info.key;
    EXPECT_TRUE(seen.insert(info.key).second) << info.key;
    const bool number = info.type.find("integer") != std::string::npos ||
                        info.type.find("number") != std::string::npos;
    EXPECT_EQ(number, !info.range.empty()) << info.key;
    for (const std::string& alias : info.aliases) {
      EXPECT_TRUE(seen.insert(alias).second) << alias << " is taken";
    }
  }
}

// The names of product.md section 5.
TEST(AllKeys, HoldTheNamesOfTheContract) {
  std::set<std::string> keys;
  for (const KeyInfo& info : AllKeys()) {
    keys.insert(info.key);
  }
  for (const char* key : {"model.vocab_size",
                          "model.d_model",
                          "model.rope.scaling.original_max_position_embeddings",
                          "model.attention.swa.sink_size",
                          "model.attention.nsa.compress_type",
                          "model.attention.dsa.kl_weight",
                          "model.attention.gsa.use_output_gate",
                          "model.attention.mla.v_head_dim",
                          "model.moe.bias_update_rate",
                          "model.moe.every",
                          "training.gradient_checkpointing",
                          "training.nan_policy",
                          "training.accumulation",
                          "data.mixture",
                          "data.pack",
                          "memory.expert_offloading.resident_mb",
                          "memory.kv_cache.threshold",
                          "parallel.memory_per_rank",
                          "checkpoint.resume_from",
                          "schedule.max_restarts",
                          "schedule.constraints",
                          "logging.wandb.entity",
                          "logging.profiling.trace_memory",
                          "command.argv",
                          "command.env",
                          "name",
                          "kind"}) {
    EXPECT_EQ(keys.count(key), 1u) << key;
  }
}

TEST(Explain, KnowsKeysGroupsAndAliases) {
  ASSERT_OK_AND_ASSIGN(std::vector<KeyInfo> keys, Explain("training.max_seq_len"));
  ASSERT_EQ(keys.size(), 1u);
  EXPECT_EQ(keys[0].default_value, "512");
  EXPECT_EQ(keys[0].range, "1 .. 16777216");
  EXPECT_EQ(keys[0].unit, "tokens");
  EXPECT_EQ(keys[0].aliases, (std::vector<std::string>{"data.max_length", "data.max_seq_len"}));
  ASSERT_OK_AND_ASSIGN(keys, Explain("swa"));
  ASSERT_EQ(keys.size(), 4u);
  EXPECT_EQ(keys[0].key, "model.attention.swa");
  EXPECT_TRUE(keys[0].is_group);
  ASSERT_OK_AND_ASSIGN(keys, Explain("model.dropout"));
  EXPECT_NE(keys[0].limitation.find("does not implement dropout"), std::string::npos);
  EXPECT_STATUS(Explain("training.lr"), StatusCode::kNotFound, "unknown key");
  EXPECT_STATUS(Explain("training.learning_rat"), StatusCode::kNotFound,
                "nearest name: training.learning_rate");
}

TEST(JsonSchema, DescribesEveryKey) {
  const nlohmann::json schema = nlohmann::json::parse(JsonSchema());
  EXPECT_FALSE(schema.at("additionalProperties").get<bool>());
  EXPECT_TRUE(schema.at("properties").contains("defaults"));
  for (const KeyInfo& info : AllKeys()) {
    const nlohmann::json* at = &schema;
    size_t start = 0;
    while (start <= info.key.size()) {
      const size_t end = std::min(info.key.find('.', start), info.key.size());
      if (at->contains("anyOf")) {
        at = &at->at("anyOf").back();
      }
      ASSERT_TRUE(at->at("properties").contains(info.key.substr(start, end - start))) << info.key;
      at = &at->at("properties").at(info.key.substr(start, end - start));
      start = end + 1;
    }
    EXPECT_EQ(at->at("description"), info.doc) << info.key;
  }
}

TEST(ReferencePage, HasARowPerKey) {
  const std::string page = ReferencePage();
  for (const KeyInfo& info : AllKeys()) {
    if (!info.is_group) {
      EXPECT_NE(page.find("| `" + info.key + "` |"), std::string::npos) << info.key;
    }
  }
}

// docs/ shows what this version reads; UPDATE_GOLDEN=1 writes it again.
TEST(Docs, AreWhatTheSchemaSays) {
  const char* source = std::getenv("HEDDLE_SOURCE_DIR");
  const std::string docs = std::string(source == nullptr ? "." : source) + "/docs/";
  const std::map<std::string, std::string> pages = {{"config-reference.md", ReferencePage()},
                                                    {"config.schema.json", JsonSchema() + "\n"}};
  for (const auto& [name, expected] : pages) {
    if (std::getenv("UPDATE_GOLDEN") != nullptr) {
      std::ofstream(docs + name) << expected;
    }
    std::stringstream found;
    found << std::ifstream(docs + name).rdbuf();
    EXPECT_TRUE(found.str() == expected)
        << docs << name << " is old: UPDATE_GOLDEN=1 base_settings_test --gtest_filter=Docs.*";
  }
}

}  // namespace
}  // namespace heddle::settings
