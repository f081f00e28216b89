// The completion scripts, run by the shells where these are installed.
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <fstream>

#include "tests/cli/fake_cluster.h"

namespace heddle::cli {
namespace {

// Standard output of `bash SCRIPT`.
std::string RunBash(const std::string& script) {
  int ends[2] = {-1, -1};
  if (pipe(ends) != 0) {
    return "no pipe";
  }
  const pid_t child = fork();
  if (child == 0) {
    dup2(ends[1], STDOUT_FILENO);
    close(ends[0]);
    execlp("bash", "bash", script.c_str(), static_cast<char*>(nullptr));
    _exit(127);
  }
  close(ends[1]);
  std::string out;
  char buffer[4096];
  ssize_t got = 0;
  while ((got = read(ends[0], buffer, sizeof(buffer))) > 0) {
    out.append(buffer, static_cast<size_t>(got));
  }
  close(ends[0]);
  int status = 0;
  waitpid(child, &status, 0);
  return out;
}

// What bash offers for a line whose last word is unfinished.
std::string Offered(const FakeCluster& fake, const std::string& words, int count) {
  const std::string script = fake.folder() + "/complete.bash";
  std::ofstream(script) << fake.Run({"completion", "bash"}, true).out << "COMP_WORDS=(" << words
                        << ")\nCOMP_CWORD=" << count << "\n_heddle\necho \"${COMPREPLY[*]}\"\n";
  return RunBash(script);
}

TEST(Completion, BashOffersVerbsOptionsAndKeys) {
  const FakeCluster fake;
  EXPECT_EQ(Offered(fake, "heddle subm", 1), "submit\n");
  EXPECT_EQ(Offered(fake, "heddle ckpt ve", 2), "verify\n");
  EXPECT_EQ(Offered(fake, "heddle logs --ta", 2), "--tail\n");
  EXPECT_EQ(Offered(fake, "heddle node drain --gr", 3), "--grace\n");
  EXPECT_EQ(Offered(fake, "heddle model show --le", 3), "--lengths\n");
  EXPECT_EQ(Offered(fake, "heddle submit run.yaml training.max_st", 3), "training.max_steps=\n");
  EXPECT_EQ(Offered(fake, "heddle logs training.max_st", 2), "\n");
}

TEST(Completion, KnowsThreeShells) {
  const FakeCluster fake;
  EXPECT_NE(fake.Run({"completion", "zsh"}, true).out.find("bashcompinit"), std::string::npos);
  const std::string fish = fake.Run({"completion", "fish"}, true).out;
  EXPECT_NE(fish.find("-n '__fish_seen_subcommand_from ckpt' -a verify"), std::string::npos);
  EXPECT_NE(fish.find("-l follow"), std::string::npos);
  const Outcome other = fake.Run({"completion", "csh"}, true);
  EXPECT_EQ(other.status, 2);
  EXPECT_EQ(other.err, "heddle: completion: csh: must be bash, zsh or fish\n");
}

}  // namespace
}  // namespace heddle::cli
