// YAML bombs (reliability T17): each is refused within 50 ms of CPU and 64 MiB of memory, measured
// in a child process.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "base/settings/settings.h"
#include "base/settings/yaml_reader.h"
#include "tests/base/settings/config_files.h"
#include "tests/support/status_matchers.h"

namespace heddle::settings {
namespace {

// Sanitizers cost an order of magnitude of both.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr int kSanitizerFactor = 12;
#else
constexpr int kSanitizerFactor = 1;
#endif
constexpr double kSecondsMax = 0.050 * kSanitizerFactor;
constexpr int64_t kBytesMax = int64_t{kSanitizerFactor} * (64 << 20);

std::string Repeat(const std::string& text, size_t count) {
  std::string out;
  out.reserve(text.size() * count);
  for (size_t i = 0; i < count; ++i) {
    out += text;
  }
  return out;
}

std::string BillionLaughs() {
  std::string out = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 10; ++i) {
    out +=
        Str("a", i, ": &a", i, " [") + Repeat(Str("*a", i - 1, ", "), 9) + Str("*a", i - 1, "]\n");
  }
  return out;
}

struct Bomb {
  const char* name;
  std::string text;
  const char* error;
};

std::vector<Bomb> Bombs() {
  std::string keys;
  for (int i = 0; i < 1'000'000 && keys.size() < (1 << 20) - 20; ++i) {
    keys += Str("k", i, ": 1\n");
  }
  std::string indented;
  for (int i = 0; i < 700; ++i) {
    indented += std::string(static_cast<size_t>(i), ' ') + "a:\n";
  }
  return {
      {"1 MiB and a byte", std::string((1 << 20) + 1, 'a'), "at most 1048576"},
      {"brackets", std::string(1 << 20, '['), "nested deeper than 64"},
      {"braces", std::string(1 << 20, '{'), "nested deeper than 64"},
      {"brackets behind a quote", "a: don't\nb: " + std::string(1000000, '['), "deeper than 64"},
      {"brackets in maps", Repeat("{a: [", 100000), "deeper than 64"},
      {"dashes", Repeat("- ", 500000), ""},
      {"question marks", Repeat("? ", 500000), ""},
      {"deep by indentation", indented, "deeper than 64"},
      {"billion laughs", BillionLaughs(), "more than 100000 values"},
      {"self alias", "a: &a [*a]\n", "alias"},
      {"nested anchors", Repeat("&a [", 60) + Repeat("x, ", 5000) + Repeat("]", 60), ""},
      {"1e6 keys", keys, "more than 100000 values"},
      {"1e6 items", "a: [" + Repeat("1,", 500000) + "]", "more than 100000 values"},
      {"duplicate keys", "a: 1\nb: 2\na: 3\n", "3:1: a: duplicate key"},
      {"duplicate in flow", "a: {b: 1, b: 1}\n", "1:11: b: duplicate key"},
      {"invalid UTF-8", "a: \xC3\x28\n", "1:4: invalid UTF-8"},
      {"overlong UTF-8", "a: \xC0\x80\n", "invalid UTF-8"},
      {"surrogate", "a: \xED\xA0\x80\n", "invalid UTF-8"},
      {"NUL", std::string("a: b\0c\n", 7), "a control character"},
      {"escape", "a: \x1B[31m\n", "a control character"},
      {"tag", "a: !!python/object:os.system x\n", "tag"},
      {"merge key", "a: &a {b: 1}\nc:\n  <<: *a\n", "merge keys"},
      {"second document", "a: 1\n---\nb: 2\n", "second document"},
      {"list as key", "? [a]\n: b\n", "key must be plain text"},
      {"unknown anchor", "a: *b\n", ""},
      {"unclosed quote", "a: \"b\n", ""},
      {"tab", "a:\n\t- b\n", ""},
      {"anchors", Repeat("&a ", 300000), "anchors and aliases"},
      {"stars", "a: " + std::string(1000000, '*'), "anchors and aliases"},
      {"colons", std::string(1000000, ':'), ""},
      {"percent", Repeat("%\n", 400000), "more than 100000"},
      {"quotes", "a: " + Repeat("\"\"", 400000), "more than 100000 quotes"},
      {"backslashes", "a: \"" + Repeat("\\\\", 500000), "more than 100000 quotes"},
      {"not a number", "training: {learning_rate: .nan}\n", "needs a number"},
      {"huge number", "training: {learning_rate: 1e999999999}\n", "needs a finite number"},
      {"huge integer", "training: {seed: " + std::string(100000, '9') + "}\n", "too large"},
  };
}

double CpuSeconds() {
  timespec now = {};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

int64_t PeakBytes() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} << 10;
}

// 0: refused in time and memory; otherwise which limit broke.
int Defuse(const std::string& path, const LoadOptions& options, const std::string& error) {
  const int64_t before = PeakBytes();
  const double start = CpuSeconds();
  const Status status = Load(path, {}, options).status();
  const double seconds = CpuSeconds() - start;
  if (status.ok() || status.code() != StatusCode::kInvalidArgument) {
    return 1;
  }
  if (Message(status).find(error) == std::string::npos) {
    fprintf(stderr, "says: %s\n", Message(status).substr(0, 300).c_str());
    return 2;
  }
  if (PeakBytes() - before > kBytesMax) {
    fprintf(stderr, "memory: %lld\n", static_cast<long long>(PeakBytes() - before));
    return 3;
  }
  if (seconds > kSecondsMax) {
    fprintf(stderr, "cpu: %.3f s\n", seconds);
    return 4;
  }
  return Message(status).size() > 64 << 10 ? 5 : 0;
}

TEST(Bombs, EachIsRefusedInTimeAndMemory) {
  const ConfigFiles files;
  for (const Bomb& bomb : Bombs()) {
    const std::string path = files.Write("bomb.yaml", bomb.text);
    const pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
      _exit(Defuse(path, files.options, bomb.error));
    }
    int status = 0;
    ASSERT_EQ(waitpid(child, &status, 0), child);
    ASSERT_TRUE(WIFEXITED(status)) << bomb.name << ": killed by " << WTERMSIG(status);
    EXPECT_EQ(WEXITSTATUS(status), 0)
        << bomb.name << " (1 accepted, 2 other message, 3 memory, 4 time, 5 long message)";
  }
}

TEST(ReadYaml, KeepsPositionsQuotesAndAliases) {
  ASSERT_OK_AND_ASSIGN(const Value root, ReadYaml("a: &x [1, '2']\nb: *x\n\"c\": ~\n", "t"));
  ASSERT_EQ(root.members.size(), 3u);
  EXPECT_EQ(root.members[1].second.items.size(), 2u);
  EXPECT_EQ(root.members[1].second.line, 2);
  EXPECT_EQ(root.members[1].second.column, 4);
  EXPECT_TRUE(root.members[0].second.items[1].quoted);
  EXPECT_FALSE(root.members[0].second.items[0].quoted);
  EXPECT_EQ(root.members[2].second.kind, Value::Kind::kNull);
  EXPECT_TRUE(SameContent(root.members[0].second, root.members[1].second));
}

TEST(ReadYaml, AnEmptyTextIsAnEmptyMap) {
  for (const char* text : {"", "\n", "# only a comment\n", "---\n"}) {
    ASSERT_OK_AND_ASSIGN(const Value root, ReadYaml(text, "t"));
    EXPECT_EQ(root.kind, Value::Kind::kMap) << text;
  }
}

TEST(ReadYaml, NestsUpToTheLimit) {
  const auto nested = [](int depth) {
    return "a: " + std::string(static_cast<size_t>(depth), '[') +
           std::string(static_cast<size_t>(depth), ']');
  };
  EXPECT_OK(ReadYaml(nested(kDepthMax - 1), "t"));
  EXPECT_STATUS(ReadYaml(nested(kDepthMax), "t"), StatusCode::kInvalidArgument, "deeper");
  // An alias brings its own depth.
  std::string text = "a: &a " + std::string(40, '[') + std::string(40, ']') + "\n";
  text += "b: " + std::string(40, '[') + "*a" + std::string(40, ']') + "\n";
  EXPECT_STATUS(ReadYaml(text, "t"), StatusCode::kInvalidArgument, "deeper");
}

}  // namespace
}  // namespace heddle::settings
