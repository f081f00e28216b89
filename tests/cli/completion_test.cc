// The completion scripts, run by the shells where these are installed.
#include <gtest/gtest.h>
#include <stdio.h>
#include <stdlib.h>

#include <fstream>

#include "tests/cli/fake_cluster.h"

namespace heddle::cli {
namespace {

std::string Shell(const std::string& command) {
  std::string out;
  FILE* pipe = popen(command.c_str(), "r");
  char buffer[4096];
  size_t got = 0;
  while ((got = fread(buffer, 1, sizeof(buffer), pipe)) > 0) {
    out.append(buffer, got);
  }
  pclose(pipe);
  return out;
}

// What bash offers for a line whose last word is unfinished.
std::string Offered(const FakeCluster& fake, const std::string& words, int count) {
  const std::string script = fake.folder() + "/complete.bash";
  std::ofstream(script) << fake.Run({"completion", "bash"}, true).out << "COMP_WORDS=(" << words
                        << ")\nCOMP_CWORD=" << count << "\n_heddle\necho \"${COMPREPLY[*]}\"\n";
  return Shell("bash " + script + " 2>&1");
}

TEST(Completion, BashOffersVerbsOptionsAndKeys) {
  const FakeCluster fake;
  EXPECT_EQ(Offered(fake, "heddle subm", 1), "submit\n");
  EXPECT_EQ(Offered(fake, "heddle ckpt ve", 2), "verify\n");
  EXPECT_EQ(Offered(fake, "heddle logs --ta", 2), "--tail\n");
  EXPECT_EQ(Offered(fake, "heddle node drain --gr", 3), "--grace\n");
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
