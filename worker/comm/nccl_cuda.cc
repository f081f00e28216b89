// libheddle_cuda.so: NCCL groups behind the plain functions of nccl_plugin.h. Host code only.
//
// A sum takes the same road as Gloo's (training-runtime.md 3.2): all-to-all of slices, a sum in
// ascending order of rank, all-gather. The slices cross the links by NCCL; the few additions are
// done on the host, where the trainer's gradients live, with the very code of the other back ends,
// so the bits are equal.
#include <cuda_runtime_api.h>
#include <nccl.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "worker/comm/nccl_plugin.h"
#include "worker/comm/ordered_sum.h"

namespace heddle::comm {

namespace {

constexpr int64_t kBucketBytes = int64_t{64} << 20;
constexpr auto kPoll = std::chrono::microseconds(50);

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
  int Into(char* error, int error_bytes) const {
    std::snprintf(error, static_cast<size_t>(error_bytes), "%s", text_.c_str());
    return ok() ? 0 : 1;
  }

 private:
  std::string text_;
};

struct Group {
  ncclComm_t comm = nullptr;
  cudaStream_t stream = nullptr;
  int rank = 0;
  int world = 1;
  char* send = nullptr;  // device, kBucketBytes each
  char* receive = nullptr;
  bool dead = false;
};

// Communicators are non-blocking: a call that is in progress is polled until the deadline.
bool AwaitComm(Group* group, std::chrono::steady_clock::time_point deadline, Errors* errors) {
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

bool AwaitStream(Group* group, std::chrono::steady_clock::time_point deadline, Errors* errors) {
  while (true) {
    const cudaError_t state = cudaStreamQuery(group->stream);
    if (state == cudaSuccess) {
      return true;
    }
    if (state != cudaErrorNotReady) {
      return errors->Cuda(state, "collective");
    }
    if (!AwaitComm(group, deadline, errors)) {
      return false;
    }
    std::this_thread::sleep_for(kPoll);
  }
}

// Elements [0, world * slice) are whole slices; the tail is shorter than the world.
template <typename T>
bool SumBucket(Group* group, T* values, size_t slice,
               std::chrono::steady_clock::time_point deadline, Errors* errors) {
  const size_t world = static_cast<size_t>(group->world);
  const size_t bytes = slice * sizeof(T);
  const ncclDataType_t type = sizeof(T) == 4 ? ncclFloat32 : ncclFloat64;
  errors->Cuda(
      cudaMemcpyAsync(group->send, values, bytes * world, cudaMemcpyHostToDevice, group->stream),
      "copy to device");
  errors->Nccl(ncclGroupStart(), "all-to-all");
  for (int peer = 0; peer < group->world && errors->ok(); ++peer) {
    const size_t at = static_cast<size_t>(peer) * bytes;
    errors->Nccl(ncclSend(group->send + at, slice, type, peer, group->comm, group->stream), "send");
    errors->Nccl(ncclRecv(group->receive + at, slice, type, peer, group->comm, group->stream),
                 "receive");
  }
  errors->Nccl(ncclGroupEnd(), "all-to-all");
  std::vector<T> rows(slice * world);
  std::vector<T> sum(slice);
  if (!errors->ok() || !AwaitComm(group, deadline, errors) ||
      !errors->Cuda(cudaMemcpyAsync(rows.data(), group->receive, bytes * world,
                                    cudaMemcpyDeviceToHost, group->stream),
                    "copy to host") ||
      !AwaitStream(group, deadline, errors)) {
    return false;
  }
  OrderedSum(rows.data(), world, slice, sum.data());
  errors->Cuda(
      cudaMemcpyAsync(group->send, sum.data(), bytes, cudaMemcpyHostToDevice, group->stream),
      "copy to device");
  errors->Nccl(ncclAllGather(group->send, group->receive, slice, type, group->comm, group->stream),
               "all-gather");
  return errors->ok() && AwaitComm(group, deadline, errors) &&
         errors->Cuda(cudaMemcpyAsync(values, group->receive, bytes * world, cudaMemcpyDeviceToHost,
                                      group->stream),
                      "copy to host") &&
         AwaitStream(group, deadline, errors);
}

template <typename T>
bool SumAll(Group* group, T* values, int64_t count, std::chrono::steady_clock::time_point deadline,
            Errors* errors) {
  const int64_t world = group->world;
  const int64_t slice_max = kBucketBytes / static_cast<int64_t>(sizeof(T)) / world;
  int64_t at = 0;
  while (count - at >= world) {
    const int64_t slice = std::min((count - at) / world, slice_max);
    if (!SumBucket(group, values + at, static_cast<size_t>(slice), deadline, errors)) {
      return false;
    }
    at += slice * world;
  }
  if (at < count) {  // padded to one element per rank
    std::vector<T> padded(static_cast<size_t>(world), T{0});
    std::copy(values + at, values + count, padded.begin());
    if (!SumBucket(group, padded.data(), 1, deadline, errors)) {
      return false;
    }
    std::copy(padded.begin(), padded.begin() + (count - at), values + at);
  }
  return true;
}

int DeviceCount() {
  int count = 0;
  return cudaGetDeviceCount(&count) == cudaSuccess ? count : 0;
}

int UniqueId(unsigned char* id, char* error, int error_bytes) {
  static_assert(sizeof(ncclUniqueId) == kNcclIdBytes);
  Errors errors;
  ncclUniqueId made;
  errors.Nccl(ncclGetUniqueId(&made), "unique id");
  std::memcpy(id, &made, sizeof(made));
  return errors.Into(error, error_bytes);
}

void Destroy(void* handle) {
  Group* group = static_cast<Group*>(handle);
  if (group->comm != nullptr) {
    ncclCommAbort(group->comm);  // never waits for peers
  }
  cudaFree(group->send);
  cudaFree(group->receive);
  if (group->stream != nullptr) {
    cudaStreamDestroy(group->stream);
  }
  delete group;
}

int Connect(const unsigned char* id, int rank, int world_size, int device, void** handle,
            char* error, int error_bytes) {
  Errors errors;
  auto group = std::make_unique<Group>();
  group->rank = rank;
  group->world = world_size;
  ncclUniqueId unique;
  std::memcpy(&unique, id, sizeof(unique));
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(300);
  const bool made =
      errors.Cuda(cudaSetDevice(device), "device") &&
      errors.Cuda(cudaStreamCreateWithFlags(&group->stream, cudaStreamNonBlocking), "stream") &&
      errors.Cuda(cudaMalloc(reinterpret_cast<void**>(&group->send), kBucketBytes), "memory") &&
      errors.Cuda(cudaMalloc(reinterpret_cast<void**>(&group->receive), kBucketBytes), "memory") &&
      errors.Nccl(ncclCommInitRankConfig(&group->comm, world_size, unique, rank, &config),
                  "init") &&
      AwaitComm(group.get(), deadline, &errors);
  if (!made) {
    Destroy(group.release());
    return errors.Into(error, error_bytes);
  }
  *handle = group.release();
  return 0;
}

int AllReduceSum(void* handle, void* values, int64_t count, int element_bytes, int64_t timeout_ms,
                 char* error, int error_bytes) {
  Group* group = static_cast<Group*>(handle);
  Errors errors;
  if (group->dead) {
    errors.Note("group", "was aborted");
    return errors.Into(error, error_bytes);
  }
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(timeout_ms);
  const bool done = element_bytes == 4
                        ? SumAll(group, static_cast<float*>(values), count, deadline, &errors)
                        : SumAll(group, static_cast<double*>(values), count, deadline, &errors);
  if (!done) {
    group->dead = true;
  }
  return errors.Into(error, error_bytes);
}

void Abort(void* handle) {
  Group* group = static_cast<Group*>(handle);
  group->dead = true;
  ncclCommAbort(group->comm);
  group->comm = nullptr;
}

constexpr NcclPlugin kPlugin = {.version = kNcclPluginVersion,
                                .device_count = DeviceCount,
                                .unique_id = UniqueId,
                                .connect = Connect,
                                .all_reduce_sum = AllReduceSum,
                                .abort = Abort,
                                .destroy = Destroy};

}  // namespace

}  // namespace heddle::comm

extern "C" __attribute__((visibility("default"))) const heddle::comm::NcclPlugin*
heddle_nccl_plugin() {
  return &heddle::comm::kPlugin;
}
