// GPUs as a worker finds and hands them out, on a machine that has none: folders stand for /proc
// and /dev.
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>

#include "tests/support/status_matchers.h"
#include "tests/support/worker/temp_dir.h"
#include "worker/control/task_files.h"
#include "worker/daemon/booking_file.h"
#include "worker/daemon/capacity.h"
#include "worker/daemon/gpu_devices.h"
#include "worker/daemon/gpu_table.h"

namespace heddle::worker {
namespace {

using Names = std::vector<std::string>;
using Gpus = std::vector<std::vector<std::string>>;

std::string Uuid(int i) { return "GPU-" + std::string(8, static_cast<char>('a' + i)) + "-1234"; }

// `count` GPUs with device nodes, those of other containers without.
struct FakeKernel {
  explicit FakeKernel(int count) {
    std::filesystem::create_directories(dir.path() + "/dev");
    sources.proc = dir.path() + "/gpus";
    sources.dev = dir.path() + "/dev";
    // The kernel module numbers in an order of its own.
    for (int i = 0; i < count; ++i) Add(i, Uuid(i), count - 1 - i);
  }
  void Add(int i, const std::string& uuid, int minor) {
    const std::string folder = sources.proc + "/0000:0" + std::to_string(i) + ":00.0";
    std::filesystem::create_directories(folder);
    std::ofstream(folder + "/information")
        << "Model: \t\t NVIDIA H200\nIRQ:   \t\t 16\nGPU UUID: \t " << uuid
        << "\nBus Type: \t PCIe\nDevice Minor: \t " << minor << "\n";
    std::ofstream(sources.dev + "/nvidia" + std::to_string(minor)) << "";
  }
  Names Find(int wanted = -1) const {
    Names names;
    for (const GpuDevice& device : FindGpus(sources, wanted)) names.push_back(device.name);
    return names;
  }
  Names WithCuda(const std::string& list) {
    sources.cuda_visible = list;
    return Find();
  }
  Names WithNvidia(const std::string& list) {
    sources.nvidia_visible = list;
    return Find();
  }

  test::TempDir dir;
  GpuSources sources;
};

TEST(FindGpus, AreWhatTheKernelShowsInPciOrder) {
  EXPECT_EQ(FakeKernel(0).Find(), Names());
  const FakeKernel kernel(3);
  EXPECT_EQ(kernel.Find(), (Names{Uuid(0), Uuid(1), Uuid(2)}));
  const std::vector<GpuDevice> devices = FindGpus(kernel.sources, -1);
  EXPECT_EQ(devices[1].id, "0000:01:00.0");
  EXPECT_EQ(devices[1].model, "NVIDIA H200");
  Options options;
  EXPECT_EQ(MakeCapacity(options, devices).gpus(), 3u);
  EXPECT_EQ(MakeCapacity(options, devices).gpu_model(), "NVIDIA H200");
  EXPECT_EQ(MakeCapacity(options, {}).gpus(), 0u);
}

TEST(FindGpus, WithoutDeviceNodeOrUuid) {
  FakeKernel kernel(2);
  std::filesystem::remove(kernel.sources.dev + "/nvidia1");
  EXPECT_EQ(kernel.Find(), Names{Uuid(1)}) << "the other belongs to another container";
  kernel.Add(5, std::string("GPU-") + std::string(8, '?'), 5);
  EXPECT_EQ(kernel.Find(), (Names{Uuid(1), "1"})) << "never opened: its number";
}

TEST(FindGpus, FollowsCudaVisibleDevices) {
  FakeKernel kernel(4);
  EXPECT_EQ(kernel.WithCuda(""), Names());
  EXPECT_EQ(kernel.WithCuda("2, 0"), (Names{Uuid(2), Uuid(0)}));
  EXPECT_EQ(kernel.WithCuda("1,1"), Names{Uuid(1)});
  EXPECT_EQ(kernel.WithCuda("3,-1,0"), Names{Uuid(3)}) << "as CUDA, which stops there";
  EXPECT_EQ(kernel.WithCuda("9,0"), Names());
  EXPECT_EQ(kernel.WithCuda("GPU-bbbb," + Uuid(3)), (Names{Uuid(1), Uuid(3)}));
  EXPECT_EQ(kernel.WithCuda("GPU-zzzz"), Names());
  EXPECT_EQ(kernel.WithCuda("MIG-x,MIG-y"), (Names{"MIG-x", "MIG-y"}));
}

TEST(FindGpus, FollowsNvidiaVisibleDevices) {
  FakeKernel kernel(3);
  EXPECT_EQ(kernel.WithNvidia("all").size(), 3u);
  EXPECT_EQ(kernel.WithNvidia("void").size(), 3u) << "handed out by CDI";
  EXPECT_EQ(kernel.WithNvidia("none"), Names());
  EXPECT_EQ(kernel.WithNvidia(""), Names());
  EXPECT_EQ(kernel.WithNvidia("2," + Uuid(0)), (Names{Uuid(2), Uuid(0)}));
  EXPECT_EQ(kernel.WithNvidia("5,6,7").size(), 3u) << "numbers of the host; all granted are shown";
  kernel.sources.nvidia_visible = "1,2";
  EXPECT_EQ(kernel.WithCuda("1"), Names{Uuid(2)}) << "counted within the container";
}

TEST(FindGpus, TheFlagTakesSomeOrNoneAndIsBelievedWhereNothingIsSeen) {
  FakeKernel kernel(3);
  EXPECT_EQ(kernel.Find(2), (Names{Uuid(0), Uuid(1)}));
  EXPECT_EQ(kernel.Find(0), Names());
  EXPECT_EQ(kernel.Find(8).size(), 3u);
  FakeKernel blind(0);
  EXPECT_EQ(blind.Find(2), (Names{"0", "1"}));
  blind.sources.cuda_visible = "4,5,6";
  EXPECT_EQ(blind.Find(2), (Names{"4", "5"}));
  EXPECT_EQ(blind.Find(), Names());
}

struct Machine {
  test::TempDir dir;
  std::string Task(const std::string& name) {
    std::string path = dir.path() + "/" + name;
    mkdir(path.c_str(), 0700);
    return path;
  }
  GpuTable Daemon(const Names& names) {
    std::vector<GpuDevice> devices;
    for (const std::string& name : names) devices.push_back({"id-" + name, name, ""});
    return GpuTable(dir.path() + "/table", devices);
  }
};

TEST(GpuTable, EachRankGetsItsOwnAsTheCoordinatorChose) {
  Machine machine;
  GpuTable table = machine.Daemon({"a", "b", "c", "d"});
  ASSERT_OK_AND_ASSIGN(const Gpus given, table.Take(machine.Task("t"), 2, {0, 2}));
  EXPECT_EQ(given, (Gpus{{"a"}, {"c"}}));
  ASSERT_OK_AND_ASSIGN(const Gpus more, table.Take(machine.Task("u"), 1, {1, 3}));
  EXPECT_EQ(more, (Gpus{{"b", "d"}}));
  ASSERT_OK_AND_ASSIGN(const Gpus none, table.Take(machine.Task("v"), 3, {}));
  EXPECT_EQ(none, (Gpus{{}, {}, {}}));
  EXPECT_STATUS(table.Take(machine.Task("w"), 2, {0}).status(), StatusCode::kInvalidArgument, "");
}

TEST(GpuTable, NeverGivesOneTwice) {
  Machine machine;
  GpuTable one = machine.Daemon({"a", "b"});
  GpuTable two = machine.Daemon({"a", "b"});
  const std::string first = machine.Task("first");
  ASSERT_OK(one.Take(first, 1, {0}).status());
  // The coordinator believes that the second daemon has two of its own.
  ASSERT_OK_AND_ASSIGN(const Gpus other, two.Take(machine.Task("second"), 1, {0}));
  EXPECT_EQ(other, Gpus{{"b"}});
  EXPECT_STATUS(two.Take(machine.Task("third"), 1, {1}).status(), StatusCode::kResourceExhausted,
                "1 GPUs assigned, 0 of the 2 of this worker are free");
  one.Release(first);
  ASSERT_OK_AND_ASSIGN(const Gpus freed, two.Take(machine.Task("third"), 1, {1}));
  EXPECT_EQ(freed, Gpus{{"a"}});
  std::filesystem::remove_all(machine.Task("second"));
  ASSERT_OK_AND_ASSIGN(const Gpus deleted, one.Take(first, 1, {1}));
  EXPECT_EQ(deleted, Gpus{{"b"}});
  GpuTable broken("/no/such/folder/table", {{"a", "a", ""}});
  EXPECT_STATUS(broken.Take(first, 1, {0}).status(), StatusCode::kUnavailable, "cannot be opened");
}

TEST(GpuTable, ARestartedDaemonRemembersWhatItsTasksHold) {
  Machine machine;
  const std::string running = machine.Task("running");
  const std::string lost = machine.Task("lost");
  const pid_t shim = fork();
  if (shim == 0) {
    pause();
    _exit(0);
  }
  control::ShimIdentity identity;
  identity.pid = shim;
  identity.start_ticks = control::ProcessStartTicks(shim);
  std::ofstream(running + "/shim") << control::EncodeShimIdentity(identity);
  const pid_t daemon = fork();
  if (daemon == 0) {
    GpuTable table = machine.Daemon({"a", "b"});
    const bool ok = table.Take(running, 1, {0}).ok() && table.Take(lost, 1, {1}).ok();
    _exit(ok ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(daemon, &status, 0), daemon);
  ASSERT_EQ(status, 0);
  GpuTable again = machine.Daemon({"b", "a"});  // counts otherwise than before
  ASSERT_OK_AND_ASSIGN(const Gpus given, again.Take(machine.Task("new"), 1, {1}));
  EXPECT_EQ(given, Gpus{{"b"}}) << "the lost task had no shim";
  EXPECT_FALSE(again.Take(machine.Task("one more"), 1, {0}).ok());
  kill(shim, SIGKILL);
  waitpid(shim, &status, 0);
  EXPECT_OK(again.Take(machine.Task("one more"), 1, {0}).status());
}

// All daemons of a user share the file: one without room must not take from the others.
TEST(BookingFile, KeepsWhatWasBookedWhenItCannotBeWritten) {
  const test::TempDir dir;
  const std::string path = dir.path() + "/bookings";
  {
    BookingFile file(path);
    file.Add("GPU-a", dir.path());
    ASSERT_TRUE(file.Write());
  }
  rlimit before = {};
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit none = {.rlim_cur = 0, .rlim_max = before.rlim_max};
  signal(SIGXFSZ, SIG_IGN);
  {
    BookingFile file(path);
    file.Add("GPU-b", dir.path());
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &none), 0);
    EXPECT_FALSE(file.Write());
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  }
  signal(SIGXFSZ, SIG_DFL);
  BookingFile file(path);
  ASSERT_EQ(file.bookings().size(), 1u);
  EXPECT_EQ(file.bookings().front().part, "GPU-a");
}

}  // namespace
}  // namespace heddle::worker
