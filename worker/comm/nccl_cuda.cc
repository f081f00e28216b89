// libheddle_cuda.so: NCCL behind the plain functions of plugin.h. Host code only.
//
// Gradients and weights live in host memory: an operation copies its input to the device, exchanges
// it over the GPUs' links and copies the result back when it is waited for. Operations run in the
// order of their starts on one stream, each with device memory of its own from a small pool.
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <chrono>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <thread>

#include "worker/comm/plugin.h"

namespace heddle::comm {

namespace {

constexpr int64_t kEnqueueMs = 120'000;
constexpr auto kPoll = std::chrono::microseconds(50);

using Deadline = std::chrono::steady_clock::time_point;

Deadline In(int64_t timeout_ms) {
  return std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
}

// First error of a sequence of calls; later calls are skipped.
class Errors {
 public:
  bool Cuda(cudaError_t code, const char* what) {
    if (code != cudaSuccess) {
      Note(what, cudaGetErrorString(code));
    }
    return ok();
  }
  bool Nccl(ncclResult_t code, const char* what) {
    if (code != ncclSuccess && code != ncclInProgress) {
      Note(what, ncclGetErrorString(code));
    }
    return ok();
  }
  void Note(const char* what, const char* why) {
    if (text_.empty()) {
      text_ = std::string(what) + ": " + why;
    }
  }
  bool ok() const { return text_.empty(); }
  int Into(PluginError error) const {
    std::snprintf(error.text, static_cast<size_t>(error.size), "%s", text_.c_str());
    return ok() ? 0 : 1;
  }

 private:
  std::string text_;
};

// Device memory of ended operations, by size.
class DevicePool {
 public:
  ~DevicePool() {
    for (const auto& [bytes, memory] : spare_) cudaFree(memory);
  }
  char* Take(size_t bytes, Errors* errors) {
    const auto found = spare_.lower_bound(bytes);
    if (found != spare_.end() && found->first <= 2 * bytes) {
      char* memory = found->second;
      sizes_[memory] = found->first;
      spare_.erase(found);
      return memory;
    }
    void* memory = nullptr;
    errors->Cuda(cudaMalloc(&memory, bytes), "device memory");
    sizes_[static_cast<char*>(memory)] = bytes;
    return static_cast<char*>(memory);
  }
  void Give(char* memory) {
    if (memory == nullptr) return;
    spare_.emplace(sizes_[memory], memory);
    sizes_.erase(memory);
  }

 private:
  std::multimap<size_t, char*> spare_;
  std::map<char*, size_t> sizes_;
};

struct Operation {
  char* send = nullptr;  // device
  char* receive = nullptr;
  void* target = nullptr;  // host
  size_t bytes = 0;        // of the result
  cudaEvent_t exchanged = nullptr;
};

struct Group {
  ncclComm_t comm = nullptr;
  cudaStream_t exchange = nullptr;
  cudaStream_t copy_back = nullptr;
  int rank = 0;
  int world = 1;
  DevicePool pool;
  bool dead = false;
};

// Communicators are non-blocking: a call that is in progress is polled until the deadline.
bool AwaitComm(Group* group, Deadline deadline, Errors* errors) {
  ncclResult_t state = ncclInProgress;
  while (true) {
    if (!errors->Nccl(ncclCommGetAsyncError(group->comm, &state), "NCCL state") ||
        !errors->Nccl(state, "NCCL")) {
      return false;
    }
    if (state == ncclSuccess) {
      return true;
    }
    if (std::chrono::steady_clock::now() > deadline) {
      errors->Note("NCCL", "deadline passed");
      return false;
    }
    std::this_thread::sleep_for(kPoll);
  }
}

bool AwaitEvent(Group* group, cudaEvent_t event, Deadline deadline, Errors* errors) {
  while (true) {
    const cudaError_t state = cudaEventQuery(event);
    if (state == cudaSuccess) {
      return true;
    }
    if (state != cudaErrorNotReady) {
      return errors->Cuda(state, "collective");
    }
    if (!AwaitComm(group, deadline, errors)) {
      return false;
    }
    if (std::chrono::steady_clock::now() > deadline) {
      errors->Note("collective", "deadline passed");
      return false;
    }
    std::this_thread::sleep_for(kPoll);
  }
}

// Copies `sent` to the device and lets `launch` enqueue the exchange.
template <typename Launch>
int Start(void* handle, const void* sent, size_t sent_bytes, void* received, size_t received_bytes,
          void** operation, PluginError error, const Launch& launch) {
  Group* group = static_cast<Group*>(handle);
  Errors errors;
  if (group->dead) errors.Note("group", "was aborted");
  auto started = std::make_unique<Operation>();
  if (errors.ok()) {
    started->target = received;
    started->bytes = received_bytes;
    started->send = group->pool.Take(sent_bytes, &errors);
    started->receive = group->pool.Take(received_bytes, &errors);
  }
  if (errors.ok() &&
      errors.Cuda(cudaEventCreateWithFlags(&started->exchanged, cudaEventDisableTiming), "event") &&
      errors.Cuda(
          cudaMemcpyAsync(started->send, sent, sent_bytes, cudaMemcpyHostToDevice, group->exchange),
          "copy to device")) {
    launch(group, *started, &errors);
  }
  // Enqueued before the event is: a non-blocking communicator may still be busy with it.
  if (errors.ok()) AwaitComm(group, In(kEnqueueMs), &errors);
  if (errors.ok()) errors.Cuda(cudaEventRecord(started->exchanged, group->exchange), "event");
  if (!errors.ok()) {
    group->dead = true;
    return errors.Into(error);
  }
  *operation = started.release();
  return 0;
}

int StartAllGather(void* handle, const void* mine, int64_t bytes, void* all, void** operation,
                   PluginError error) {
  const size_t size = static_cast<size_t>(bytes);
  const size_t world = static_cast<size_t>(static_cast<Group*>(handle)->world);
  return Start(handle, mine, size, all, size * world, operation, error,
               [size](Group* group, const Operation& started, Errors* errors) {
                 errors->Nccl(ncclAllGather(started.send, started.receive, size, ncclInt8,
                                            group->comm, group->exchange),
                              "all-gather");
               });
}

int StartAllToAll(void* handle, const void* sent, const int64_t* sent_bytes, void* received,
                  const int64_t* received_bytes, void** operation, PluginError error) {
  const int world = static_cast<Group*>(handle)->world;
  const auto total = [world](const int64_t* sizes) {
    return static_cast<size_t>(std::accumulate(sizes, sizes + world, int64_t{0}));
  };
  return Start(handle, sent, total(sent_bytes), received, total(received_bytes), operation, error,
               [&](Group* group, const Operation& started, Errors* errors) {
                 errors->Nccl(ncclGroupStart(), "all-to-all");
                 const char* from = started.send;
                 char* to = started.receive;
                 for (int peer = 0; peer < world && errors->ok(); ++peer) {
                   const size_t give = static_cast<size_t>(sent_bytes[peer]);
                   const size_t take = static_cast<size_t>(received_bytes[peer]);
                   if (give > 0) {
                     errors->Nccl(
                         ncclSend(from, give, ncclInt8, peer, group->comm, group->exchange),
                         "send");
                   }
                   if (take > 0) {
                     errors->Nccl(ncclRecv(to, take, ncclInt8, peer, group->comm, group->exchange),
                                  "receive");
                   }
                   from += give;
                   to += take;
                 }
                 errors->Nccl(ncclGroupEnd(), "all-to-all");
               });
}

int Wait(void* handle, void* operation, int64_t timeout_ms, PluginError error) {
  Group* group = static_cast<Group*>(handle);
  const std::unique_ptr<Operation> ended(static_cast<Operation*>(operation));
  Errors errors;
  if (group->dead) errors.Note("group", "was aborted");
  const bool done = errors.ok() && AwaitEvent(group, ended->exchanged, In(timeout_ms), &errors) &&
                    errors.Cuda(cudaMemcpyAsync(ended->target, ended->receive, ended->bytes,
                                                cudaMemcpyDeviceToHost, group->copy_back),
                                "copy to host") &&
                    errors.Cuda(cudaStreamSynchronize(group->copy_back), "copy to host");
  if (!done) {
    group->dead = true;  // the device may still write to its memory: it is not given back
    return errors.Into(error);
  }
  cudaEventDestroy(ended->exchanged);
  group->pool.Give(ended->send);
  group->pool.Give(ended->receive);
  return 0;
}

int Usable(PluginError error) {
  int count = 0;
  Errors errors;
  errors.Cuda(cudaGetDeviceCount(&count), "the CUDA plug-in finds no device");
  if (errors.ok() && count == 0) errors.Note("the CUDA plug-in finds no device", "none is visible");
  return errors.Into(error);
}

int UniqueId(unsigned char* id, PluginError error) {
  static_assert(sizeof(ncclUniqueId) == kPluginIdBytes);
  Errors errors;
  ncclUniqueId made;
  errors.Nccl(ncclGetUniqueId(&made), "unique id");
  std::memcpy(id, &made, sizeof(made));
  return errors.Into(error);
}

void Destroy(void* handle) {
  Group* group = static_cast<Group*>(handle);
  if (group->comm != nullptr) {
    ncclCommAbort(group->comm);  // never waits for peers
  }
  if (group->exchange != nullptr) cudaStreamDestroy(group->exchange);
  if (group->copy_back != nullptr) cudaStreamDestroy(group->copy_back);
  delete group;
}

int Connect(const unsigned char* id, int rank, int world_size, int64_t timeout_ms, void** handle,
            PluginError error) {
  Errors errors;
  auto group = std::make_unique<Group>();
  group->rank = rank;
  group->world = world_size;
  ncclUniqueId unique;
  std::memcpy(&unique, id, sizeof(unique));
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  // The worker gives each rank its own device by CUDA_VISIBLE_DEVICES, so number 0 is ours.
  const bool made =
      errors.Cuda(cudaSetDevice(0), "device") &&
      errors.Cuda(cudaStreamCreateWithFlags(&group->exchange, cudaStreamNonBlocking), "stream") &&
      errors.Cuda(cudaStreamCreateWithFlags(&group->copy_back, cudaStreamNonBlocking), "stream") &&
      errors.Nccl(ncclCommInitRankConfig(&group->comm, world_size, unique, rank, &config),
                  "init") &&
      AwaitComm(group.get(), In(timeout_ms), &errors);
  if (!made) {
    Destroy(group.release());
    return errors.Into(error);
  }
  *handle = group.release();
  return 0;
}

void Abort(void* handle) {
  Group* group = static_cast<Group*>(handle);
  group->dead = true;
  ncclCommAbort(group->comm);
  group->comm = nullptr;
}

constexpr TransportPlugin kPlugin = {.version = kPluginVersion,
                                     .usable = Usable,
                                     .unique_id = UniqueId,
                                     .connect = Connect,
                                     .start_all_gather = StartAllGather,
                                     .start_all_to_all = StartAllToAll,
                                     .wait = Wait,
                                     .abort = Abort,
                                     .destroy = Destroy};

}  // namespace

}  // namespace heddle::comm

extern "C" __attribute__((visibility("default"))) const heddle::comm::TransportPlugin*
heddle_transport_plugin() {
  return &heddle::comm::kPlugin;
}
