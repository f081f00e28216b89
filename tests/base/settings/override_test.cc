// Override lines with their result or their error (formats.md I15).
#include <gtest/gtest.h>

#include "base/settings/override_parser.h"
#include "base/settings/settings.h"
#include "tests/base/settings/config_files.h"
#include "tests/support/status_matchers.h"

namespace heddle::settings {
namespace {

struct Line {
  const char* text;
  const char* shown;  // the choices, "; " between them; nullptr: an error
  const char* error = "";
};

std::string ShownChoices(const Override& override) {
  std::string out;
  for (const Value& choice : override.choices) {
    out += (out.empty() ? "" : "; ") + Shown(choice);
  }
  return out;
}

TEST(ParseOverride, ReadsHydrasValues) {
  const Line lines[] = {
      {"a.b=1", "1"},
      {"a=", ""},
      {"a=''", ""},
      {"a=null", "null"},
      {"a='null'", "null"},
      {"a=x y z ", "x y z"},
      {"a='x, y'", "x, y"},
      {"a=\"it's\"", "it's"},
      {"a='it\\'s'", "it's"},
      {"a=x\\,y", "x,y"},
      {"a=\\{x\\}", "{x}"},
      {"a=/data/*.txt", "/data/*.txt"},
      {"a=2026-11-20T23:30:00Z", "2026-11-20T23:30:00Z"},
      {"a=b=c", "b=c"},
      {"a=[]", "[]"},
      {"a=[1,2, 3]", "[1, 2, 3]"},
      {"a=[[1],[2,3]]", "[[1], [2, 3]]"},
      {"a=[x y,'z, w']", "[x y, z, w]"},
      {"a={}", "{}"},
      {"a={b:1,c: 2}", "{b: 1, c: 2}"},
      {"a={b:{c:[1,{d:2}]}}", "{b: {c: [1, {d: 2}]}}"},
      {"a={'b c':x:y}", "{b c: x:y}"},
      {"a={min: 1, max: 4}", "{min: 1, max: 4}"},
      {"a=${b.c}", "${b.c}"},
      {"a=${oc.env:HOME,x}/y", "${oc.env:HOME,x}/y"},
      {"a=[${b},${c}]", "[${b}, ${c}]"},
      {"a=1,2,3", "1; 2; 3"},
      {"a=1, 'b c' ,[3]", "1; b c; [3]"},
      {"a=choice(1,2)", "1; 2"},
      {"a=choice(x)", "x"},
      {"a=range(3)", "0; 1; 2"},
      {"a=range(1,4)", "1; 2; 3"},
      {"a=range(1,8,3)", "1; 4; 7"},
      {"a=range(3,0,-1)", "3; 2; 1"},
      {"a=range(0,0.3,0.1)", "0; 0.1; 0.2"},
  };
  for (const Line& line : lines) {
    const StatusOr<Override> parsed = ParseOverride(line.text);
    ASSERT_OK(parsed) << line.text;
    EXPECT_EQ(ShownChoices(*parsed), line.shown) << line.text;
  }
}

TEST(ParseOverride, KnowsKindsKeysAndPackages) {
  ASSERT_OK_AND_ASSIGN(Override o, ParseOverride("+a.b=1"));
  EXPECT_EQ(o.kind, Override::Kind::kAdd);
  EXPECT_EQ(o.key, "a.b");
  ASSERT_OK_AND_ASSIGN(o, ParseOverride("++a=1"));
  EXPECT_EQ(o.kind, Override::Kind::kForce);
  ASSERT_OK_AND_ASSIGN(o, ParseOverride("~a.b"));
  EXPECT_EQ(o.kind, Override::Kind::kDelete);
  EXPECT_FALSE(o.has_value);
  ASSERT_OK_AND_ASSIGN(o, ParseOverride("~a.b=2"));
  EXPECT_TRUE(o.has_value);
  ASSERT_OK_AND_ASSIGN(o, ParseOverride("model@_global_=x"));
  EXPECT_EQ(o.key, "model");
  EXPECT_EQ(o.package, "_global_");
  ASSERT_OK_AND_ASSIGN(o, ParseOverride("model=glob(tiny-*)"));
  EXPECT_EQ(o.glob, "tiny-*");
  ASSERT_OK_AND_ASSIGN(o, ParseOverride("a=1,2"));
  EXPECT_TRUE(o.is_sweep);
  ASSERT_OK_AND_ASSIGN(o, ParseOverride("a=[1,2]"));
  EXPECT_FALSE(o.is_sweep);
}

TEST(ParseOverride, RefusesByName) {
  const Line lines[] = {
      {"", nullptr, "needs KEY=VALUE"},
      {"a", nullptr, "needs KEY=VALUE"},
      {"=1", nullptr, "needs KEY=VALUE"},
      {"+=1", nullptr, "needs KEY=VALUE"},
      {"--multirun", nullptr, "flags stand before the overrides"},
      {"a b=1", nullptr, "a key cannot contain ' '"},
      {"a$=1", nullptr, "a key cannot contain '$'"},
      {"a[0]=1", nullptr, "a key cannot contain '['"},
      {"hydra.run.dir=x", nullptr, "hydra.*"},
      {"hydra/launcher=x", nullptr, "hydra.*"},
      {"model@a:b=x", nullptr, "renaming a package"},
      {"a=[1", nullptr, "']' is missing"},
      {"a=[1 2", nullptr, "']' is missing"},
      {"a=]", nullptr, "unexpected ']'"},
      {"a={b}", nullptr, "KEY: VALUE"},
      {"a={b:1", nullptr, "'}' is missing"},
      {"a={b:1,b:2}", nullptr, "b: duplicate key"},
      {"a={:1}", nullptr, "KEY: VALUE"},
      {"a='x", nullptr, "a quote is not closed"},
      {"a=x'y", nullptr, "unexpected '''"},
      {"a='x'y", nullptr, "unexpected 'y'"},
      {"a=1,,2", nullptr, "an empty value"},
      {"a=1,", nullptr, "an empty value"},
      {"a=f(x", nullptr, "unknown function f()"},
      {"a=interval(1,2)", nullptr, "Hydra's interval() is not supported"},
      {"a=sort(1,2)", nullptr, "Hydra's sort() is not supported"},
      {"a=shuffle(1,2)", nullptr, "Hydra's shuffle() is not supported"},
      {"a=tag(x,1)", nullptr, "Hydra's tag() is not supported"},
      {"a=int('3')", nullptr, "Hydra's int() is not supported"},
      {"a=float(3)", nullptr, "Hydra's float() is not supported"},
      {"a=str(3)", nullptr, "Hydra's str() is not supported"},
      {"a=bool(1)", nullptr, "Hydra's bool() is not supported"},
      {"a=json_str([1])", nullptr, "Hydra's json_str() is not supported"},
      {"a=extend_list(1)", nullptr, "Hydra's extend_list() is not supported"},
      {"a=[choice(1,2)]", nullptr, "choice() is not supported inside"},
      {"a=1,choice(1,2)", nullptr, "choice() is not supported inside"},
      {"a=choice()", nullptr, "choice() needs values"},
      {"a=choice(1) x", nullptr, "unexpected text after choice"},
      {"a=range()", nullptr, "range() takes"},
      {"a=range(1,2,3,4)", nullptr, "range() takes"},
      {"a=range(3,1)", nullptr, "range() is empty"},
      {"a=range(1,2,0)", nullptr, "range() is empty"},
      {"a=range(x)", nullptr, "needs a number"},
      {"a=range(1000000)", nullptr, "more than 10000"},
      {"a=glob()", nullptr, "glob() takes one pattern"},
      {"a=glob(x,y)", nullptr, "glob() takes one pattern"},
      {"a=${b", nullptr, "'}' of an interpolation"},
      {"a=\xFF", nullptr, "not a text"},
  };
  for (const Line& line : lines) {
    const StatusOr<Override> parsed = ParseOverride(line.text);
    EXPECT_STATUS(parsed.status(), StatusCode::kInvalidArgument, line.error) << line.text;
    EXPECT_EQ(Message(parsed.status()).rfind("override '", 0), 0u) << line.text;
  }
  EXPECT_STATUS(ParseOverride("a=" + std::string(100, '[')), StatusCode::kInvalidArgument,
                "nested deeper than 64");
  EXPECT_STATUS(ParseOverride("a=" + std::string(100000, 'x')), StatusCode::kInvalidArgument,
                "too long");
}

TEST(Overrides, SetAddForceAndDelete) {
  const ConfigFiles files;
  const std::string text = kMinimal + "training: {max_steps: 200, seed: 3}\n";
  const auto max_steps = [&](const std::vector<std::string>& overrides) {
    const StatusOr<ResolvedConfig> resolved = files.LoadText(text, overrides);
    EXPECT_OK(resolved);
    return resolved.ok() ? resolved->config.training().max_steps() : -1;
  };
  EXPECT_EQ(max_steps({"training.max_steps=20"}), 20);
  EXPECT_EQ(max_steps({"training.max_steps=20", "training.max_steps=30"}), 30);
  EXPECT_EQ(max_steps({"++training.max_steps=20"}), 20);
  EXPECT_EQ(max_steps({"~training.max_steps"}), 1000);
  EXPECT_EQ(max_steps({"~training.max_steps=200"}), 1000);
  EXPECT_EQ(max_steps({"~training"}), 1000);
  EXPECT_EQ(max_steps({"training={max_steps: 5}"}), 5);
  EXPECT_EQ(max_steps({"+training.warmup_steps=1"}), 200);
  EXPECT_EQ(files.Problems(text, {"+training.max_steps=20"}),
            "override '+training.max_steps=20': training.max_steps: is set already at "
            "run.yaml:2:12; write ++ to replace it");
  EXPECT_EQ(files.Problems(text, {"~training.max_steps=11"}),
            "override '~training.max_steps=11': training.max_steps: its value is 200");
  EXPECT_EQ(files.Problems(text, {"~training.max_stepz"}),
            "override '~training.max_stepz': training.max_stepz: unknown key (nearest name: "
            "training.max_steps)");
  ASSERT_OK_AND_ASSIGN(const ResolvedConfig warned, files.LoadText(text, {"~training.eps"}));
  ASSERT_EQ(warned.warnings.size(), 1u);
  EXPECT_NE(warned.warnings[0].find("has its default already"), std::string::npos);
}

TEST(Overrides, ListsMapsAndTexts) {
  const ConfigFiles files;
  ASSERT_OK_AND_ASSIGN(
      const ResolvedConfig resolved,
      files.LoadText(kMinimal, {"schedule.after=[j-1,'any:j-2']", "parallel.ranks={min: 2, max: 2}",
                                "data={mixture: [{path: /a, weight: 2}]}", "name='a.b'",
                                "data.eval_path=/x y", "model.attention.pattern=[dense,swa]"}));
  EXPECT_EQ(resolved.config.schedule().after(1), "any:j-2");
  EXPECT_EQ(resolved.config.parallel().ranks().max(), 2);
  EXPECT_EQ(resolved.config.data().mixture(0).weight(), 2);
  EXPECT_FALSE(resolved.config.data().has_path()) << "a mixture replaces the file's path";
  EXPECT_EQ(resolved.config.data().eval_path(), "/x y");
  EXPECT_EQ(resolved.origins.at("name"), "override 'name='a.b''");
}

TEST(Overrides, ChooseGroups) {
  const ConfigFiles files;
  files.Write("presets/model/a.yaml", "n_layers: 11\n");
  files.Write("presets/model/b.yaml", "n_layers: 12\n");
  files.Write("presets/training/t.yaml", "max_steps: 9\nseed: 5\n");
  const std::string text = "defaults: [{model: a}]\ntraining: {seed: 6}\n" + kMinimal;
  const auto load = [&](const std::vector<std::string>& overrides) {
    const StatusOr<ResolvedConfig> resolved = files.LoadText(text, overrides);
    EXPECT_OK(resolved);
    return resolved.ok() ? resolved->config : v1::RunConfig();
  };
  EXPECT_EQ(load({}).model().n_layers(), 11);
  EXPECT_EQ(load({"model=b"}).model().n_layers(), 12);
  EXPECT_EQ(load({"model.n_layers=1", "model=b"}).model().n_layers(), 1) << "values come last";
  EXPECT_EQ(load({"~model"}).model().n_layers(), 4);
  EXPECT_EQ(load({"+training=t"}).training().max_steps(), 9);
  EXPECT_EQ(load({"training=t"}).training().seed(), 6) << "the file's own keys win";
  EXPECT_NE(files.Problems(text, {"+model=b"}).find("is chosen already"), std::string::npos);
  EXPECT_NE(files.Problems(text, {"model=c"}).find("no preset model/c"), std::string::npos);
  EXPECT_NE(files.Problems(text, {"model/attention=x"}).find("groups have one level"),
            std::string::npos);
  EXPECT_NE(files.Problems(text, {"modl/x=y"}).find("unknown group"), std::string::npos);
  EXPECT_NE(files.Problems(text, {"training.seed@x=1"}).find("only a group takes @package"),
            std::string::npos);
}

TEST(Sweeps, AreCartesianWithTheFirstKeySlowest) {
  const ConfigFiles files;
  const std::string path = files.Write("run.yaml", kMinimal);
  ASSERT_OK_AND_ASSIGN(
      const std::vector<ResolvedConfig> runs,
      LoadSweep(path, {"training.seed=1,2", "training.max_steps=range(1,4)"}, files.options));
  ASSERT_EQ(runs.size(), 6u);
  EXPECT_EQ(runs[0].sweep, (std::vector<std::string>{"training.seed=1", "training.max_steps=1"}));
  EXPECT_EQ(runs[1].sweep, (std::vector<std::string>{"training.seed=1", "training.max_steps=2"}));
  EXPECT_EQ(runs[5].config.training().seed(), 2);
  EXPECT_EQ(runs[5].config.training().max_steps(), 3);
  EXPECT_STATUS(Load(path, {"training.seed=1,2"}, files.options), StatusCode::kInvalidArgument,
                "a sweep of 2 runs");
  EXPECT_STATUS(LoadSweep(path, {"training.seed=range(1000)", "training.max_steps=range(1,12)"},
                          files.options),
                StatusCode::kInvalidArgument, "a sweep of more than 10000 runs");
  EXPECT_STATUS(LoadSweep(path, {"training.seed=1,-2"}, files.options),
                StatusCode::kInvalidArgument, "(in sweep element training.seed=-2)");
}

TEST(Sweeps, GlobsNameThePresetsOfAGroup) {
  const ConfigFiles files;
  for (const char* name : {"tiny-a", "tiny-b", "small-a"}) {
    files.Write(Str("presets/model/", name, ".yaml"), "n_layers: 2\n");
  }
  const std::string path = files.Write("run.yaml", kMinimal);
  ASSERT_OK_AND_ASSIGN(const std::vector<ResolvedConfig> runs,
                       LoadSweep(path, {"model=glob(tiny-*)"}, files.options));
  ASSERT_EQ(runs.size(), 2u);
  EXPECT_EQ(runs[1].sweep, std::vector<std::string>{"model=tiny-b"});
  EXPECT_STATUS(LoadSweep(path, {"model=glob(x*)"}, files.options), StatusCode::kInvalidArgument,
                "no preset matches");
  EXPECT_STATUS(LoadSweep(path, {"training.seed=glob(*)"}, files.options),
                StatusCode::kInvalidArgument, "no preset matches");
}

TEST(MatchesGlob, KnowsStarsAndQuestionMarks) {
  EXPECT_TRUE(MatchesGlob("*", ""));
  EXPECT_TRUE(MatchesGlob("a*c", "abbc"));
  EXPECT_TRUE(MatchesGlob("a*b*c", "aXbXbXc"));
  EXPECT_TRUE(MatchesGlob("a?c", "abc"));
  EXPECT_FALSE(MatchesGlob("a?c", "ac"));
  EXPECT_FALSE(MatchesGlob("a*c", "abcd"));
}

}  // namespace
}  // namespace heddle::settings
