// Streams blocks through a resident set as an update does: every block is read, changed by some
// passes over its words, and written back. What can be gained is the time of the passes.
//   bench_offload DIR [BLOCKS] [BLOCK_MIB] [RESIDENT_BLOCKS] [ROUNDS] [PASSES]
// Contenders: the set over io_uring, over threads, and over a host arena, and `serial`, which
// reads, changes and writes one block after the other with O_DIRECT. Prints one JSON line each:
// seconds, GB/s of reads and writes together, and the share of the time in which the caller waited.
// `many` is a set of 50,000 small blocks in an arena: microseconds per block that gives way.
#include <unistd.h>

#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status/status.h"
#include "base/units/units.h"
#include "worker/offload/block_memory.h"
#include "worker/offload/resident_set.h"
#include "worker/offload/spill_file.h"

namespace heddle::offload {
namespace {

struct Shape {
  int64_t blocks = 32;
  int64_t block_mib = 12;
  int64_t resident_blocks = 8;
  int64_t rounds = 2;
  int64_t passes = 12;
  int64_t BlockBytes() const { return block_mib * kMiB; }
};

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

void Change(std::byte* data, const Shape& shape) {
  auto* const words = reinterpret_cast<uint64_t*>(data);
  for (int64_t pass = 0; pass < shape.passes; ++pass) {
    for (int64_t i = 0; i < shape.BlockBytes() / 8; ++i) words[i] = words[i] * 5 + 1;
  }
}

void Print(std::string_view name, const Shape& shape, double seconds, double moved_bytes,
           double exposed_seconds) {
  std::printf(
      "{\"contender\": \"%.*s\", \"blocks\": %ld, \"block_mib\": %ld, "
      "\"resident_blocks\": %ld, \"passes\": %ld, \"seconds\": %.3f, \"gb_per_s\": %.2f, "
      "\"exposed_share\": %.3f}\n",
      static_cast<int>(name.size()), name.data(), shape.blocks, shape.block_mib,
      shape.resident_blocks, shape.passes, seconds, moved_bytes / 1e9 / seconds,
      exposed_seconds / seconds);
}

Status RunSet(std::string_view name, const std::string& dir, DiskMethod method,
              const Shape& shape) {
  const std::vector<SlotBytes> slots(static_cast<size_t>(shape.blocks),
                                     SlotBytes{0, 0, shape.BlockBytes()});
  ASSIGN_OR_RETURN(const BlockTable table, BlockTable::Make(slots));
  ASSIGN_OR_RETURN(std::unique_ptr<Home> home, MakeHome(dir, table, method));
  ASSIGN_OR_RETURN(
      const std::unique_ptr<ResidentSet> set,
      ResidentSet::Create(table, {.budget_bytes = shape.resident_blocks * shape.BlockBytes()},
                          std::move(home)));
  std::vector<ExpectedUse> uses;
  for (uint32_t slot = 0; slot < slots.size(); ++slot) {
    uses.push_back({{slot, Kind::kState}, Access::kUpdate});
  }
  double began = 0;
  // The first round writes what was never written; it is not timed.
  for (int64_t round = 0; round <= shape.rounds; ++round) {
    if (round == 1) {
      set->TakeStats();
      began = Now();
    }
    RETURN_IF_ERROR(set->Expect(uses));
    for (const ExpectedUse& use : uses) {
      ASSIGN_OR_RETURN(std::byte* const data, set->Pin(use.block.slot, use.block.kind, use.access));
      Change(data, shape);
      RETURN_IF_ERROR(set->Unpin(use.block.slot, use.block.kind));
    }
  }
  const double seconds = Now() - began;
  const ResidentSetStats stats = set->TakeStats();
  Print(name, shape, seconds, static_cast<double>(stats.bytes_read + stats.bytes_written),
        stats.exposed_seconds);
  return OkStatus();
}

Status RunSerial(const std::string& dir, const Shape& shape) {
  ASSIGN_OR_RETURN(const SpillFd file, OpenSpillFile(dir));
  const int64_t bytes = shape.BlockBytes();
  RETURN_IF_ERROR(AllocateSpillFile(file, dir, shape.blocks * bytes));
  BlockMemory memory(bytes);
  std::byte* const data = memory.Take(bytes);
  std::memset(data, 0, static_cast<size_t>(bytes));
  double began = 0;
  double disk_seconds = 0;
  for (int64_t round = 0; round <= shape.rounds; ++round) {
    if (round == 1) {
      began = Now();
      disk_seconds = 0;
    }
    for (int64_t block = 0; block < shape.blocks; ++block) {
      const double read = Now();
      if (round > 0 &&
          pread(file.value, data, static_cast<size_t>(bytes), block * bytes) != bytes) {
        return FromErrno("pread in", dir);
      }
      const double change = Now();
      Change(data, shape);
      const double write = Now();
      if (pwrite(file.value, data, static_cast<size_t>(bytes), block * bytes) != bytes) {
        return FromErrno("pwrite in", dir);
      }
      disk_seconds += Now() - write + change - read;
    }
  }
  Print("serial", shape, Now() - began,
        2.0 * static_cast<double>(shape.rounds * shape.blocks * bytes), disk_seconds);
  memory.Give(data, bytes);
  return OkStatus();
}

// What a choice of the block that gives way costs: as many blocks as a large model has, of a page
// each, half of them resident, forward and back as layers are visited.
Status RunMany() {
  constexpr uint32_t kBlocks = 50'000;
  const std::vector<SlotBytes> slots(kBlocks, SlotBytes{kPageBytes, 0, 0});
  ASSIGN_OR_RETURN(const BlockTable table, BlockTable::Make(slots));
  ASSIGN_OR_RETURN(std::unique_ptr<Home> home, MakeHome("", table, DiskMethod::kAuto));
  ASSIGN_OR_RETURN(
      const std::unique_ptr<ResidentSet> set,
      ResidentSet::Create(table, {.budget_bytes = kBlocks / 2 * kPageBytes}, std::move(home)));
  std::vector<ExpectedUse> uses;
  for (uint32_t slot = 0; slot < kBlocks; ++slot) {
    uses.push_back({{slot, Kind::kWeights}, Access::kUpdate});
  }
  for (uint32_t slot = kBlocks; slot-- > 0;) uses.push_back(uses[slot]);
  double began = 0;
  for (int round = 0; round < 2; ++round) {
    if (round == 1) {
      set->TakeStats();
      began = Now();
    }
    RETURN_IF_ERROR(set->Expect(uses));
    for (const ExpectedUse& use : uses) {
      RETURN_IF_ERROR(set->Pin(use.block.slot, use.block.kind, use.access).status());
      RETURN_IF_ERROR(set->Unpin(use.block.slot, use.block.kind));
    }
  }
  const double seconds = Now() - began;
  const auto evictions = static_cast<double>(set->TakeStats().evictions);
  std::printf(
      "{\"contender\": \"many\", \"blocks\": %u, \"pins\": %zu, \"evictions\": %.0f, "
      "\"seconds\": %.3f, \"us_per_eviction\": %.2f}\n",
      kBlocks, uses.size(), evictions, seconds, 1e6 * seconds / evictions);
  return OkStatus();
}

Status Run(const std::string& dir, const Shape& shape) {
  RETURN_IF_ERROR(RunSerial(dir, shape));
  RETURN_IF_ERROR(RunSet("io_uring", dir, DiskMethod::kUring, shape));
  RETURN_IF_ERROR(RunSet("threads", dir, DiskMethod::kThreads, shape));
  RETURN_IF_ERROR(RunSet("arena", "", DiskMethod::kAuto, shape));
  return RunMany();
}

int Main(int argc, char** argv) {
  Shape shape;
  int64_t* const numbers[] = {&shape.blocks, &shape.block_mib, &shape.resident_blocks,
                              &shape.rounds, &shape.passes};
  bool usable = argc >= 2 && argc <= 7;
  for (int i = 2; usable && i < argc; ++i) {
    const std::string_view text = argv[i];
    usable = std::from_chars(text.data(), text.data() + text.size(), *numbers[i - 2]).ec ==
                 std::errc() &&
             *numbers[i - 2] > 0;
  }
  if (!usable) {
    std::fprintf(stderr,
                 "bench_offload DIR [BLOCKS] [BLOCK_MIB] [RESIDENT_BLOCKS] [ROUNDS] [PASSES]\n");
    return 2;
  }
  const Status status = Run(argv[1], shape);
  if (!status.ok()) std::fprintf(stderr, "bench_offload: %s\n", status.ToString().c_str());
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace heddle::offload

int main(int argc, char** argv) { return heddle::offload::Main(argc, argv); }
