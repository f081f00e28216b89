// Every alias of the schema sets its key, and disagrees loudly (formats.md F40).
#include <gtest/gtest.h>

#include "base/settings/explain.h"
#include "base/settings/settings.h"
#include "tests/base/settings/config_files.h"
#include "tests/support/status_matchers.h"

namespace heddle::settings {
namespace {

// A value of the key other than its default.
std::string OtherValue(const KeyInfo& info) {
  if (!info.values.empty()) {
    return info.values.back() == info.default_value ? info.values.front() : info.values.back();
  }
  if (info.type == "true|false") {
    return info.default_value == "true" ? "false" : "true";
  }
  if (info.type == "list of integer") {
    return "[1]";
  }
  return info.default_value == "2" ? "4" : "2";
}

TEST(Aliases, EachSetsItsKey) {
  const ConfigFiles files;
  LoadOptions options = files.options;
  options.require_implemented = false;
  int aliases = 0;
  for (const KeyInfo& info : AllKeys()) {
    for (const std::string& alias : info.aliases) {
      ++aliases;
      const std::string path = files.Write("run.yaml", kMinimal);
      if (info.is_group) {
        EXPECT_OK(Explain(alias)) << alias;
        continue;
      }
      const std::string value = OtherValue(info);
      // Other rules may refuse the value; what matters is which key it reached.
      const StatusOr<ResolvedConfig> resolved = Load(path, {alias + "=" + value}, options);
      if (resolved.ok()) {
        EXPECT_NE(resolved->origins.at(info.key), "default") << alias;
      } else {
        EXPECT_EQ(Message(resolved.status()).find("unknown key"), std::string::npos)
            << Message(resolved.status());
      }
      EXPECT_EQ((*Explain(alias))[0].key, info.key) << alias;
    }
  }
  EXPECT_GE(aliases, 80);
}

TEST(Aliases, OfTheWellKnownProjects) {
  const ConfigFiles files;
  LoadOptions options = files.options;
  options.require_implemented = false;
  const std::string path = files.Write("run.yaml", R"(
model: {hidden_size: 64, num_hidden_layers: 3, num_attention_heads: 4, num_key_value_heads: 2,
        intermediate_size: 99, rms_norm_eps: 1e-5, tie_word_embeddings: true, rope_theta: 5e5,
        rope_scaling: {rope_type: llama3, factor: 8}, sliding_window: 33,
        num_local_experts: 8, num_experts_per_tok: 3, hidden_act: silu}
gsa: {k_base: 300, indexer_heads: 7}
mla: {kv_lora_rank: 11}
window_size: 44
data: {path: /d, max_length: 128}
training: {save_interval: 12, log_interval: 13}
)");
  ASSERT_OK_AND_ASSIGN(const ResolvedConfig resolved, Load(path, {}, options));
  const v1::ModelConfig& model = resolved.config.model();
  EXPECT_EQ(model.d_model(), 64);
  EXPECT_EQ(model.n_layers(), 3);
  EXPECT_EQ(model.n_heads(), 4);
  EXPECT_EQ(model.n_kv_heads(), 2);
  EXPECT_EQ(model.d_ffn(), 99);
  EXPECT_EQ(model.norm_eps(), 1e-5);
  EXPECT_TRUE(model.tie_embeddings());
  EXPECT_EQ(model.rope().theta(), 5e5);
  EXPECT_EQ(model.rope().scaling().type(), v1::RopeScalingConfig::TYPE_LLAMA3);
  EXPECT_EQ(model.attention().swa().window(), 33);
  EXPECT_EQ(model.moe().n_experts(), 8);
  EXPECT_EQ(model.moe().top_k(), 3);
  EXPECT_EQ(model.attention().gsa().k_base(), 300);
  EXPECT_EQ(model.attention().gsa().n_indexer_heads(), 7);
  EXPECT_EQ(model.attention().mla().kv_lora_rank(), 11);
  EXPECT_EQ(model.attention().nsa().window_size(), 44);
  EXPECT_EQ(resolved.config.training().max_seq_len(), 128);
  EXPECT_EQ(resolved.config.checkpoint().save_interval(), 12);
  EXPECT_EQ(resolved.config.logging().log_interval(), 13);
}

TEST(Aliases, WithAnotherValueThanTheirKeyAreAnError) {
  const ConfigFiles files;
  EXPECT_EQ(files.Problems("data: {path: /d, max_length: 64}\ntraining: {max_seq_len: 32}\n"),
            "run.yaml:2:12: training.max_seq_len: is another name of training.max_seq_len, which "
            "data.max_length sets to 64 at run.yaml:1:18; this says 32");
  EXPECT_EQ(files.Problems("data: {path: /d, max_length: 64}\ntraining: {max_seq_len: 64}\n"),
            "OK");
  EXPECT_EQ(files.Problems("data: {path: /d, max_length: 64}\n", {"training.max_seq_len=32"}), "OK")
      << "an override replaces what a file says under any name";
  EXPECT_NE(files.Problems(kMinimal, {"training.max_seq_len=32", "data.max_seq_len=64"})
                .find("is another name"),
            std::string::npos);
}

TEST(Aliases, LayersPerCycleAreRefusedWithTheReplacement) {
  const ConfigFiles files;
  EXPECT_NE(files.Problems(kMinimal + "model: {swa_layers_per_cycle: 2}\n")
                .find("write model.attention.pattern"),
            std::string::npos);
}

}  // namespace
}  // namespace heddle::settings
