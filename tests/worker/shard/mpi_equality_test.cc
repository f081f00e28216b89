// The equality matrix over MPI. Ranks are processes, and MPI starts once in a process, so one set
// of ranks runs all cases of a world. The back end moves bytes only, so two and three ranks without
// recomputation and tied embeddings stand for all; HEDDLE_ALL_CASES=1 runs the whole matrix.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

#include "tests/checkpoint/temp_dir.h"
#include "tests/worker/comm/forked_ranks.h"
#include "tests/worker/shard/sharded_run.h"

namespace heddle::shard {
namespace {

std::string PathOf(const std::string& folder, const Parts& parts, int rank) {
  return folder + "/" + NameOf(parts) + "-" + std::to_string(rank);
}

Values Load(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  const std::string bytes(std::istreambuf_iterator<char>(file), {});
  Values values(bytes.size() / sizeof(float));
  bytes.copy(reinterpret_cast<char*>(values.data()), values.size() * sizeof(float));
  return values;
}

bool Wanted(const Parts& parts) {
  if (std::getenv("HEDDLE_ALL_CASES") != nullptr) return true;
  const auto& [world, mode, accumulation, recompute, precision, tied] = parts;
  return (world == 2 || world == 3) && recompute == Recompute::kNone && !tied;
}

std::vector<Parts> PartsOf(int world) {
  std::vector<Parts> some;
  for (const Parts& parts : AllParts()) {
    if (std::get<0>(parts) == world && Wanted(parts)) some.push_back(parts);
  }
  return some;
}

std::string RunAll(const std::string& folder, int rank, int world) {
  // Two tasks where that is possible: both of OpenMPI's transports are used.
  const int per_task = world == 4 ? 2 : world;
  const auto group = comm::ConnectMpi(comm::ForkedOptions(folder, rank, world, per_task));
  if (!group.ok()) return Message(group.status());
  for (const Parts& parts : PartsOf(world)) {
    const Case c = CaseOf(parts);
    Outcome out = NoOutcome(c);
    const Status status = RunRank(c, group->get(), &out);
    if (!status.ok()) return NameOf(parts) + ": " + Message(status);
    std::ofstream(PathOf(folder, parts, rank), std::ios::binary)
        .write(reinterpret_cast<const char*>(out.masters.data()),
               static_cast<std::streamsize>(out.masters.size() * sizeof(float)));
  }
  return "";
}

// One test: the ranks of all worlds are forked before this process uses LibTorch.
TEST(EqualityOverMpi, ParametersAreThoseOfOneProcessBitForBit) {
  const checkpoint::TempDir folder;
  for (const int world : {1, 2, 3, 4}) {
    if (PartsOf(world).empty()) continue;
    const std::string place = folder.path() + "/" + std::to_string(world);
    std::filesystem::create_directories(place);
    const auto ends = comm::ForkRanks(world, [&](int rank) { return RunAll(place, rank, world); });
    ASSERT_EQ(ends, std::vector<int>(static_cast<size_t>(world), 0));
  }
  size_t cases = 0;
  for (const Parts& parts : AllParts()) {
    if (!Wanted(parts)) continue;
    const int world = std::get<0>(parts);
    const std::string place = folder.path() + "/" + std::to_string(world);
    Values all = Load(PathOf(place, parts, 0));
    for (int rank = 1; rank < world; ++rank) Merge(Load(PathOf(place, parts, rank)), &all);
    EXPECT_EQ(Difference(CaseOf(parts), all), "") << NameOf(parts);
    ++cases;
  }
  std::printf("%zu cases over MPI\n", cases);
  EXPECT_GE(cases, 32u);
}

}  // namespace
}  // namespace heddle::shard
