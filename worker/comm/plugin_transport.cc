#include "worker/comm/plugin_transport.h"

#include <dlfcn.h>

#include <array>
#include <filesystem>
#include <system_error>
#include <utility>
#include <vector>

namespace heddle::comm {

namespace {

// Room for a plug-in's reason.
class Reason {
 public:
  PluginError slot() { return {text_.data(), static_cast<int>(text_.size())}; }
  std::string text() const { return text_.data(); }

 private:
  std::array<char, 1024> text_{};
};

class PluginTransport : public Transport {
 public:
  PluginTransport(const TransportPlugin* plugin, void* group, std::string backend,
                  const GroupOptions& options)
      : plugin_(plugin),
        group_(group),
        backend_(std::move(backend)),
        rank_(options.rank),
        world_(options.world_size),
        timeout_(options.step_timeout) {}
  ~PluginTransport() override { plugin_->destroy(group_); }

  int rank() const override { return rank_; }
  int world_size() const override { return world_; }
  std::string backend() const override { return backend_; }
  void SetTimeout(std::chrono::milliseconds timeout) override { timeout_ = timeout; }
  void Abort() override { plugin_->abort(group_); }

  StatusOr<std::unique_ptr<Pending>> StartAllGather(std::span<const std::byte> mine,
                                                    std::span<std::byte> all, int) override {
    Reason reason;
    void* operation = nullptr;
    const int failed =
        plugin_->start_all_gather(group_, mine.data(), static_cast<int64_t>(mine.size()),
                                  all.data(), &operation, reason.slot());
    return Started(failed, operation, reason);
  }
  StatusOr<std::unique_ptr<Pending>> StartAllToAll(std::span<const std::byte> sent,
                                                   std::span<const size_t> sent_bytes,
                                                   std::span<std::byte> received,
                                                   std::span<const size_t> received_bytes,
                                                   int) override {
    Reason reason;
    void* operation = nullptr;
    const std::vector<int64_t> to = SizesOf(sent_bytes, sent.size());
    const std::vector<int64_t> from = SizesOf(received_bytes, received.size());
    const int failed = plugin_->start_all_to_all(group_, sent.data(), to.data(), received.data(),
                                                 from.data(), &operation, reason.slot());
    return Started(failed, operation, reason);
  }

 private:
  class Operation : public Pending {
   public:
    Operation(PluginTransport* transport, void* operation)
        : transport_(transport), operation_(operation) {}
    Status Wait() override { return transport_->WaitFor(operation_); }

   private:
    PluginTransport* const transport_;
    void* const operation_;
  };

  std::vector<int64_t> SizesOf(std::span<const size_t> sizes, size_t total) const {
    const size_t world = static_cast<size_t>(world_);
    if (sizes.empty()) return std::vector<int64_t>(world, static_cast<int64_t>(total / world));
    return {sizes.begin(), sizes.end()};
  }
  StatusOr<std::unique_ptr<Pending>> Started(int failed, void* operation, const Reason& reason) {
    if (failed != 0) return Unavailable(Str("collective failed: ", reason.text()));
    return std::make_unique<Operation>(this, operation);
  }
  Status WaitFor(void* operation) {
    Reason reason;
    const int failed = plugin_->wait(group_, operation, timeout_.count(), reason.slot());
    return failed == 0 ? OkStatus() : Unavailable(Str("collective failed: ", reason.text()));
  }

  const TransportPlugin* const plugin_;
  void* const group_;
  const std::string backend_;
  const int rank_;
  const int world_;
  std::chrono::milliseconds timeout_;
};

}  // namespace

std::string BinaryFolder() {
  std::error_code ignored;
  return std::filesystem::read_symlink("/proc/self/exe", ignored).parent_path().string();
}

StatusOr<const TransportPlugin*> LoadPlugin(const std::string& library, const std::string& what,
                                            const std::string& remedy) {
  const std::string path = BinaryFolder() + "/" + library;
  void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (handle == nullptr) {
    return Unimplemented(Str("no ", what, " here (", remedy, "): ", dlerror()));
  }
  using Entry = const TransportPlugin* (*)();
  const auto entry = reinterpret_cast<Entry>(dlsym(handle, kPluginSymbol));
  if (entry == nullptr || entry()->version != kPluginVersion) {
    return Unimplemented(Str(path, " is of another version than the trainer: build both anew"));
  }
  return entry();
}

Status CheckUsable(const TransportPlugin* plugin) {
  Reason reason;
  return plugin->usable(reason.slot()) == 0 ? OkStatus() : FailedPrecondition(reason.text());
}

StatusOr<std::unique_ptr<Transport>> ConnectPlugin(const TransportPlugin* plugin,
                                                   const unsigned char* id,
                                                   const std::string& backend,
                                                   const GroupOptions& options) {
  Reason reason;
  void* group = nullptr;
  if (plugin->connect(id, options.rank, options.world_size, options.init_timeout.count(), &group,
                      reason.slot()) != 0) {
    return Unavailable(Str(backend, " group of ", options.world_size, " ranks: ", reason.text()));
  }
  return std::make_unique<PluginTransport>(plugin, group, backend, options);
}

}  // namespace heddle::comm
