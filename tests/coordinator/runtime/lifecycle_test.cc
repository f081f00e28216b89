// The daemon as its operator meets it: owners, listeners, signals, what it weighs.
#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <iostream>
#include <thread>

#include "tests/coordinator/support/coordinator_process.h"
#include "tests/support/status_matchers.h"

namespace heddle::test {
namespace {

// Ends by itself with an error that contains `part`, exit status `code`.
void ExpectRefusal(CoordinatorProcess& process, int code, const std::string& part) {
  const int status = process.Wait();
  ASSERT_TRUE(WIFEXITED(status)) << process.Output();
  EXPECT_EQ(WEXITSTATUS(status), code) << process.Output();
  EXPECT_NE(process.Output().find(part), std::string::npos) << "no \"" << part << "\" in:\n"
                                                            << process.Output();
}

TEST(CoordinatorLifecycle, SecondOnTheSameStateIsRefusedAndNamesTheFirst) {
  CoordinatorProcess first;
  ASSERT_OK(first.Start());
  CoordinatorProcess second(std::filesystem::path(first.state()).parent_path());
  std::filesystem::create_symlink(first.state(), second.state());
  second.Spawn();
  ExpectRefusal(second, 1, "is in use by the coordinator with pid " + std::to_string(first.pid()));
}

TEST(CoordinatorLifecycle, PortInUseIsSaidClearly) {
  const int taken = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = {};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  ASSERT_EQ(bind(taken, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  ASSERT_EQ(listen(taken, 1), 0);
  socklen_t length = sizeof(address);
  ASSERT_EQ(getsockname(taken, reinterpret_cast<sockaddr*>(&address), &length), 0);
  CoordinatorProcess process;
  process.Spawn(
      {"--insecure-loopback", "--listen", "127.0.0.1:" + std::to_string(ntohs(address.sin_port))});
  ExpectRefusal(process, 1, "port is in use");
  EXPECT_FALSE(std::filesystem::exists(process.state())) << "nothing is left of a refused start";
  close(taken);
}

TEST(CoordinatorLifecycle, ASocketInUseIsLeftToItsOwner) {
  CoordinatorProcess first;
  ASSERT_OK(first.Start());
  CoordinatorProcess second;
  second.Spawn({"--listen", first.address()});
  ExpectRefusal(second, 1, "socket is in use");
  EXPECT_FALSE(std::filesystem::exists(second.state() + "/mark")) << "its store was opened";
  grpc::ClientContext context;
  v1::StatusReply reply;
  EXPECT_TRUE(first.Cluster()->Status(&context, {}, &reply).ok()) << "the first one answers still";
}

TEST(CoordinatorLifecycle, AStaleSocketIsReplacedAndAnotherFileIsNot) {
  CoordinatorProcess process;
  ASSERT_OK(process.Start());
  process.End(SIGKILL);
  ASSERT_TRUE(std::filesystem::exists(process.state() + "/coordinator.sock"));
  ASSERT_OK(process.Start());
  CoordinatorProcess other;
  const std::string path = std::filesystem::path(other.state()).parent_path() / "precious";
  std::ofstream(path) << "text";
  other.Spawn({"--listen", "unix:" + path});
  ExpectRefusal(other, 1, "exists and is no socket");
  EXPECT_TRUE(std::filesystem::exists(path));
}

TEST(CoordinatorLifecycle, OpenListenersNeedTls) {
  CoordinatorProcess process;
  process.Spawn({"--listen", "0.0.0.0:0"});
  ExpectRefusal(process, 2, "is not loopback: give --tls-ca, --tls-cert and --tls-key");
  EXPECT_FALSE(std::filesystem::exists(process.state())) << "nothing is left of a refused start";
  CoordinatorProcess loopback;
  loopback.Spawn({"--listen", "127.0.0.1:0"});
  ExpectRefusal(loopback, 2, "--insecure-loopback");
}

TEST(CoordinatorLifecycle, AHigherTermInTheCheckpointRootStopsAnOldCopy) {
  CoordinatorProcess process;
  ASSERT_OK(process.Start());
  ASSERT_EQ(process.End(SIGTERM), 0);
  std::filesystem::create_directory(process.state() + "/checkpoints/TERM/77");
  process.Spawn();
  ExpectRefusal(process, 1, "has seen term 77");
}

TEST(CoordinatorLifecycle, SigtermFlushesAndExitsCleanly) {
  CoordinatorProcess process;
  ASSERT_OK(process.Start());
  auto jobs = process.Jobs();
  const StatusOr<std::string> id = Submit(*jobs, CommandJob("kept"));
  ASSERT_OK(id);
  ASSERT_EQ(kill(process.pid(), SIGHUP), 0);
  ASSERT_OK(GetJob(*jobs, *id)) << "SIGHUP must not end it";
  const int status = process.End(SIGTERM);
  EXPECT_TRUE(WIFEXITED(status) && WEXITSTATUS(status) == 0) << status << process.Output();
  ASSERT_OK(process.Start());
  EXPECT_EQ(GetJob(*process.Jobs(), *id)->name(), "kept");
}

TEST(CoordinatorLifecycle, SurvivesClosedStandardStreams) {
  CoordinatorProcess process;
  const int saved[3] = {dup(0), dup(1), dup(2)};
  close(0);
  process.Spawn();  // its 1 and 2 are files; 0 is closed
  dup2(saved[0], 0);
  for (const int fd : saved) {
    close(fd);
  }
  auto jobs = process.Jobs();
  StatusOr<std::string> id = Unavailable("");
  for (int i = 0; i < 200 && !id.ok(); ++i) {
    id = Submit(*jobs, CommandJob("quiet"));
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
  }
  EXPECT_OK(id) << process.Output();
}

TEST(CoordinatorLifecycle, WeighsLittleWhenIdle) {
  CoordinatorProcess process;
  ASSERT_OK(process.Start());
  const int64_t kib = process.ResidentKib();
  std::cout << "{\"test\":\"coordinator_idle_rss\",\"kib\":" << kib << "}\n";
  // Target 40 MB; sanitizers and other allocators need room.
  EXPECT_LT(kib, 80 * 1024);
}

TEST(CoordinatorLifecycle, VerifyReplaysTheJournal) {
  CoordinatorProcess process;
  ASSERT_OK(process.Start());
  auto jobs = process.Jobs();
  for (int i = 0; i < 20; ++i) {
    ASSERT_OK(Submit(*jobs, CommandJob("job")));
  }
  ASSERT_EQ(process.End(SIGKILL), SIGKILL);
  process.Spawn({"--verify"});
  ExpectRefusal(process, 0, "replays to the records");
}

}  // namespace
}  // namespace heddle::test
