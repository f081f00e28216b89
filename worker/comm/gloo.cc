// Gloo over TCP: all-to-all and all-gather, which are its fastest collectives (training-runtime.md
// 3).
#include <ATen/ops/from_blob.h>

#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <atomic>
#include <exception>
#include <utility>
#include <vector>

#include "worker/comm/communicator.h"
#include "worker/comm/control_store.h"
#include "worker/comm/transport.h"

namespace heddle::comm {

namespace {

at::Tensor ViewBytes(std::span<const std::byte> bytes) {
  return at::from_blob(const_cast<std::byte*>(bytes.data()), {static_cast<int64_t>(bytes.size())},
                       at::TensorOptions(at::kByte));
}

// The first line names the peer; the rest is a stack.
Status CollectiveFailed(const std::exception& error) {
  const std::string text = error.what();
  return Unavailable(Str("collective failed: ", text.substr(0, text.find('\n'))));
}

// What Gloo's own thread is doing.
class GlooPending : public Pending {
 public:
  GlooPending(c10::intrusive_ptr<c10d::Work> work, std::atomic<bool>* dead)
      : work_(std::move(work)), dead_(dead) {}

  Status Wait() override {
    if (*dead_) {
      return Unavailable("the group was aborted");
    }
    try {
      work_->wait();
      return OkStatus();
    } catch (const std::exception& error) {
      *dead_ = true;
      return CollectiveFailed(error);
    }
  }

 private:
  c10::intrusive_ptr<c10d::Work> work_;
  std::atomic<bool>* const dead_;
};

class Gloo : public Transport {
 public:
  Gloo(const GroupOptions& options, c10::intrusive_ptr<c10d::ProcessGroupGloo> group)
      : rank_(options.rank),
        world_(options.world_size),
        timeout_(options.step_timeout),
        group_(std::move(group)) {}

  int rank() const override { return rank_; }
  int world_size() const override { return world_; }
  std::string backend() const override { return "gloo"; }
  void SetTimeout(std::chrono::milliseconds timeout) override { timeout_ = timeout; }
  void Abort() override { aborted_ = true; }

  StatusOr<std::unique_ptr<Pending>> StartAllGather(std::span<const std::byte> mine,
                                                    std::span<std::byte> all) override {
    return Start([&] {
      c10d::AllgatherOptions options;
      options.timeout = timeout_;
      at::Tensor input = ViewBytes(mine);
      at::Tensor output = ViewBytes(all);
      return group_->_allgather_base(output, input, options);
    });
  }

  StatusOr<std::unique_ptr<Pending>> StartAllToAll(std::span<const std::byte> sent,
                                                   std::span<std::byte> received) override {
    return Start([&] {
      c10d::AllToAllOptions options;
      options.timeout = timeout_;
      at::Tensor input = ViewBytes(sent);
      at::Tensor output = ViewBytes(received);
      std::vector<int64_t> counts;  // equal slices
      return group_->alltoall_base(output, input, counts, counts, options);
    });
  }

 private:
  template <typename Launch>
  StatusOr<std::unique_ptr<Pending>> Start(const Launch& launch) {
    if (aborted_) {
      return Unavailable("the group was aborted");
    }
    try {
      return std::make_unique<GlooPending>(launch(), &aborted_);
    } catch (const std::exception& error) {
      aborted_ = true;
      return CollectiveFailed(error);
    }
  }

  const int rank_;
  const int world_;
  std::chrono::milliseconds timeout_;
  c10::intrusive_ptr<c10d::ProcessGroupGloo> group_;
  std::atomic<bool> aborted_ = false;
};

}  // namespace

StatusOr<std::unique_ptr<Communicator>> ConnectGloo(const GroupOptions& options) {
  RETURN_IF_ERROR(CheckGroupOptions(options));
  try {
    auto store = c10::make_intrusive<ControlStore>(options.rendezvous, options.key_prefix,
                                                   options.init_timeout);
    auto gloo = c10d::ProcessGroupGloo::Options::create(options.init_timeout);
    gloo->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname(options.data_address));
    gloo->threads = 1;
    auto group =
        c10::make_intrusive<c10d::ProcessGroupGloo>(store, options.rank, options.world_size, gloo);
    return Proven(MakeOrdered(std::make_unique<Gloo>(options, std::move(group))), options);
  } catch (const std::exception& error) {
    const std::string text = error.what();
    return Unavailable(Str("process group of ", options.world_size, " ranks at ",
                           options.data_address, ": ", text.substr(0, text.find('\n'))));
  }
}

}  // namespace heddle::comm
