#include <gtest/gtest.h>

#include "base/settings/explain.h"
#include "base/settings/settings.h"
#include "tests/base/settings/config_files.h"
#include "tests/support/status_matchers.h"

namespace heddle::settings {
namespace {

struct Rule {
  std::vector<std::string> overrides;
  const char* problem;
};

TEST(Checks, RulesBetweenFields) {
  const ConfigFiles files;
  LoadOptions options = files.options;
  options.require_implemented = false;
  const Rule rules[] = {
      {{"model.n_heads=4", "model.n_kv_heads=3"}, "model.n_kv_heads: must divide model.n_heads"},
      {{"model.d_model=250", "model.n_heads=4"}, "model.head_dim: give it"},
      {{"model.head_dim=33"}, "the rotary width must be even"},
      {{"mla.qk_rope_head_dim=3"}, "the rotary width must be even"},
      {{"swa.window=0"}, "model.attention.swa.window: must be between 1"},
      {{"gsa.k_min=3000"}, "gsa.k_min: must be at most k_base"},
      {{"gsa.k_base=5000"}, "gsa.k_base: must be at most k_max"},
      {{"nsa.topk=2"}, "nsa.topk: must be at least init_blocks + local_blocks"},
      {{"nsa.kernel_size=33"}, "nsa.kernel_stride: must divide kernel_size"},
      {{"nsa.block_size=72"}, "nsa.kernel_stride: must divide block_size"},
      {{"nsa.kernel_size=128"}, "nsa.kernel_size: must be at most block_size"},
      {{"dsa.topk=0"}, "dsa.topk: must be between 1"},
      {{"dsa.core=mla"}, "dsa.core: mla needs the sizes"},
      {{"model.attention.kind=dsa", "dsa.d_indexer=34"}, "dsa.d_indexer: profile v32 rotates half"},
      {{"model.attention.kind=dsa", "mla.qk_rope_head_dim=64", "dsa.d_indexer=32"},
       "dsa.d_indexer: must be at least the rotated qk_rope_head_dim"},
      {{"model.attention.kind=mla", "model.attention.qkv_bias=true"},
       "qkv_bias: only dense and swa"},
      {{"model.moe.n_experts=8", "model.moe.n_groups=4", "model.moe.top_k=3"},
       "moe.top_k: topk_groups hold 2 experts"},
      {{"model.moe.n_experts=65536", "model.n_layers=4096"},
       "moe.n_experts: 65536 experts in each"},
      {{"model.moe.n_experts=2", "model.moe.top_k=3"}, "moe.top_k: must be at most n_experts"},
      {{"model.moe.n_experts=4", "model.moe.n_groups=3"}, "moe.n_groups: must divide"},
      {{"model.moe.n_experts=4", "model.moe.topk_groups=2"}, "topk_groups: must be at most"},
      {{"model.moe.n_experts=4", "model.moe.layers=[9]"}, "moe.layers[0]: must be below"},
      {{"model.moe.n_experts=4", "model.moe.layers=[0, 0]"}, "moe.layers[1]: 0 is named twice"},
      {{"model.rope.scaling.factor=2"}, "has no effect without model.rope.scaling.type"},
      {{"training.min_learning_rate=1"}, "must be at most training.learning_rate"},
      {{"training.eval_interval=5"}, "training.eval_interval: needs data.eval_path"},
      {{"training.global_batch_size=12"}, "must be a multiple of micro_batch_size x ranks = 8"},
      {{"training.global_batch_size=8", "training.gradient_accumulation_steps=2"},
       "does not fit gradient_accumulation_steps"},
      {{"parallel.ranks={min: 3, max: 2}"}, "must be at most parallel.ranks.max"},
      {{"training.accumulation=sync_each"}, "training.accumulation: sync_each saves nothing"},
      {{"parallel.reduce_dtype=bf16"}, "parallel.reduce_dtype: bf16 needs parallel.shard"},
      {{"parallel.backend=nccl"}, "nccl needs parallel.gpus_per_rank"},
      {{"~data.path"}, "a training job needs data.path or data.mixture"},
      {{"data={path: /a, mixture: [{path: /b}]}"}, "give data.path or data.mixture"},
      {{"command.argv=[x]"}, "command: has no effect in a job of kind train"},
      {{"kind=command"}, "command.argv: a job of kind command needs a program"},
      {{"kind=command", "command.argv=[x]", "command.env.HEDDLE_RANK=1"}, "are set by heddle"},
      {{"kind=command", "command.argv=[x]", "command.env.CUDA_VISIBLE_DEVICES='0'"},
       "is set by heddle from the GPUs"},
      {{"kind=command", "command.argv=[x]", "command.env={1a: 1}"}, "is no name"},
      {{"schedule.hang_kill_after=4s"}, "must be 0 (never) or at least 5s"},
      {{"schedule.after=[later:j-1]"}, "needs [ok:|any:|failed:]JOB"},
      {{"checkpoint.resume_from=j-1"}, "needs JOB@STEP"},
      {{"schedule.account=a/b"}, "schedule.account: needs 1 to 128 letters"},
      {{"name=.hidden"}, "name: needs 1 to 128 letters"},
      {{"training.grad_clip=-1"}, "training.grad_clip: must be between 0"},
      {{"training.beta1=1"}, "training.beta1: must be between 0"},
      {{"model.norm_eps=0"}, "model.norm_eps: must be > 0"},
      {{"training.micro_batch_size=3000000000"}, "the number 3000000000 is too large"},
  };
  const std::string path = files.Write("run.yaml", kMinimal);
  for (const Rule& rule : rules) {
    EXPECT_STATUS(Load(path, rule.overrides, options).status(), StatusCode::kInvalidArgument,
                  rule.problem)
        << rule.overrides[0];
  }
}

TEST(Checks, ExpertsAreDividedAndKeptWhereTheyCanBe) {
  const ConfigFiles files;
  LoadOptions options = files.options;
  options.require_implemented = false;
  const std::string path = files.Write("run.yaml", kMinimal);
  const std::string offload = "memory.expert_offloading.";
  const Rule rules[] = {
      {{"parallel.ranks=4", "parallel.expert=3"}, "parallel.expert: must divide parallel.ranks"},
      {{"parallel.ranks=2", "parallel.expert=2"}, "the model has none: set model.moe.n_experts"},
      {{"parallel.ranks=2", "parallel.expert=2", "model.moe.n_experts=5"},
       "parallel.expert: must divide model.moe.n_experts (2 and 5)"},
      {{"memory.expert_offloading.enabled=true"}, "the model has no experts"},
      {{"model.moe.n_experts=4", "model.moe.first_dense=99",
        "memory.expert_offloading.enabled=true"},
       "memory.expert_offloading.enabled: no layer has experts"},
      {{"parallel.ranks=2", "model.moe.n_experts=4", "memory.expert_offloading.enabled=true"},
       "needs parallel.expert = parallel.ranks"},
      {{"model.moe.n_experts=4", "memory.expert_offloading.enabled=true",
        offload + "resident_mb=64", offload + "spill_dir=spill"},
       "memory.expert_offloading.spill_dir: must be a whole path"},
  };
  for (const Rule& rule : rules) {
    EXPECT_STATUS(Load(path, rule.overrides, options).status(), StatusCode::kInvalidArgument,
                  rule.problem)
        << rule.overrides[0];
  }
}

// Every option that this version does not run is refused by name, and only by the table.
TEST(CheckImplemented, RefusesWhatThisVersionDoesNotRun) {
  const ConfigFiles files;
  const std::string path = files.Write("run.yaml", kMinimal);
  LoadOptions lenient = files.options;
  lenient.require_implemented = false;
  const Rule rules[] = {
      {{"model.attention.logit_scale={}"}, "the query temperature"},
      {{"model.dropout=0.1"}, "dropout"},
      {{"training.precision=fp8"}, "fp8 arithmetic"},
      {{"model.moe.n_experts=4", "memory.expert_offloading.enabled=true",
        "memory.expert_offloading.policy=stream"},
       "memory.expert_offloading.policy: stream: this version does not implement streaming"},
      {{"parallel.gpus_per_rank=1"}, "computes the model on the CPU only"},
      {{"parallel.gpus_per_rank=1", "parallel.backend=gloo"}, "parallel.gpus_per_rank: 1: this"},
      {{"parallel.ranks={min: 1, max: 2}"}, "elastic jobs"},
      {{"checkpoint.async=false"}, "saving in the foreground"},
      {{"schedule.constraints=['rack=1']"}, "placement constraints"},
      {{"logging.tensorboard=true"}, "TensorBoard"},
      {{"logging.wandb.project=x"}, "W&B"},
      {{"logging.profiling.enabled=true"}, "profiling"},
  };
  for (const Rule& rule : rules) {
    EXPECT_OK(Load(path, rule.overrides, lenient)) << rule.overrides[0];
    EXPECT_STATUS(Load(path, rule.overrides, files.options).status(), StatusCode::kInvalidArgument,
                  rule.problem)
        << rule.overrides[0];
  }
}

// An option that would have no effect is a warning, never silence.
TEST(Warnings, NameKeysWithoutEffect) {
  const ConfigFiles files;
  const std::string path = files.Write("run.yaml", kMinimal);
  for (const char* override :
       {"schedule.preemptible=false", "schedule.min_runtime=1m",
        "memory.expert_offloading.resident_mb=4", "memory.kv_cache.threshold=4",
        "logging.profiling.steps=[1]", "model.moe.top_k=3", "model.rope.scaling.low_freq_factor=2",
        "model.rope.scaling.mscale=2", "model.attention.swa.window=3", "nsa.topk=9", "dsa.topk=9",
        "gsa.k_base=300", "mla.kv_lora_rank=9", "training.max_seq_len=9000",
        "training.max_steps=3"}) {
    ASSERT_OK_AND_ASSIGN(const ResolvedConfig resolved, Load(path, {override}, files.options));
    EXPECT_EQ(resolved.warnings.size(), 1u) << override;
  }
  ASSERT_OK_AND_ASSIGN(const ResolvedConfig rounded,
                       Load(path,
                            {"parallel.ranks=2", "parallel.shard=full",
                             "parallel.reduce_dtype=bf16", "training.precision=fp32"},
                            files.options));
  ASSERT_EQ(rounded.warnings.size(), 1u);
  EXPECT_NE(rounded.warnings[0].find("parallel.reduce_dtype=bf16 rounds"), std::string::npos);
  ASSERT_OK_AND_ASSIGN(const ResolvedConfig unbounded,
                       Load(path,
                            {"model.moe.n_experts=4", "memory.expert_offloading.enabled=true",
                             "memory.expert_offloading.spill_dir=/tmp"},
                            files.options));
  ASSERT_EQ(unbounded.warnings.size(), 1u);
  EXPECT_NE(unbounded.warnings[0].find("without memory.expert_offloading.resident_mb"),
            std::string::npos);
  for (const char* override : {"schedule.preemptible=true", "training.seed=3", "name=x"}) {
    ASSERT_OK_AND_ASSIGN(const ResolvedConfig resolved, Load(path, {override}, files.options));
    EXPECT_TRUE(resolved.warnings.empty()) << override;
  }
}

TEST(Warnings, NameChoicesOfSparseLayersThatAreSeldomMeant) {
  const ConfigFiles files;
  const std::string path = files.Write("run.yaml", kMinimal);
  const std::vector<std::pair<std::vector<std::string>, std::string>> cases = {
      {{"model.attention.kind=gsa", "gsa.warmup_steps=5", "gsa.adaptive_k=variance"},
       "looks at future and foreign tokens"},
      {{"model.attention.kind=gsa", "gsa.warmup_steps=5", "gsa.adaptive_k=learned"},
       "no loss trains it"},
      {{"model.attention.kind=gsa", "gsa.warmup_steps=5", "gsa.use_adaptive_k=false",
        "gsa.k_min=9"},
       "without model.attention.gsa.use_adaptive_k"},
      {{"model.attention.kind=gsa", "gsa.warmup_steps=5", "gsa.use_value_gate=false",
        "gsa.use_output_gate=false", "gsa.gate_bias_init=1"},
       "without a gate"},
      {{"model.attention.kind=dsa", "training.max_steps=100"}, "never leaves the dense stage"},
      {{"model.moe.n_experts=4", "model.moe.bias_center=true"}, "bias_update_rate"},
      {{"model.moe.n_experts=4", "model.moe.aux_loss=0", "model.moe.aux_form=sequence"},
       "without model.moe.aux_loss"},
      {{"model.moe.n_experts=4", "model.moe.router=sigmoid", "model.moe.norm_topk=false"},
       "always sum to 1"},
      {{"model.moe.n_experts=4", "model.moe.every=999"}, "model.moe has no effect: no layer"},
      {{"model.moe.n_experts=4", "memory.expert_offloading.enabled=true",
        "memory.expert_offloading.resident_mb=64"},
       "without spill_dir and without a GPU only costs"},
      {{"model.moe.n_experts=4", "memory.expert_offloading.enabled=true",
        "memory.expert_offloading.pin_memory=false"},
       "without parallel.gpus_per_rank"},
      {{"model.moe.n_experts=4", "model.moe.layers=[0]", "model.moe.every=2"},
       "with model.moe.layers"},
      {{"model.attention.kind=mla", "model.attention.pattern=[dense]"},
       "with model.attention.pattern"},
      {{"model.rope.scaling.type=linear"}, "with model.rope.scaling.factor=1"},
      {{"model.rope.scaling.type=yarn", "model.rope.scaling.factor=4"},
       "unless model.max_position_embeddings is above"},
      {{"model.attention.kind=mla", "mla={}", "model.n_kv_heads=2"}, "in layers of kind mla"},
      {{"model.norm=dyt", "model.norm_eps=0.1"}, "with model.norm=dyt"}};
  for (const auto& [overrides, text] : cases) {
    ASSERT_OK_AND_ASSIGN(const ResolvedConfig resolved, Load(path, overrides, files.options));
    ASSERT_EQ(resolved.warnings.size(), 1u) << text;
    EXPECT_NE(resolved.warnings[0].find(text), std::string::npos) << resolved.warnings[0];
  }
}

TEST(Validate, ChecksWhatAClientSends) {
  v1::RunConfig config;
  config.mutable_data()->set_path("/d");
  EXPECT_OK(Validate(config)) << "unset fields have their defaults";
  config.mutable_schedule()->set_priority(100);
  config.mutable_training()->set_max_steps(0);
  EXPECT_STATUS(Validate(config), StatusCode::kInvalidArgument,
                "training.max_steps: must be between 1 and 1000000000000 (is 0)\n"
                "schedule.priority: must be between 0 and 99 (is 100)");
}

TEST(Validate, RefusesFieldsOfANewerClient) {
  v1::RunConfig config;
  config.mutable_data()->set_path("/d");
  std::string bytes = config.SerializeAsString();
  bytes += std::string("\xF8\x3E\x01", 3);  // field 1007, varint 1
  ASSERT_TRUE(config.ParseFromString(bytes));
  EXPECT_STATUS(Validate(config), StatusCode::kInvalidArgument, "does not know");
}

TEST(Validate, RefusesNulBytesAndLongTexts) {
  v1::RunConfig config;
  config.mutable_data()->set_path(std::string("/d\0x", 4));
  EXPECT_STATUS(Validate(config), StatusCode::kInvalidArgument, "data.path: has a NUL");
  config.mutable_data()->set_path(std::string(5000, 'x'));
  EXPECT_STATUS(Validate(config), StatusCode::kInvalidArgument, "data.path");
}

}  // namespace
}  // namespace heddle::settings
