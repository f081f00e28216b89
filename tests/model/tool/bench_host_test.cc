// bench-host: every rate is measured, what is kept can be read, and what goes wrong is said.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <spawn.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "model/tool/disk_bench.h"
#include "model/tool/host_bench.h"

namespace heddle::tool {
namespace {

namespace fs = std::filesystem;

constexpr int64_t kMiB = int64_t{1} << 20;

class BenchHost : public testing::Test {
 protected:
  BenchHost() {
    std::string name = fs::temp_directory_path() / "heddle-bench-XXXXXX";
    path_ = mkdtemp(name.data());
  }
  ~BenchHost() override { fs::remove_all(path_); }

  // Returns the exit status; what is printed goes to the file "out".
  int Spawn(std::vector<std::string> words) const {
    std::vector<char*> argv;
    for (std::string& word : words) argv.push_back(word.data());
    argv.push_back(nullptr);
    posix_spawn_file_actions_t actions;
    posix_spawn_file_actions_init(&actions);
    const std::string out = path_ / "out";
    posix_spawn_file_actions_addopen(&actions, 1, out.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0600);
    pid_t child = 0;
    EXPECT_EQ(posix_spawn(&child, argv[0], &actions, nullptr, argv.data(), environ), 0);
    posix_spawn_file_actions_destroy(&actions);
    int status = 0;
    EXPECT_EQ(waitpid(child, &status, 0), child);
    return WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  }

  fs::path path_;
};

TEST_F(BenchHost, MeasuresEveryRateAndLeavesNothing) {
  const StatusOr<HostBench> bench =
      MeasureHost(path_, {.matrix = 256, .elements = 1 << 20, .file_bytes = 64 * kMiB});
  ASSERT_TRUE(bench.ok()) << bench.status();
  EXPECT_GT(bench->threads, 0);
  EXPECT_FALSE(bench->host.empty());
  EXPECT_FALSE(bench->cpu.empty());
  EXPECT_GT(bench->measured_at_ms, 1'700'000'000'000);
  for (const double rate :
       {bench->bf16_flops, bench->fp32_flops, bench->dram_bytes, bench->dram_thread_bytes,
        bench->update_bytes, bench->disk_read_bytes, bench->disk_write_bytes}) {
    EXPECT_GT(rate, 1e6);
    EXPECT_LT(rate, 1e16);
  }
  EXPECT_NEAR(bench->update_ns * bench->update_bytes, 30e9, 1);
  EXPECT_EQ(bench->exchange_bytes > 0, bench->threads > 1);
  EXPECT_TRUE(fs::is_empty(path_)) << "the file has no name while it is there";
}

TEST_F(BenchHost, SaysWhichFolderIsMissing) {
  const StatusOr<HostBench> none = MeasureHost(path_ / "none", {.matrix = 16, .elements = 64});
  EXPECT_EQ(none.status().code(), StatusCode::kNotFound);
  EXPECT_NE(Message(none.status()).find("none: no such folder"), std::string::npos);
  std::ofstream(path_ / "file") << "text";
  EXPECT_EQ(MeasureDisk(path_ / "file", kMiB).status().code(), StatusCode::kNotFound);
}

// A disk that takes 16 MiB: the limit of a file's size stands in for its end.
TEST_F(BenchHost, ADiskThatIsFullIsAnError) {
  rlimit before = {};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = signal(SIGXFSZ, SIG_IGN);
  rlimit small = before;
  small.rlim_cur = 16 * kMiB;
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &small), 0);
  const StatusOr<DiskBench> bench = MeasureDisk(path_, 128 * kMiB);
  setrlimit(RLIMIT_FSIZE, &before);
  signal(SIGXFSZ, handler);
  ASSERT_FALSE(bench.ok());
  EXPECT_NE(Message(bench.status()).find("cannot write in"), std::string::npos) << bench.status();
  EXPECT_TRUE(fs::is_empty(path_));
}

// As `heddle plan` finds it.
TEST_F(BenchHost, TheProgramKeepsWhatItPrints) {
  const char* bin = std::getenv("HEDDLE_BIN");
  ASSERT_NE(bin, nullptr) << "run it with ctest";
  const std::string kept = path_ / "home" / "host_bench.json";
  const std::string program = std::string(bin) + "/heddle-model";
  ASSERT_EQ(Spawn({program, "bench-host", "--dir", path_, "--out", kept, "-o", "json"}), 0);
  const nlohmann::json json = nlohmann::json::parse(std::ifstream(kept));
  EXPECT_EQ(json, nlohmann::json::parse(std::ifstream(path_ / "out")));
  EXPECT_EQ(json["version"], 1);
  EXPECT_LT(json["seconds"], 60) << "20 on a quiet machine";
  EXPECT_EQ(Spawn({program, "bench-host", "--dir", path_ / "none"}), 3);
}

}  // namespace
}  // namespace heddle::tool
