// The C interface of a transport that lives in a library of its own, so that the trainer starts
// where NCCL or MPI is not installed (training-runtime.md 2.3): plain functions, found by dlopen.
// Torch-free.
#pragma once

#include <cstdint>

namespace heddle::comm {

inline constexpr int kPluginVersion = 3;
inline constexpr int kPluginIdBytes = 128;

// Where a function tells what went wrong: zero-terminated, cut to `size`.
struct PluginError {
  char* text;
  int size;
};

// Functions return 0, or fill the error and return another number. One thread calls them, but for
// `abort`. Buffers of an operation belong to it from its start until `wait` has returned 0; after
// any error the group is dead.
struct TransportPlugin {
  int version;
  // 0: a group can be made here, e.g. there is a device.
  int (*usable)(PluginError error);
  // Fills kPluginIdBytes bytes that rank 0 hands to all ranks; null where no id is needed.
  int (*unique_id)(unsigned char* id, PluginError error);
  // Blocks until all ranks came, at most timeout_ms. `id` from rank 0, or null.
  int (*connect)(const unsigned char* id, int rank, int world_size, int64_t timeout_ms,
                 void** group, PluginError error);
  // all = world_size x bytes, in order of rank; `mine` may be its own place in it.
  int (*start_all_gather)(void* group, const void* mine, int64_t bytes, void* all, void** operation,
                          PluginError error);
  // Slices lie end to end in order of rank, one size per rank, copied before it returns. Where
  // ranks' sizes disagree: an error, foreign bytes or a wait until the deadline.
  int (*start_all_to_all)(void* group, const void* sent, const int64_t* sent_bytes, void* received,
                          const int64_t* received_bytes, void** operation, PluginError error);
  // Ends the operation, at most timeout_ms from now; frees it.
  int (*wait)(void* group, void* operation, int64_t timeout_ms, PluginError error);
  // Any thread.
  void (*abort)(void* group);
  // Never waits for peers longer than a few seconds.
  void (*destroy)(void* group);
};

// The one exported symbol: `extern "C" const TransportPlugin* heddle_transport_plugin();`
inline constexpr char kPluginSymbol[] = "heddle_transport_plugin";

}  // namespace heddle::comm
