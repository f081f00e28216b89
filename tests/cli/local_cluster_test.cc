// `heddle up` with the real daemons: what it does to folders, what workers offer, what it says
// about a coordinator that nobody can reach.
#include "cli/commands/local_cluster.h"

#include <gtest/gtest.h>
#include <sched.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/stat.h>

#include <chrono>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

#include "cli/commands/client.h"
#include "cli/commands/verb.h"
#include "tests/support/status_matchers.h"
#include "tests/support/worker/temp_dir.h"

namespace heddle::cli {
namespace {

class LocalCluster : public ::testing::Test {
 protected:
  LocalCluster() {
    const char* bin = getenv("HEDDLE_BIN");
    options_.state = dir_.path() + "/state";
    options_.program_dir = std::filesystem::absolute(bin == nullptr ? "build/bin" : bin);
    options_.workers = 1;
  }
  ~LocalCluster() override { (void)StopLocalCluster(options_); }

  static mode_t Mode(const std::string& path) {
    struct stat info = {};
    EXPECT_EQ(stat(path.c_str(), &info), 0);
    return info.st_mode & 07777;
  }

  const test::TempDir dir_;
  LocalClusterOptions options_;
};

TEST_F(LocalCluster, LeavesTheModeOfAnExistingFolderAlone) {
  options_.program_dir = "/nowhere";  // folders come first
  ASSERT_EQ(mkdir(options_.state.c_str(), 0750), 0);
  ASSERT_EQ(chmod(options_.state.c_str(), 0751), 0);
  EXPECT_STATUS(StartLocalCluster(options_), StatusCode::kNotFound, "cannot run");
  EXPECT_EQ(Mode(options_.state), 0751u);
  options_.state += "/new";
  EXPECT_STATUS(StartLocalCluster(options_), StatusCode::kNotFound, "cannot run");
  EXPECT_EQ(Mode(options_.state), 0700u);
}

TEST_F(LocalCluster, RefusesAFolderThatOthersCanWriteTo) {
  ASSERT_EQ(mkdir(options_.state.c_str(), 0700), 0);
  ASSERT_EQ(chmod(options_.state.c_str(), 0777), 0);
  EXPECT_STATUS(StartLocalCluster(options_), StatusCode::kFailedPrecondition, "chmod go-w");
  EXPECT_EQ(Mode(options_.state), 0777u);
  EXPECT_TRUE(std::filesystem::is_empty(options_.state));
}

TEST_F(LocalCluster, RefusesAPlainFileAndChangesNothing) {
  std::ofstream(options_.state) << "precious";
  ASSERT_EQ(chmod(options_.state.c_str(), 0644), 0);
  EXPECT_STATUS(StartLocalCluster(options_), StatusCode::kInvalidArgument, "is not a folder");
  EXPECT_EQ(Mode(options_.state), 0644u);
}

TEST_F(LocalCluster, WorkersOfferWhatThisProcessWasGranted) {
  cpu_set_t old;
  ASSERT_EQ(sched_getaffinity(0, sizeof(old), &old), 0);
  int first = 0;
  while (!CPU_ISSET(first, &old)) {
    ++first;
  }
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(first, &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);  // as `taskset -c N heddle up`
  const StatusOr<RunningCluster> cluster = StartLocalCluster(options_);
  ASSERT_EQ(sched_setaffinity(0, sizeof(old), &old), 0);
  ASSERT_OK(cluster);
  EXPECT_EQ(cluster->workers, 1);
  CommandContext context;
  context.coordinator = cluster->coordinator;
  const StatusOr<std::unique_ptr<Client>> client = Client::Open(context);
  ASSERT_OK(client);
  const StatusOr<v1::NodeList> nodes = (*client)->Nodes();
  ASSERT_OK(nodes);
  ASSERT_EQ(nodes->nodes_size(), 1);
  EXPECT_EQ(nodes->nodes(0).cpus(), 1);
}

TEST_F(LocalCluster, AnotherNumberOfWorkersThanRunIsRefused) {
  options_.workers = 2;
  ASSERT_OK(StartLocalCluster(options_));
  for (const int64_t other : {1, 3}) {
    options_.workers = other;
    EXPECT_STATUS(StartLocalCluster(options_), StatusCode::kFailedPrecondition,
                  Str("is of 2 workers, not ", other, ": for another number, heddle down first"));
    EXPECT_EQ(FindDaemons("heddle-worker", options_.state + "/worker-2").size(), 1u);
    EXPECT_TRUE(FindDaemons("heddle-worker", options_.state + "/worker-3").empty());
  }
}

TEST_F(LocalCluster, WithoutANumberTheWorkersThatBelongToItAreThere) {
  options_.workers = 3;
  ASSERT_OK(StartLocalCluster(options_));
  const std::vector<int> third = FindDaemons("heddle-worker", options_.state + "/worker-3");
  ASSERT_EQ(third.size(), 1u);
  kill(third[0], SIGKILL);
  while (kill(third[0], 0) == 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  options_.workers = 0;
  const StatusOr<RunningCluster> again = StartLocalCluster(options_);
  ASSERT_OK(again);
  EXPECT_EQ(again->workers, 3);
  EXPECT_EQ(FindDaemons("heddle-worker", options_.state + "/worker-3").size(), 1u);
  ASSERT_OK(StopLocalCluster(options_));
  const StatusOr<RunningCluster> anew = StartLocalCluster(options_);
  ASSERT_OK(anew);
  EXPECT_EQ(anew->workers, kLocalWorkers) << "nothing ran";
}

TEST_F(LocalCluster, PutsALongLogOfADaemonAside) {
  std::filesystem::create_directory(options_.state);
  const std::string log = options_.state + "/coordinator.log";
  const std::string short_log = options_.state + "/worker-1.log";
  std::ofstream(log) << "old";
  std::ofstream(log + ".1") << "older";
  std::ofstream(short_log) << "short";
  std::filesystem::resize_file(log, (64 << 20) + 1);
  ASSERT_OK(StartLocalCluster(options_));
  EXPECT_LT(std::filesystem::file_size(log), 64u << 10);
  EXPECT_EQ(std::filesystem::file_size(log + ".1"), (64u << 20) + 1);
  EXPECT_FALSE(std::filesystem::exists(short_log + ".1"));
  std::string first;
  std::ifstream(short_log) >> first;
  EXPECT_EQ(first.substr(0, 5), "short");
}

TEST_F(LocalCluster, SaysThatTheSocketOfALivingCoordinatorIsGone) {
  ASSERT_OK(StartLocalCluster(options_));
  ASSERT_TRUE(std::filesystem::remove(options_.state + "/coordinator.sock"));
  options_.start_timeout_ms = 500;
  EXPECT_STATUS(StartLocalCluster(options_), StatusCode::kFailedPrecondition,
                "coordinator.sock is gone");
}

}  // namespace
}  // namespace heddle::cli
