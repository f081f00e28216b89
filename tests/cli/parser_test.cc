#include "cli/commands/parser.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <regex>
#include <set>
#include <sstream>

#include "cli/commands/verbs.h"
#include "tests/cli/fake_cluster.h"

namespace heddle::cli {
namespace {

struct Seen {
  std::string text;
  std::vector<std::string> words;
  std::vector<std::string> rest;
  int64_t number = 0;
  double real = 0;
  bool flag = false;
  CommandContext context;
};

struct Parsed {
  int status = 0;
  std::string err;
  Seen seen;
};

Parsed Parse(const std::vector<std::string>& words, const StatusOr<int>& result = 7) {
  Parsed parsed;
  Seen& seen = parsed.seen;
  Verb one{.path = {"one"},
           .doc = "",
           .options = {},
           .extras = nullptr,
           .run = nullptr,
           .state = nullptr};
  one.options = {{"text", "", &seen.text, true},
                 {"words", "", &seen.words},
                 {"-n,--number", "", &seen.number},
                 {"--real", "", &seen.real},
                 {"--flag", "", &seen.flag}};
  one.run = [&seen, result](const CommandContext& context) {
    seen.context = context;
    return result;
  };
  Verb two = one;
  two.path = {"group", "two"};
  Verb program = one;
  program.path = {"group", "program"};
  program.options.clear();
  program.extras = &seen.rest;
  std::vector<const char*> argv = {"heddle"};
  for (const std::string& word : words) {
    argv.push_back(word.c_str());
  }
  CommandContext context;
  ::testing::internal::CaptureStdout();
  ::testing::internal::CaptureStderr();
  parsed.status =
      ParseAndRun(static_cast<int>(argv.size()), argv.data(), {one, two, program}, &context);
  ::testing::internal::GetCapturedStdout();
  parsed.err = ::testing::internal::GetCapturedStderr();
  return parsed;
}

TEST(Parser, FillsOptionsAndPassesTheStatusOn) {
  const Parsed parsed = Parse(
      {"one", "c.yaml", "a.b=1", "+x=2", "~y", "m={a: 1}", "-n", "3", "--real", "0.5", "--flag"});
  EXPECT_EQ(parsed.status, 7) << parsed.err;
  EXPECT_EQ(parsed.seen.text, "c.yaml");
  EXPECT_EQ(parsed.seen.words, (std::vector<std::string>{"a.b=1", "+x=2", "~y", "m={a: 1}"}));
  EXPECT_EQ(parsed.seen.number, 3);
  EXPECT_EQ(parsed.seen.real, 0.5);
  EXPECT_TRUE(parsed.seen.flag);
}

TEST(Parser, KeepsCommasOfOverridesTogether) {
  const Parsed parsed = Parse({"one", "c", "a=1,2", "b=[x,y]"});
  EXPECT_EQ(parsed.seen.words, (std::vector<std::string>{"a=1,2", "b=[x,y]"}));
}

TEST(Parser, TakesGlobalsBeforeAndAfterTheVerb) {
  for (const std::vector<std::string>& words :
       {std::vector<std::string>{"-o", "json", "--coordinator", "unix:/x", "--timeout", "1m30s",
                                 "group", "two", "t"},
        std::vector<std::string>{"group", "two", "t", "-o", "json", "--coordinator", "unix:/x",
                                 "--timeout", "1m30s"}}) {
    const Parsed parsed = Parse(words);
    EXPECT_EQ(parsed.status, 7) << parsed.err;
    EXPECT_TRUE(parsed.seen.context.json());
    EXPECT_EQ(parsed.seen.context.coordinator, "unix:/x");
    EXPECT_EQ(parsed.seen.context.timeout_ms, 90'000);
  }
  EXPECT_EQ(Parse({"one", "t", "-o", "wide"}).seen.context.output, OutputFormat::kWide);
}

TEST(Parser, PassesWordsOfAnotherProgramOnUnread) {
  const Parsed parsed = Parse({"group", "program", "DIR", "--prompt", "-x", "a=b"});
  EXPECT_EQ(parsed.status, 7) << parsed.err;
  EXPECT_EQ(parsed.seen.rest, (std::vector<std::string>{"DIR", "--prompt", "-x", "a=b"}));
}

TEST(Parser, UsageErrorsAreTwo) {
  for (const std::vector<std::string>& words :
       {std::vector<std::string>{}, std::vector<std::string>{"none"},
        std::vector<std::string>{"group"}, std::vector<std::string>{"group", "none"},
        std::vector<std::string>{"one"}, std::vector<std::string>{"one", "t", "--none"},
        std::vector<std::string>{"one", "t", "-n", "x"},
        std::vector<std::string>{"one", "t", "-o", "xml"},
        std::vector<std::string>{"one", "t", "--timeout", "soon"}}) {
    const Parsed parsed = Parse(words);
    EXPECT_EQ(parsed.status, 2);
    EXPECT_EQ(parsed.err.rfind("heddle: ", 0), 0u) << parsed.err;
  }
  EXPECT_EQ(Parse({"--help"}).status, 0);
  EXPECT_EQ(Parse({"one", "--help"}).status, 0);
}

TEST(Parser, NamesTheVerbThatItDoesNotKnow) {
  EXPECT_EQ(Parse({"plan", "c.yaml"}).err,
            "heddle: usage: no verb `heddle plan` (see heddle --help)\n");
  EXPECT_EQ(Parse({"-o", "json", "group", "none"}).err,
            "heddle: usage: no verb `heddle group none` (see heddle group --help)\n");
  EXPECT_NE(Parse({}).err.find("subcommand is required"), std::string::npos);
  EXPECT_EQ(Parse({"one", "t", "--none"}).err.find("no verb"), std::string::npos);
}

TEST(Parser, ErrorsHaveTheirStatusAndEachLineItsPrefix) {
  const Parsed parsed = Parse({"group", "two", "t"}, InvalidArgument("a: b\nc: d"));
  EXPECT_EQ(parsed.status, 2);
  EXPECT_EQ(parsed.err, "heddle: group two: a: b\nheddle: group two: c: d\n");
  EXPECT_EQ(Parse({"one", "t"}, NotFound("x")).status, 3);
  EXPECT_EQ(Parse({"one", "t"}, Unavailable("x")).status, 4);
  EXPECT_EQ(Parse({"one", "t"}, DeadlineExceeded("x")).status, 4);
  EXPECT_EQ(Parse({"one", "t"}, PermissionDenied("x")).status, 5);
  EXPECT_EQ(Parse({"one", "t"}, Unauthenticated("x")).status, 5);
  EXPECT_EQ(Parse({"one", "t"}, Aborted("x")).status, 6);
  EXPECT_EQ(Parse({"one", "t"}, AlreadyExists("x")).status, 6);
  EXPECT_EQ(Parse({"one", "t"}, FailedPrecondition("x")).status, 6);
  EXPECT_EQ(Parse({"one", "t"}, DataLoss("x")).status, 1);
  EXPECT_EQ(Parse({"one", "t"}, Internal("x")).status, 1);
}

// The verbs of product.md section 4 that this version has, each with help.
TEST(Verbs, AreThoseOfTheContract) {
  std::set<std::string> names;
  for (const Verb& verb : AllVerbs()) {
    EXPECT_FALSE(verb.doc.empty());
    EXPECT_TRUE(verb.run) << verb.path[0];
    EXPECT_TRUE(
        names.insert(verb.path.size() == 2 ? verb.path[0] + " " + verb.path[1] : verb.path[0])
            .second);
    for (const Option& option : verb.options) {
      EXPECT_FALSE(option.doc.empty()) << verb.path.back() << " " << option.names;
    }
  }
  for (const char* name : {"up",
                           "down",
                           "run",
                           "submit",
                           "ps",
                           "status",
                           "describe",
                           "why",
                           "doctor",
                           "events",
                           "logs",
                           "metrics",
                           "wait",
                           "cancel",
                           "pause",
                           "resume",
                           "hold",
                           "release",
                           "preempt",
                           "ckpt ls",
                           "ckpt show",
                           "ckpt verify",
                           "ckpt pin",
                           "ckpt export",
                           "node ls",
                           "node describe",
                           "node cordon",
                           "node drain",
                           "node reopen",
                           "node forget",
                           "data prepare",
                           "data inspect",
                           "data sample",
                           "data encode",
                           "model show",
                           "model logits",
                           "model import",
                           "model export",
                           "generate",
                           "config show",
                           "config presets",
                           "config explain",
                           "completion",
                           "help",
                           "version"}) {
    EXPECT_EQ(names.count(name), 1u) << name;
  }
}

TEST(Help, IsAVerbToo) {
  const FakeCluster fake;
  const auto same = [&](std::vector<std::string> asked, std::vector<std::string> flag) {
    const Outcome outcome = fake.Run(asked, true);
    EXPECT_EQ(outcome.status, 0) << outcome.err;
    EXPECT_FALSE(outcome.out.empty());
    EXPECT_EQ(outcome.out, fake.Run(flag, true).out);
  };
  same({"help"}, {"--help"});
  same({"-o", "json", "help"}, {"--help"});
  same({"help", "logs"}, {"logs", "--help"});
  same({"help", "ckpt"}, {"ckpt", "--help"});
  same({"help", "model", "show"}, {"model", "show", "--help"});
  same({"help", "help"}, {"help", "--help"});
  EXPECT_NE(fake.Run({"help", "logs"}, true).out.find("--tail"), std::string::npos);
  EXPECT_NE(fake.Run({"help"}, true).out.find("heddle help VERB"), std::string::npos);
  const Outcome none = fake.Run({"help", "weave"}, true);
  EXPECT_EQ(none.status, 2);
  EXPECT_EQ(none.err, "heddle: help: no verb `heddle weave` (see heddle --help)\n");
  EXPECT_EQ(fake.Run({"help", "logs", "more"}, true).status, 2);
}

// The dashed options of the first match of `begin` up to the next `end` in heddle-model's source.
std::set<std::string> DeclaredOptions(const std::string& source, const std::string& begin,
                                      const std::string& end) {
  const size_t at = source.find(begin);
  EXPECT_NE(at, std::string::npos) << begin;
  const std::string part = source.substr(at, source.find(end, at + begin.size()) - at);
  static const std::regex option(R"re("(--[a-z-]+)")re");
  std::set<std::string> names;
  for (std::sregex_iterator it(part.begin(), part.end(), option), last; it != last; ++it) {
    names.insert((*it)[1]);
  }
  return names;
}

// A verb of heddle-model has the options that its help here says, no more and no less.
TEST(Help, ListsTheOptionsOfHeddleModel) {
  const char* root = std::getenv("HEDDLE_SOURCE_DIR");
  std::ifstream file(std::string(root == nullptr ? "." : root) + "/model/tool/main.cc");
  std::ostringstream text;
  text << file.rdbuf();
  std::set<std::string> common = DeclaredOptions(text.str(), "void AddSource(", "\n}\n");
  for (const char* internal : {"--record", "--root"}) {  // a checkpoint, already resolved
    EXPECT_EQ(common.erase(internal), 1u);
  }
  const FakeCluster fake;
  int verbs = 0;
  for (const Verb& verb : AllVerbs()) {
    if (verb.passed.empty()) continue;
    ++verbs;
    const std::string name = verb.path.back();
    const bool write = name == "import" || name == "export";
    std::set<std::string> declared =
        write ? DeclaredOptions(text.str(), "{\"export\", \"import\"}", "\n}\n")
              : DeclaredOptions(text.str(), "add_subcommand(\"" + name + "\"", "add_subcommand(");
    declared.insert(common.begin(), common.end());
    std::set<std::string> told;
    std::vector<std::string> words = verb.path;
    words.push_back("--help");
    const std::string help = fake.Run(words, true).out;
    for (const PassedOption& option : verb.passed) {
      EXPECT_NE(help.find("\n  " + option.names + " "), std::string::npos) << help;
      EXPECT_NE(help.find(" " + option.doc + "\n"), std::string::npos) << help;
      if (option.names[0] == '-') told.insert(option.names.substr(0, option.names.find(' ')));
    }
    EXPECT_EQ(told, declared) << name;
  }
  EXPECT_EQ(verbs, 6);
}

TEST(Version, NeedsNoCluster) {
  FakeCluster fake;
  const Outcome text = fake.Run({"version"}, /*bare=*/true);
  EXPECT_EQ(text.status, 0);
  EXPECT_EQ(text.out.rfind("heddle ", 0), 0u);
  EXPECT_EQ(fake.Run({"version", "-o", "json"}, true).out.rfind("{\"version\":\"", 0), 0u);
}

}  // namespace
}  // namespace heddle::cli
