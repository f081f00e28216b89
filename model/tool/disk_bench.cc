#include "model/tool/disk_bench.h"

#include <fcntl.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#include "base/clock/clock.h"

namespace heddle::tool {
namespace {

constexpr int64_t kBlock = int64_t{8} << 20;
constexpr int kPlaces = 4;
constexpr int64_t kLimitNs = 2'000'000'000;

struct FreeBlock {
  void operator()(void* block) const { free(block); }
};
using Block = std::unique_ptr<void, FreeBlock>;

// Bytes that no file system finds a pattern in.
Block MakeBlock(uint64_t seed) {
  void* memory = nullptr;
  if (posix_memalign(&memory, 4096, kBlock) != 0) return nullptr;
  auto* words = static_cast<uint64_t*>(memory);
  uint64_t state = seed * 0x9E3779B97F4A7C15u + 1;
  for (int64_t i = 0; i < kBlock / 8; ++i) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    words[i] = state;
  }
  return Block(memory);
}

// An open file without a name: gone when it is closed, whatever happens.
class ScratchFile {
 public:
  ~ScratchFile() {
    if (fd_ >= 0) close(fd_);
  }
  Status Open(const std::string& dir) {
    for (const int direct : {O_DIRECT, 0}) {
      std::string name = dir + "/.heddle-bench-XXXXXX";
      fd_ = mkostemp(name.data(), direct | O_CLOEXEC);
      if (fd_ >= 0) {
        unlink(name.c_str());
        direct_ = direct != 0;
        return OkStatus();
      }
      if (errno != EINVAL) break;  // of file systems without O_DIRECT
    }
    return FromErrno("cannot write in", dir);
  }
  int fd() const { return fd_; }
  bool direct() const { return direct_; }

 private:
  int fd_ = -1;
  bool direct_ = false;
};

// A place of the file, and the blocks that it has.
struct Place {
  Block memory;
  int64_t first = 0;
  int64_t blocks = 0;
};

// Moves the blocks of all places side by side until all are moved or the time is up; a place has
// as many as were. Returns their bytes, or an errno as a negative number.
int64_t MoveBlocks(int fd, bool write, std::vector<Place>& places, int64_t stop_ns) {
  std::atomic<int> error{0};
  const auto move = [&](Place* place) {
    const SystemClock clock;
    int64_t done = 0;
    for (; done < place->blocks && clock.NowSteady() < stop_ns && error == 0; ++done) {
      const off_t at = static_cast<off_t>((place->first + done) * kBlock);
      void* block = place->memory.get();
      const ssize_t bytes = write ? pwrite(fd, block, kBlock, at) : pread(fd, block, kBlock, at);
      if (bytes < 0) error = errno;
      if (bytes == kBlock) continue;
      if (bytes >= 0) error = ENOSPC;  // a part only: the disk is full
      break;
    }
    place->blocks = done;
  };
  std::vector<std::thread> threads;
  for (Place& place : places) threads.emplace_back(move, &place);
  for (std::thread& thread : threads) thread.join();
  if (error != 0) return -int64_t{error};
  int64_t moved = 0;
  for (const Place& place : places) moved += place.blocks * kBlock;
  return moved;
}

StatusOr<double> RateOf(const std::string& dir, int fd, bool write, std::vector<Place>& places) {
  const SystemClock clock;
  const int64_t start = clock.NowSteady();
  const int64_t moved = MoveBlocks(fd, write, places, start + kLimitNs);
  if (moved < 0) {
    return FromErrno(write ? "cannot write in" : "cannot read back from", dir,
                     static_cast<int>(-moved));
  }
  if (write && fdatasync(fd) != 0) return FromErrno("cannot sync in", dir);
  return static_cast<double>(moved) * 1e9 / static_cast<double>(clock.NowSteady() - start);
}

}  // namespace

StatusOr<DiskBench> MeasureDisk(const std::string& dir, int64_t file_bytes) {
  struct stat info = {};
  if (stat(dir.c_str(), &info) != 0 || !S_ISDIR(info.st_mode)) {
    return NotFound(Str(dir, ": no such folder"));
  }
  ScratchFile file;
  RETURN_IF_ERROR(file.Open(dir));
  const int64_t share = std::max<int64_t>(1, file_bytes / kBlock / kPlaces);
  std::vector<Place> places;
  for (int64_t index = 0; index < kPlaces; ++index) {
    places.push_back({MakeBlock(static_cast<uint64_t>(index)), index * share, share});
    if (places.back().memory == nullptr) return ResourceExhausted("no memory to write a disk from");
  }
  DiskBench bench{.direct = file.direct()};
  ASSIGN_OR_RETURN(bench.write_bytes, RateOf(dir, file.fd(), true, places));
  ASSIGN_OR_RETURN(bench.read_bytes, RateOf(dir, file.fd(), false, places));
  return bench;
}

}  // namespace heddle::tool
