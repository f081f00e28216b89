#include <gtest/gtest.h>

#include "base/settings/json.h"
#include "base/settings/settings.h"
#include "tests/base/settings/config_files.h"
#include "tests/support/status_matchers.h"

namespace heddle::settings {
namespace {

TEST(Load, FillsEveryScalarWithItsDefault) {
  const ConfigFiles files;
  ASSERT_OK_AND_ASSIGN(const ResolvedConfig resolved, files.LoadText(kMinimal));
  const v1::RunConfig& config = resolved.config;
  EXPECT_EQ(config.name(), "run");
  EXPECT_TRUE(config.training().has_max_steps());
  EXPECT_EQ(config.training().max_steps(), 1000);
  EXPECT_EQ(config.schedule().priority(), 50);
  EXPECT_EQ(config.schedule().max_restarts(), 10);
  EXPECT_TRUE(config.model().rope().scaling().has_type());
  EXPECT_FALSE(config.model().has_moe());
  EXPECT_FALSE(config.model().attention().has_mla());
  EXPECT_FALSE(config.data().has_eval_path());
  EXPECT_EQ(resolved.origins.at("training.max_steps"), "default");
  EXPECT_EQ(resolved.origins.at("data.path"), files.folder() + "/run.yaml:1:8");
  EXPECT_TRUE(resolved.warnings.empty());
}

TEST(Load, ReadsUnitsWhereTheSchemaDeclaresThem) {
  const ConfigFiles files;
  ASSERT_OK_AND_ASSIGN(const ResolvedConfig resolved, files.LoadText(R"(
data: {path: /data}
schedule: {time_limit: 1h30m, min_runtime: 250, start_time: 2026-11-20T23:30:00Z}
parallel: {memory_per_rank: 1.5GiB, ranks: 3}
checkpoint: {save_interval: auto, keep_every: 10}
)"));
  EXPECT_EQ(resolved.config.schedule().time_limit(), 5'400'000);
  EXPECT_EQ(resolved.config.schedule().min_runtime(), 250);
  EXPECT_EQ(resolved.config.schedule().start_time(), 1'795'217'400'000);
  EXPECT_EQ(resolved.config.parallel().memory_per_rank(), 1'610'612'736);
  EXPECT_EQ(resolved.config.parallel().ranks().min(), 3);
  EXPECT_EQ(resolved.config.parallel().ranks().max(), 3);
  EXPECT_EQ(resolved.config.checkpoint().save_interval(), 0);
}

TEST(Load, TypesAValueByItsFieldOnly) {
  const ConfigFiles files;
  // `yes`, `010`, `1e400`, `null` and `true` are words in a text field and refused in others.
  ASSERT_OK_AND_ASSIGN(const ResolvedConfig resolved, files.LoadText(R"(
kind: command
command: {argv: [yes, 010, 1e400, 'null', true], env: {A: 1, B: 'no', C: ''}}
)"));
  const auto& argv = resolved.config.command().argv();
  EXPECT_EQ(std::vector<std::string>(argv.begin(), argv.end()),
            (std::vector<std::string>{"yes", "010", "1e400", "null", "true"}));
  EXPECT_EQ(resolved.config.command().env().at("A"), "1");
  EXPECT_EQ(resolved.config.command().env().at("C"), "");
}

TEST(Load, ReportsAllProblemsAtOnceWithPositionAndNearestName) {
  const ConfigFiles files;
  EXPECT_EQ(files.Problems(R"(name: "x y"
model:
  d_modl: 3
  n_heads: four
  head_dim: 010
training:
  max_steps: 0
  precision: bf17
  learning_rate: 1e400
  eval_interval: yes
data: {path: a, shuffle: yes}
learning_rate: 3
schedule: {priority: 200, account: }
)"),
            R"(run.yaml:3:3: model.d_modl: unknown key (nearest name: model.d_model)
run.yaml:12:1: learning_rate: unknown key (nearest name: training.learning_rate)
run.yaml:11:26: data.shuffle: needs true or false (is 'yes')
run.yaml:5:13: model.head_dim: needs a decimal integer or `auto` (is '010')
run.yaml:4:12: model.n_heads: needs a decimal integer (is 'four')
run.yaml:13:36: schedule.account: has no value (leave the key out for its default)
run.yaml:10:18: training.eval_interval: needs a decimal integer (is 'yes')
run.yaml:9:18: training.learning_rate: needs a finite number (is '1e400')
run.yaml:8:14: training.precision: needs one of bf16, fp32, fp8 (is 'bf17'; nearest name: bf16)
run.yaml:1:1: name: needs 1 to 128 letters, digits, '-', '_', '.', not starting with '-' or '.' (is 'x y')
run.yaml:7:3: training.max_steps: must be between 1 and 1000000000000 (is 0)
run.yaml:13:12: schedule.priority: must be between 0 and 99 (is 200))");
}

TEST(Load, ReportsBadOverridesTogetherWithTheFile) {
  const ConfigFiles files;
  EXPECT_EQ(files.Problems("data: {path: a}\nmodel: {d_modl: 3}\n",
                           {"a=[1", "training.max_stepz=3", "training.seed=-1"}),
            "override 'a=[1': ']' is missing\n"
            "run.yaml:2:9: model.d_modl: unknown key (nearest name: model.d_model)\n"
            "override 'training.max_stepz=3': training.max_stepz: unknown key (nearest name: "
            "training.max_steps)\n"
            "override 'training.seed=-1': training.seed: must be between 0 and 9007199254740991 "
            "(is -1)");
}

TEST(Load, WantsGroupsListsAndValuesWhereTheyBelong) {
  const ConfigFiles files;
  EXPECT_EQ(files.Problems("data: {path: [a], mixture: {path: x}}\nmodel: 3\n"
                           "training: {max_steps: {a: 1}}\nschedule: {after: j-1}\n"),
            "run.yaml:2:1: model: is a group of keys, not a value (is 3)\n"
            "run.yaml:1:28: data.mixture: needs a list such as [a, b] (is {path: x})\n"
            "run.yaml:1:14: data.path: needs one value (is [a])\n"
            "run.yaml:4:19: schedule.after: needs a list such as [a, b] (is j-1)\n"
            "run.yaml:3:23: training.max_steps: needs one value (is {a: 1})\n"
            "run.yaml:1:8: data.path: a training job needs data.path or data.mixture (`heddle "
            "data prepare` makes one)");
  EXPECT_EQ(files.Problems("data: {mixture: [{path: x}, {pth: y}, z]}\n"),
            "run.yaml:1:30: data.mixture[1].pth: unknown key (nearest name: path)\n"
            "run.yaml:1:39: data.mixture[2]: needs a map of keys (is z)\n"
            "run.yaml:1:8: data.mixture[1].path: is needed\n"
            "run.yaml:1:8: data.mixture[2].path: is needed");
}

TEST(Load, ReadsAMixture) {
  const ConfigFiles files;
  ASSERT_OK_AND_ASSIGN(const ResolvedConfig resolved,
                       files.LoadText("data: {mixture: [{path: /a, weight: 0.25}, {path: /b}]}\n"));
  ASSERT_EQ(resolved.config.data().mixture_size(), 2);
  EXPECT_EQ(resolved.config.data().mixture(0).weight(), 0.25);
  EXPECT_TRUE(resolved.config.data().mixture(1).has_weight());
  EXPECT_EQ(resolved.config.data().mixture(1).weight(), 1);
}

TEST(Load, MissingFileIsNotFound) {
  const ConfigFiles files;
  EXPECT_STATUS(Load(files.folder() + "/none.yaml", {}, files.options), StatusCode::kNotFound,
                "none.yaml");
  EXPECT_STATUS(Load("none", {}, files.options), StatusCode::kNotFound, "no such config file");
  EXPECT_STATUS(Load(files.folder(), {}, files.options), StatusCode::kInvalidArgument,
                "not a regular file");
}

TEST(Defaults, LaterLayersWinAndSelfHasAPlace) {
  const ConfigFiles files;
  files.Write("presets/model/big.yaml", "d_model: 1024\nn_heads: 16\nn_layers: 7\n");
  files.Write("presets/training/fast.yaml", "max_steps: 5\nlearning_rate: 0.5\n");
  const std::string last = "data: {path: /d}\nmodel: {n_layers: 2}\n";
  ASSERT_OK_AND_ASSIGN(const ResolvedConfig a,
                       files.LoadText("defaults: [{model: big}, {training: fast}]\n" + last));
  EXPECT_EQ(a.config.model().d_model(), 1024);
  EXPECT_EQ(a.config.model().n_layers(), 2);
  EXPECT_EQ(a.config.training().max_steps(), 5);
  EXPECT_EQ(a.origins.at("model.d_model"), files.folder() + "/presets/model/big.yaml:1:1");
  ASSERT_OK_AND_ASSIGN(const ResolvedConfig b,
                       files.LoadText("defaults: [_self_, {model: big}]\n" + last));
  EXPECT_EQ(b.config.model().n_layers(), 7);
}

TEST(Defaults, GroupFilesBuildOnEachOther) {
  const ConfigFiles files;
  files.Write("presets/model/base.yaml", "d_model: 1024\nn_heads: 16\nn_layers: 7\n");
  files.Write("presets/model/deep.yaml", "defaults: [base]\nn_layers: 70\n");
  files.Write("presets/training/fast.yaml", "max_steps: 5\n");
  files.Write("presets/model/trained.yaml", "defaults: [deep, {/training: fast}, _self_]\n");
  ASSERT_OK_AND_ASSIGN(const ResolvedConfig resolved,
                       files.LoadText("defaults: [{model: trained}]\n" + kMinimal));
  EXPECT_EQ(resolved.config.model().d_model(), 1024);
  EXPECT_EQ(resolved.config.model().n_layers(), 70);
  EXPECT_EQ(resolved.config.training().max_steps(), 5);
}

TEST(Defaults, EntriesOfHydra) {
  const ConfigFiles files;
  files.Write("presets/model/a.yaml", "n_layers: 11\n");
  files.Write("presets/model/b.yaml", "n_layers: 12\n");
  files.Write("presets/training/t.yaml", "training: {max_steps: 9}\n");
  files.Write("presets/base.yaml", "training: {seed: 4}\n");
  ASSERT_OK_AND_ASSIGN(
      const ResolvedConfig resolved,
      files.LoadText("defaults:\n- base\n- model: a\n- optional data: none\n- logging: null\n"
                     "- override model: b\n- training@_global_: t\n" +
                     kMinimal));
  EXPECT_EQ(resolved.config.model().n_layers(), 12);
  EXPECT_EQ(resolved.config.training().max_steps(), 9);
  EXPECT_EQ(resolved.config.training().seed(), 4);
}

TEST(Defaults, RefusesWhatItCannotFind) {
  const ConfigFiles files;
  files.Write("presets/model/tiny-dense.yaml", "n_layers: 11\n");
  files.Write("presets/model/loop.yaml", "defaults: [loop]\n");
  files.Write("presets/model/packaged.yaml", "# @package _global_\nn_layers: 1\n");
  EXPECT_EQ(files.Problems("defaults: [{model: tiny-dens}, {modl: x}, [a], {model: ../run}]\n" +
                           kMinimal),
            "run.yaml:1:32: defaults: modl: unknown group (nearest name: model)\n"
            "run.yaml:1:43: defaults: an entry is `group: option` or `option`\n"
            "run.yaml:1:12: model: no preset model/tiny-dens (nearest name: tiny-dense)\n"
            "run.yaml:1:48: model: no preset model/../run in the search path");
  EXPECT_NE(files.Problems("defaults: [{model: loop}]\n" + kMinimal).find("nest deeper than 8"),
            std::string::npos);
  EXPECT_NE(files.Problems("defaults: [{model: packaged}]\n" + kMinimal).find("# @package"),
            std::string::npos);
  EXPECT_NE(files.Problems("defaults: model\n" + kMinimal).find("needs a list"), std::string::npos);
  EXPECT_NE(files.Problems("defaults: [_self_, _self_]\n" + kMinimal).find("stands twice"),
            std::string::npos);
  EXPECT_NE(files.Problems("defaults: [{override model: loop}]\n" + kMinimal)
                .find("nothing chose model before"),
            std::string::npos);
}

TEST(Interpolation, ReadsOtherKeysAndAllowedVariables) {
  const ConfigFiles files;
  ASSERT_OK_AND_ASSIGN(const ResolvedConfig resolved, files.LoadText(R"(
name: n-${model.d_model}-${training.seed}
model: {d_model: 128, n_heads: 4, d_ffn: '${model.d_model}'}
training: {max_steps: "${oc.env:HEDDLE_STEPS}", seed: "${oc.env:HEDDLE_NONE,5}", warmup_steps: 1}
data: {path: "${oc.env:HOME}/data", eval_path: 'a\${b}'}
schedule: {after: [j-1, j-2]}
)"));
  EXPECT_EQ(resolved.config.name(), "n-128-5");
  EXPECT_EQ(resolved.config.model().d_ffn(), 128);
  EXPECT_EQ(resolved.config.training().max_steps(), 77);
  EXPECT_EQ(resolved.config.data().path(), "/home/ada/data");
  EXPECT_EQ(resolved.config.data().eval_path(), "a${b}");
}

TEST(Interpolation, RefusesCirclesSecretsAndOtherResolvers) {
  const ConfigFiles files;
  const auto problem = [&](const std::string& value) {
    return files.Problems("data: {path: '" + value + "'}\n");
  };
  EXPECT_NE(problem("${oc.env:SECRET}").find("SECRET may not be read"), std::string::npos);
  EXPECT_NE(problem("${oc.env:HEDDLE_NONE}").find("not set and has no default"), std::string::npos);
  EXPECT_NE(problem("${now:%Y}").find("the resolver now is not supported"), std::string::npos);
  EXPECT_NE(problem("${.x}").find("relative interpolation"), std::string::npos);
  EXPECT_NE(problem("${data.pth}").find("nearest name: data.path"), std::string::npos);
  EXPECT_NE(problem("${data.path}").find("in a circle"), std::string::npos);
  EXPECT_NE(problem("${data.path").find("'}' of an interpolation"), std::string::npos);
  EXPECT_NE(problem("${a${b}}").find("inside another"), std::string::npos);
}

TEST(Interpolation, DoublingTextsAreBounded) {
  const ConfigFiles files;
  // Each key repeats the one before it ten times: 10^5 * 40 bytes without a bound.
  const std::string long_text(40, 'x');
  const auto ten = [](const std::string& key) {
    std::string out;
    for (int i = 0; i < 10; ++i) {
      out += "${command.env." + key + "}";
    }
    return out;
  };
  const std::string text = "kind: command\ncommand:\n  argv: [x]\n  env:\n    A: " + long_text +
                           "\n    B: " + ten("A") + "\n    C: " + ten("B") +
                           "\n    D: " + ten("C") + "\n    E: " + ten("D") + "\n";
  EXPECT_NE(files.Problems(text).find("longer than 65536 bytes"), std::string::npos);
}

TEST(Load, AKindAndAPatternReplaceEachOtherAcrossLayers) {
  const ConfigFiles files;
  const std::string text =
      "data: {path: /d}\nmodel: {attention: {pattern: [swa, dense], swa: {window: 8}}}\n";
  ASSERT_OK_AND_ASSIGN(const ResolvedConfig resolved,
                       files.LoadText(text, {"model.attention.kind=dense"}));
  EXPECT_EQ(resolved.config.model().attention().pattern_size(), 0);
  ASSERT_EQ(resolved.warnings.size(), 1u);
  EXPECT_NE(resolved.warnings[0].find("model.attention.swa has no effect"), std::string::npos);
}

TEST(Load, KindCommandWarnsOfModelKeys) {
  const ConfigFiles files;
  ASSERT_OK_AND_ASSIGN(
      const ResolvedConfig resolved,
      files.LoadText("kind: command\ncommand: {argv: [true]}\nmodel: {n_layers: 2}\n"));
  ASSERT_EQ(resolved.warnings.size(), 1u);
  EXPECT_NE(resolved.warnings[0].find("model.n_layers has no effect"), std::string::npos);
  for (const char* key : {"parallel.expert=3", "parallel.shard=full"}) {
    ASSERT_OK_AND_ASSIGN(
        const ResolvedConfig divided,
        files.LoadText("kind: command\ncommand: {argv: [true]}\nparallel: {ranks: 3}\n", {key}));
    ASSERT_EQ(divided.warnings.size(), 1u) << key;
    EXPECT_NE(divided.warnings[0].find("has no effect in a job of kind command"),
              std::string::npos);
  }
}

TEST(Dump, ReadsBackToTheSameConfig) {
  const ConfigFiles files;
  ASSERT_OK_AND_ASSIGN(const ResolvedConfig first, files.LoadText(R"(
name: a.b
kind: command
command: {argv: [sh, -c, "echo 'x' # \u00e9\n", '', 'null', '-1'], env: {B: "2", A: 'x: y'}}
schedule: {time_limit: 10m, after: [j-1, any:j-2]}
parallel: {ranks: 2, memory_per_rank: 1GiB}
)"));
  ASSERT_OK_AND_ASSIGN(const ResolvedConfig second, files.LoadText(ToYaml(first.config)));
  EXPECT_EQ(ToYaml(second.config), ToYaml(first.config));
  EXPECT_EQ(second.config.command().argv(2), "echo 'x' # \u00e9\n");
  EXPECT_EQ(ToYaml(first.config, &first.origins).find("\n  env:\n    A: \"x: y\""),
            ToYaml(first.config, &first.origins).find("\n  env:"));
}

TEST(Load, LionHasItsOwnDecay) {
  const ConfigFiles files;
  const auto beta2 = [&](const std::vector<std::string>& overrides) {
    const StatusOr<ResolvedConfig> resolved = files.LoadText(kMinimal, overrides);
    EXPECT_OK(resolved);
    return resolved->config.training().beta2();
  };
  EXPECT_EQ(beta2({}), 0.95);
  EXPECT_EQ(beta2({"training.optimizer=lion"}), 0.99);
  EXPECT_EQ(beta2({"training.optimizer=lion", "training.beta2=0.98"}), 0.98);
}

TEST(ConfigHash, SeesWhatChangesTheRunAndNothingElse) {
  const ConfigFiles files;
  const auto hash = [&](const std::vector<std::string>& overrides) {
    const StatusOr<ResolvedConfig> resolved = files.LoadText(kMinimal, overrides);
    EXPECT_OK(resolved);
    return ConfigHash(resolved->config);
  };
  const std::string base = hash({});
  EXPECT_EQ(base.size(), 32u);
  EXPECT_EQ(hash({"name=other", "schedule.priority=3", "logging.log_interval=9"}), base);
  EXPECT_EQ(hash({"training.seed=0"}), base) << "a default that is written out";
  EXPECT_NE(hash({"training.seed=1"}), base);
  EXPECT_NE(hash({"model.n_layers=5"}), base);
  v1::RunConfig sparse;
  sparse.mutable_data()->set_path("/data");
  EXPECT_EQ(ConfigHash(sparse), base) << "unset defaults count as defaults";
}

TEST(MergeText, ReadsAnyMessage) {
  v1::ModelConfig model;
  model.set_n_layers(9);
  ASSERT_OK(MergeText(R"({"d_model": 64, "attention": {"kind": "swa"}, "rope_theta": 5e5})",
                      "config.json", &model));
  EXPECT_EQ(model.d_model(), 64);
  EXPECT_EQ(model.n_layers(), 9);
  EXPECT_EQ(model.attention().kind(), v1::ATTENTION_KIND_SWA);
  EXPECT_EQ(model.rope().theta(), 5e5);
  EXPECT_STATUS(MergeText("d_model: 0\nn_layer: x\nfoo: 1\n", "m.yaml", &model),
                StatusCode::kInvalidArgument, "m.yaml:3:1: foo: unknown key");
  EXPECT_EQ(model.d_model(), 64) << "unchanged on error";
}

TEST(ApplyOverrides, ChangesAResolvedConfigOrNothing) {
  const ConfigFiles files;
  ASSERT_OK_AND_ASSIGN(const ResolvedConfig resolved, files.LoadText(kMinimal));
  v1::RunConfig config = resolved.config;
  ASSERT_OK(ApplyOverrides({"training.max_steps=2000", "parallel.ranks=2"}, &config));
  EXPECT_EQ(config.training().max_steps(), 2000);
  EXPECT_EQ(config.parallel().ranks().min(), 2);
  EXPECT_STATUS(ApplyOverrides({"training.max_steps=0", "a=1"}, &config),
                StatusCode::kInvalidArgument, "unknown key");
  EXPECT_STATUS(ApplyOverrides({"training.max_steps=1,2"}, &config), StatusCode::kInvalidArgument,
                "only KEY=VALUE");
  EXPECT_STATUS(ApplyOverrides({"model=tiny"}, &config), StatusCode::kInvalidArgument,
                "a group cannot change");
  EXPECT_EQ(config.training().max_steps(), 2000);
}

}  // namespace
}  // namespace heddle::settings
