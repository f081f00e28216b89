#include "worker/daemon/launch_plan.h"

#include <gtest/gtest.h>

#include <sys/mount.h>
#include <unistd.h>

#include <algorithm>

#include "tests/support/status_matchers.h"
#include "tests/support/worker/temp_dir.h"

namespace heddle::worker {
namespace {

v1::TaskAssignment Assignment() {
  v1::TaskAssignment assignment;
  assignment.set_job(77);
  assignment.set_attempt(2);
  assignment.set_fence(99);
  assignment.set_task(1);
  assignment.add_ranks(4);
  assignment.add_ranks(5);
  assignment.set_world_size(8);
  assignment.set_cpus_per_rank(2.5);
  assignment.set_memory_per_rank(1000);
  assignment.set_attempt_dir("j/f99");
  return assignment;
}

bool Has(const std::vector<std::string>& env, const std::string& variable) {
  return std::find(env.begin(), env.end(), variable) != env.end();
}

TEST(LaunchPlan, TellsEachRankItsPlace) {
  const test::TempDir dir;
  StatusOr<TaskFolder> folder = TaskFolder::Create(dir.path(), Assignment(), {"/root", "i"}, 1);
  ASSERT_OK(folder);
  setenv("SLURM_JOB_ID", "1", 1);
  LaunchInput input;
  input.trainer = "/opt/heddle-trainer";
  input.cpus = {{0, 1}, {2, 3}};
  const control::LaunchFile launch = MakeLaunch(*folder, input);
  ASSERT_EQ(launch.ranks.size(), 2u);
  EXPECT_TRUE(launch.control);
  EXPECT_EQ(launch.memory_bytes, 2000u);
  const control::RankLaunch& rank = launch.ranks[1];
  EXPECT_EQ(rank.argv, std::vector<std::string>{"/opt/heddle-trainer"});
  EXPECT_EQ(rank.cpus, (std::vector<uint32_t>{2, 3}));
  for (const char* variable :
       {"HEDDLE_RANK=5", "HEDDLE_LOCAL_RANK=1", "HEDDLE_WORLD_SIZE=8", "HEDDLE_ATTEMPT=2",
        "HEDDLE_FENCE=99", "OMP_NUM_THREADS=2", "HEDDLE_CONTROL=fd:3", "HEDDLE_RESTARTS=0"}) {
    EXPECT_TRUE(Has(rank.env, variable)) << variable;
  }
  EXPECT_TRUE(Has(rank.env, "HEDDLE_TASK_DIR=" + folder->path()));
  EXPECT_FALSE(Has(rank.env, "SLURM_JOB_ID=1"));
  const v1::RankSpec spec = MakeSpec(*folder, 1, "10.0.0.1", {2, 3});
  EXPECT_EQ(spec.rank(), 5u);
  EXPECT_EQ(spec.local_rank(), 1u);
  EXPECT_EQ(spec.threads(), 2u);
  EXPECT_EQ(spec.page(), folder->PagePath(5));
  EXPECT_EQ(spec.checkpoint_root(), "/root");
  EXPECT_EQ(spec.data_address(), "10.0.0.1");
}

TEST(LaunchPlan, EachRankSeesItsGpusAndNoOthers) {
  const test::TempDir dir;
  v1::TaskAssignment assignment = Assignment();
  (*assignment.mutable_config()->mutable_command()->mutable_env())["CUDA_VISIBLE_DEVICES"] = "0,1";
  StatusOr<TaskFolder> folder = TaskFolder::Create(dir.path(), assignment, {"/root", "i"}, 1);
  ASSERT_OK(folder);
  setenv("CUDA_VISIBLE_DEVICES", "7", 1);  // the daemon's own
  LaunchInput input;
  input.gpus = {{"GPU-a", "GPU-b"}, {"GPU-c"}};
  const control::LaunchFile launch = MakeLaunch(*folder, input);
  EXPECT_TRUE(Has(launch.ranks[0].env, "CUDA_VISIBLE_DEVICES=GPU-a,GPU-b"));
  EXPECT_TRUE(Has(launch.ranks[1].env, "CUDA_VISIBLE_DEVICES=GPU-c"));
  EXPECT_TRUE(Has(launch.ranks[1].env, "CUDA_DEVICE_ORDER=PCI_BUS_ID"));
  for (const control::RankLaunch& rank : MakeLaunch(*folder, {}).ranks) {
    EXPECT_TRUE(Has(rank.env, "CUDA_VISIBLE_DEVICES=")) << "a CPU job touches none";
    EXPECT_EQ(std::count_if(
                  rank.env.begin(), rank.env.end(),
                  [](const std::string& one) { return one.starts_with("CUDA_VISIBLE_DEVICES="); }),
              1);
  }
  unsetenv("CUDA_VISIBLE_DEVICES");
}

TEST(LaunchPlan, CommandsGetTheirOwnProgramAndNoLink) {
  const test::TempDir dir;
  v1::TaskAssignment assignment = Assignment();
  assignment.mutable_config()->set_kind(v1::RunConfig::KIND_COMMAND);
  assignment.mutable_config()->mutable_command()->add_argv("prog");
  assignment.mutable_config()->mutable_command()->add_argv("$HOME");
  (*assignment.mutable_config()->mutable_command()->mutable_env())["OMP_NUM_THREADS"] = "9";
  StatusOr<TaskFolder> folder = TaskFolder::Create(dir.path(), assignment, {"/root", "i"}, 1);
  ASSERT_OK(folder);
  const control::LaunchFile launch = MakeLaunch(*folder, {});
  EXPECT_FALSE(launch.control);
  EXPECT_EQ(launch.ranks[0].argv, (std::vector<std::string>{"prog", "$HOME"}));
  EXPECT_TRUE(Has(launch.ranks[0].env, "OMP_NUM_THREADS=9"));
  EXPECT_FALSE(Has(launch.ranks[0].env, "OMP_NUM_THREADS=2")) << "the user's value wins";
  EXPECT_FALSE(Has(launch.ranks[0].env, "HEDDLE_CONTROL=fd:3"));
}

TEST(TaskFolder, SaysThatTheDiskIsFull) {
  const test::TempDir dir;
  if (mount("tmpfs", dir.path().c_str(), "tmpfs", 0, "size=64k") != 0) {
    GTEST_SKIP() << "NOT TESTED: a full disk needs the right to mount a tmpfs";
  }
  const Status made = TaskFolder::Create(dir.path(), Assignment(), {"/root", "i"}, 1).status();
  umount2(dir.path().c_str(), MNT_DETACH);
  EXPECT_STATUS(made, StatusCode::kResourceExhausted, "is full (ENOSPC); free some space");
}

TEST(TaskFolder, IsFoundAgainAndRefusesASecondCreation) {
  const test::TempDir dir;
  ASSERT_OK(TaskFolder::Create(dir.path(), Assignment(), {"/root", "instance"}, 1).status());
  EXPECT_STATUS(TaskFolder::Create(dir.path(), Assignment(), {}, 1), StatusCode::kAlreadyExists,
                "");
  const std::vector<std::string> listed = TaskFolder::List(dir.path());
  ASSERT_EQ(listed.size(), 1u);
  StatusOr<TaskFolder> folder = TaskFolder::Open(listed[0]);
  ASSERT_OK(folder);
  EXPECT_EQ(folder->key(), (TaskKey{99, 1}));
  EXPECT_EQ(folder->checkpoint_root(), "/root");
  EXPECT_EQ(folder->instance(), "instance");
  EXPECT_FALSE(folder->Shim().has_value());
  EXPECT_TRUE(folder->ExitFrames().empty());
  EXPECT_EQ(folder->LoadSeq(), 0u);
  folder->StoreSeq(123'456);
  EXPECT_EQ(folder->LoadSeq(), 123'456u);
  folder->StoreSeq(123'457);
  EXPECT_EQ(folder->LoadSeq(), 123'457u);
  EXPECT_FALSE(folder->IsForgotten());
  folder->MarkForgotten();
  EXPECT_TRUE(folder->IsForgotten());
  TaskFolder::Remove(listed[0]);
  EXPECT_TRUE(TaskFolder::List(dir.path()).empty());
}

TEST(TaskFolder, HalfMadeFoldersAreErrorsNotCrashes) {
  const test::TempDir dir;
  for (const char* file : {"/spec", "/contact", "/page-4", "/instance"}) {
    StatusOr<TaskFolder> folder = TaskFolder::Create(dir.path(), Assignment(), {"/root", "i"}, 1);
    ASSERT_OK(folder);
    ASSERT_EQ(truncate((folder->path() + file).c_str(), 0), 0);
    const StatusOr<TaskFolder> again = TaskFolder::Open(folder->path());
    if (std::string(file) != "/instance") {
      EXPECT_FALSE(again.ok()) << file;
    }
    TaskFolder::Remove(folder->path());
  }
}

}  // namespace
}  // namespace heddle::worker
