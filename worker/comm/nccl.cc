// The trainer's end of the CUDA plug-in: finds it beside the binary, exchanges the unique id
// through the rendezvous store, turns its error texts into Status.
#include <dlfcn.h>
#include <unistd.h>

#include <array>
#include <filesystem>
#include <utility>

#include "heddle/v1/control.pb.h"
#include "worker/comm/communicator.h"
#include "worker/comm/nccl_plugin.h"

namespace heddle::comm {

namespace {

using heddle::v1::RendezvousReply;
using heddle::v1::RendezvousRequest;

// Loaded once and never unloaded: NCCL's threads outlive every group.
StatusOr<const NcclPlugin*> Plugin() {
  std::error_code ignored;
  const std::filesystem::path self = std::filesystem::read_symlink("/proc/self/exe", ignored);
  const std::string path = (self.parent_path() / "libheddle_cuda.so").string();
  void* library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    return Unimplemented(
        Str("heddle has no CUDA plug-in here (./dev setup --cuda, then build): ", dlerror()));
  }
  using Entry = const NcclPlugin* (*)();
  const auto entry = reinterpret_cast<Entry>(dlsym(library, kNcclPluginSymbol));
  if (entry == nullptr || entry()->version != kNcclPluginVersion) {
    return Unimplemented(Str(path, ": is of another version"));
  }
  return entry();
}

class Nccl : public Communicator {
 public:
  Nccl(const NcclPlugin* plugin, void* group, const GroupOptions& options)
      : plugin_(plugin),
        group_(group),
        rank_(options.rank),
        world_(options.world_size),
        timeout_(options.step_timeout) {}
  ~Nccl() override { plugin_->destroy(group_); }

  int rank() const override { return rank_; }
  int world_size() const override { return world_; }
  std::string backend() const override { return "nccl"; }
  Status AllReduceSum(std::span<float> values) override {
    return Reduce(values.data(), values.size(), sizeof(float));
  }
  Status AllReduceSum(std::span<double> values) override {
    return Reduce(values.data(), values.size(), sizeof(double));
  }
  // Sharded training over NCCL is refused before a rank starts (run_plan.cc).
  StatusOr<std::unique_ptr<Pending>> StartAllGather(std::span<const std::byte>,
                                                    std::span<std::byte>, int) override {
    return Unimplemented("the NCCL back end gathers no weights");
  }
  StatusOr<std::unique_ptr<Pending>> StartReduceScatterSum(std::span<const float>, std::span<float>,
                                                           Wire, int) override {
    return Unimplemented("the NCCL back end scatters no gradients");
  }
  void SetTimeout(std::chrono::milliseconds timeout) override { timeout_ = timeout; }
  void Abort() override { plugin_->abort(group_); }

 private:
  Status Reduce(void* values, size_t count, int element_bytes) {
    std::array<char, 512> error{};
    const int failed =
        plugin_->all_reduce_sum(group_, values, static_cast<int64_t>(count), element_bytes,
                                timeout_.count(), error.data(), static_cast<int>(error.size()));
    return failed == 0 ? OkStatus() : Unavailable(Str("collective failed: ", error.data()));
  }

  const NcclPlugin* plugin_;
  void* group_;
  const int rank_;
  const int world_;
  std::chrono::milliseconds timeout_;
};

// Rank 0 makes the id and publishes it, the others wait for it.
StatusOr<std::string> ShareId(const NcclPlugin* plugin, const GroupOptions& options) {
  std::string id(kNcclIdBytes, '\0');
  RendezvousRequest request;
  request.set_n(1);
  request.add_keys(options.key_prefix + "once/nccl-id");
  request.set_timeout_ms(options.init_timeout.count());
  if (options.rank == 0) {
    std::array<char, 512> error{};
    if (plugin->unique_id(reinterpret_cast<unsigned char*>(id.data()), error.data(),
                          static_cast<int>(error.size())) != 0) {
      return FailedPrecondition(Str("NCCL gives no unique id: ", error.data()));
    }
    request.set_verb(heddle::v1::RENDEZVOUS_VERB_SET);
    request.add_values(id);
  } else {
    request.set_verb(heddle::v1::RENDEZVOUS_VERB_GET);
  }
  ASSIGN_OR_RETURN(const RendezvousReply reply, options.rendezvous(request));
  if (reply.code() != 0) {
    return Unavailable(Str("rendezvous of the NCCL id: ", reply.message()));
  }
  if (options.rank == 0) {
    return id;
  }
  if (reply.values_size() != 1 || reply.values(0).size() != kNcclIdBytes) {
    return Unavailable("rendezvous of the NCCL id: no id of 128 bytes came");
  }
  return reply.values(0);
}

}  // namespace

bool NcclUsable() {
  const StatusOr<const NcclPlugin*> plugin = Plugin();
  return plugin.ok() && (*plugin)->device_count() > 0;
}

StatusOr<std::unique_ptr<Communicator>> ConnectNccl(const GroupOptions& options) {
  ASSIGN_OR_RETURN(const NcclPlugin* plugin, Plugin());
  const int devices = plugin->device_count();
  if (devices == 0) {
    return FailedPrecondition("the CUDA plug-in finds no device");
  }
  ASSIGN_OR_RETURN(const std::string id, ShareId(plugin, options));
  void* group = nullptr;
  std::array<char, 512> error{};
  // The worker gives each rank its own device by CUDA_VISIBLE_DEVICES, so number 0 is ours.
  if (plugin->connect(reinterpret_cast<const unsigned char*>(id.data()), options.rank,
                      options.world_size, 0, &group, error.data(),
                      static_cast<int>(error.size())) != 0) {
    return Unavailable(Str("NCCL group of ", options.world_size, " ranks: ", error.data()));
  }
  return std::make_unique<Nccl>(plugin, group, options);
}

}  // namespace heddle::comm
