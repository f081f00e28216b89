// The C interface of the CUDA plug-in libheddle_cuda.so to the trainer (training-runtime.md 2.3):
// plain functions, so that the plug-in is found by dlopen and may be absent. Torch-free.
#pragma once

#include <cstdint>

namespace heddle::comm {

inline constexpr int kNcclPluginVersion = 1;
inline constexpr int kNcclIdBytes = 128;

// Every function returns 0, or fills `error` (zero-terminated) and returns another number.
struct NcclPlugin {
  int version;
  // Number of devices this process may use; 0 without a driver.
  int (*device_count)();
  // Fills 128 bytes that rank 0 hands to all ranks.
  int (*unique_id)(unsigned char* id, char* error, int error_bytes);
  // `id` from rank 0. Blocks until all ranks came.
  int (*connect)(const unsigned char* id, int rank, int world_size, int device, void** group,
                 char* error, int error_bytes);
  // Sums of host memory in ascending order of rank, staged through the device. element_bytes is 4
  // (float) or 8 (double). Ends with an error after timeout_ms.
  int (*all_reduce_sum)(void* group, void* values, int64_t count, int element_bytes,
                        int64_t timeout_ms, char* error, int error_bytes);
  void (*abort)(void* group);
  void (*destroy)(void* group);
};

// The one exported symbol: `extern "C" const NcclPlugin* heddle_nccl_plugin();`
inline constexpr char kNcclPluginSymbol[] = "heddle_nccl_plugin";

}  // namespace heddle::comm
