// The simulation as a program and as a test (control-plane M1 to M6, issue "spine").
//   simulation_test --short                      a part of the seeds and all mutants, for CTest
//   simulation_test [--seeds N] [--first S] [--mutant NAME] [--verbose]
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "tests/simulation/simulation.h"

namespace heddle::simulation {
namespace {

TEST(Simulation, HoldsUnderFaultsForEverySeed) {
  const Totals totals = RunSeeds(1, 400, Mutant::kNone, true);
  EXPECT_EQ(totals.failed, 0u) << "seed " << totals.first_failed << " " << totals.first_violation
                               << "\nrepeat: simulation_test --seeds 1 --verbose --first "
                               << totals.first_failed;
  // It does what it is meant to do: attempts run and checkpoints are committed.
  EXPECT_GT(totals.attempts, totals.seeds);
  EXPECT_GT(totals.commits, totals.seeds);
}

TEST(Simulation, SameSeedGivesTheSameTrace) {
  for (uint64_t seed = 1; seed <= 30; ++seed) {
    const Result once = RunSeed(seed, Mutant::kNone);
    const Result again = RunSeed(seed, Mutant::kNone);
    EXPECT_EQ(once.trace_hash, again.trace_hash) << "seed " << seed;
    EXPECT_EQ(once.steps, again.steps) << "seed " << seed;
  }
}

class Mutants : public testing::TestWithParam<MutantName> {};

TEST_P(Mutants, AreFound) {
  const Totals totals = RunSeeds(1, 5000, GetParam().mutant, true);
  EXPECT_EQ(totals.failed, 1u) << GetParam().name << " survived " << totals.seeds << " seeds";
  std::printf("%s: found by seed %llu: %s\n", GetParam().name,
              static_cast<unsigned long long>(totals.first_failed), totals.first_violation.c_str());
}

INSTANTIATE_TEST_SUITE_P(All, Mutants,
                         testing::ValuesIn(MutantNames().begin() + 1, MutantNames().end()),
                         [](const testing::TestParamInfo<MutantName>& info) {
                           std::string name = info.param.name;
                           for (char& c : name) {
                             c = c == '-' ? '_' : c;
                           }
                           return name;
                         });

int Usage() {
  std::fprintf(stderr, "simulation_test [--seeds N] [--first S] [--mutant NAME] [--verbose]\n");
  return 2;
}

int RunProgram(int argc, char** argv) {
  uint64_t seeds = 5000;
  uint64_t first = 1;
  Mutant mutant = Mutant::kNone;
  bool verbose = false;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    const char* value = i + 1 < argc ? argv[i + 1] : nullptr;
    if (flag == "--verbose") {
      verbose = true;
    } else if (value == nullptr) {
      return Usage();
    } else if (flag == "--seeds") {
      seeds = std::strtoull(argv[++i], nullptr, 10);
    } else if (flag == "--first") {
      first = std::strtoull(argv[++i], nullptr, 10);
    } else if (flag == "--mutant") {
      bool known = false;
      for (const MutantName& one : MutantNames()) {
        if (std::strcmp(one.name, value) == 0) {
          mutant = one.mutant;
          known = true;
        }
      }
      ++i;
      if (!known) {
        return Usage();
      }
    } else {
      return Usage();
    }
  }
  if (verbose) {
    RunSeed(first, mutant, [](const std::string& line) { std::puts(line.c_str()); });
  }
  const Totals totals = RunSeeds(first, seeds, mutant, mutant != Mutant::kNone);
  std::printf(
      "seeds %llu failed %llu simulated_hours %.1f steps %llu events %llu attempts %llu "
      "checkpoints %llu\n",
      static_cast<unsigned long long>(totals.seeds), static_cast<unsigned long long>(totals.failed),
      totals.simulated_hours, static_cast<unsigned long long>(totals.steps),
      static_cast<unsigned long long>(totals.events),
      static_cast<unsigned long long>(totals.attempts),
      static_cast<unsigned long long>(totals.commits));
  for (size_t i = 0; i < totals.failures.size() && i < 20; ++i) {
    std::printf("%s\n", totals.failures[i].c_str());
  }
  return totals.failed == 0 ? 0 : 1;
}

}  // namespace
}  // namespace heddle::simulation

int main(int argc, char** argv) {
  for (int i = 1; i < argc; ++i) {
    if (std::strcmp(argv[i], "--short") == 0 || std::strncmp(argv[i], "--gtest", 7) == 0) {
      testing::InitGoogleTest(&argc, argv);
      return RUN_ALL_TESTS();
    }
  }
  return heddle::simulation::RunProgram(argc, argv);
}
