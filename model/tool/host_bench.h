// Rates of the machine this process runs on, as `heddle bench-host` stores them and `heddle plan`
// uses them (training-runtime.md sections 4 and 21). Each is the best of a few short rounds, of the
// disk a single one; all of it takes less than 20 s. Nothing else should run meanwhile.
#pragma once

#include <cstdint>
#include <string>

#include "base/status/status.h"

namespace heddle::tool {

// Rates a second.
struct HostBench {
  std::string host;  // name
  std::string cpu;   // model, as the kernel names it
  int64_t threads = 0;
  int64_t measured_at_ms = 0;
  // Products of 2048 cubed, all threads, as the layers compute them: without AVX-512 bf16 is
  // widened to fp32.
  double bf16_flops = 0;
  double fp32_flops = 0;
  // The streams of AdamW with next to no arithmetic: three arrays read and written, one read; of
  // arrays larger than caches.
  double dram_bytes = 0;
  double dram_thread_bytes = 0;
  // AdamW with fp32 moments, fp32 gradients and bf16 weights, all threads and one.
  double update_ns = 0;  // a parameter
  double update_thread_ns = 0;
  double update_bytes = 0;  // 30 a parameter
  // That one of two threads sends: each adds its half of the other's array to its own, then copies
  // the other's half, as ranks of a host do over shared memory. 0 with one thread.
  double exchange_bytes = 0;
  // Blocks of 8 MiB at four places of one file; written ones are synced. `disk_direct`: past the
  // page cache (O_DIRECT); where the file system cannot, rates are those of its cache.
  std::string disk_dir;
  bool disk_direct = false;
  double disk_read_bytes = 0;
  double disk_write_bytes = 0;
  double seconds = 0;  // that measuring took
};

// Smaller arrays and files than those of a host's figures are for tests.
struct HostBenchSizes {
  int64_t matrix = 2048;
  int64_t elements = int64_t{48} << 20;  // of an array; eight of them at a time at most
  int64_t file_bytes = int64_t{512} << 20;
};

// The file is made in `dir` and removed. NOT_FOUND: no such folder; the error of the file system:
// not writable, or full. One caller at a time; sets LibTorch's number of threads and puts it back.
StatusOr<HostBench> MeasureHost(const std::string& dir, const HostBenchSizes& sizes = {});

}  // namespace heddle::tool
