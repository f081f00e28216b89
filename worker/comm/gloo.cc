// Gloo over TCP: all-to-all and all-gather, which are its fastest collectives (training-runtime.md
// 3). c10d's uneven all-to-all ends the process where a slice is longer than its receiver expects
// and takes a shorter one for whole; ours tells sizes first, in the same place of the one order.
#include <ATen/ops/from_blob.h>

#include <gloo/alltoallv.h>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include <algorithm>
#include <atomic>
#include <chrono>
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

struct Slices {
  std::span<const std::byte> sent;
  std::vector<int64_t> sent_bytes;
  std::span<std::byte> received;
  std::vector<int64_t> received_bytes;
};

// On Gloo's thread: sizes between all pairs, then the slices if this rank's are as it expects.
class SlicesWork : public c10d::ProcessGroupGloo::AsyncWork {
 public:
  // Takes two tags, the second one after `tag`.
  SlicesWork(std::shared_ptr<gloo::Context> context, int rank, uint32_t tag, uint64_t seq,
             Slices slices, std::chrono::milliseconds timeout)
      : AsyncWork(std::move(context), {}, c10d::OpType::ALLTOALL_BASE, seq, timeout),
        rank_(rank),
        tag_(tag),
        slices_(std::move(slices)) {}

  void run() override {
    const auto begin = std::chrono::steady_clock::now();
    std::vector<int64_t> told = slices_.sent_bytes;
    std::vector<int64_t> heard(told.size(), -1);
    const std::vector<int64_t> row(told.size(), sizeof(int64_t));
    Exchange(told.data(), row, heard.data(), row, tag_, timeout_);
    for (size_t r = 0; r < heard.size() && verdict_.ok(); ++r) {
      if (heard[r] == slices_.received_bytes[r]) continue;
      verdict_ = SizeMismatch(rank_, static_cast<int>(r), static_cast<uint64_t>(heard[r]),
                              static_cast<uint64_t>(slices_.received_bytes[r]));
    }
    if (!verdict_.ok()) return;
    const auto left = timeout_ - std::chrono::duration_cast<std::chrono::milliseconds>(
                                     std::chrono::steady_clock::now() - begin);
    Exchange(const_cast<std::byte*>(slices_.sent.data()), slices_.sent_bytes,
             slices_.received.data(), slices_.received_bytes, tag_ + 1,
             std::max(left, std::chrono::milliseconds(1)));
  }
  const std::vector<at::Tensor> getInputTensors() override { return {}; }
  const std::vector<at::Tensor> getOutputTensors() override { return {}; }

  // Once it has ended.
  const Status& verdict() const { return verdict_; }

 private:
  void Exchange(void* sent, const std::vector<int64_t>& to, void* received,
                const std::vector<int64_t>& from, uint32_t tag, std::chrono::milliseconds timeout) {
    gloo::AlltoallvOptions options(context_);
    options.setInput(static_cast<char*>(sent), to);
    options.setOutput(static_cast<char*>(received), from);
    options.setTag(tag);
    options.setTimeout(timeout);
    gloo::alltoallv(options);
  }

  const int rank_;
  const uint32_t tag_;
  const Slices slices_;
  Status verdict_;
};

class PendingSlices : public GlooPending {
 public:
  PendingSlices(c10::intrusive_ptr<SlicesWork> work, std::atomic<bool>* dead)
      : GlooPending(work, dead), slices_(std::move(work)), dead_(dead) {}
  Status Wait() override {
    RETURN_IF_ERROR(GlooPending::Wait());
    if (!slices_->verdict().ok()) *dead_ = true;
    return slices_->verdict();
  }

 private:
  const c10::intrusive_ptr<SlicesWork> slices_;
  std::atomic<bool>* const dead_;
};

// c10d's group with one operation more.
class GlooGroup : public c10d::ProcessGroupGloo {
 public:
  using ProcessGroupGloo::ProcessGroupGloo;
  c10::intrusive_ptr<SlicesWork> AllToAll(Slices slices, std::chrono::milliseconds timeout) {
    const uint32_t tag = nextTag();
    nextTag();
    ++seq_;
    auto work = c10::make_intrusive<SlicesWork>(getContext(tag), getRank(), tag, seq_,
                                                std::move(slices), timeout);
    enqueue(work);
    return work;
  }
};

class Gloo : public Transport {
 public:
  Gloo(const GroupOptions& options, c10::intrusive_ptr<GlooGroup> group)
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
                                                    std::span<std::byte> all, int) override {
    return Start<GlooPending>([&] {
      c10d::AllgatherOptions options;
      options.timeout = timeout_;
      at::Tensor input = ViewBytes(mine);
      at::Tensor output = ViewBytes(all);
      return group_->_allgather_base(output, input, options);
    });
  }

  StatusOr<std::unique_ptr<Pending>> StartAllToAll(std::span<const std::byte> sent,
                                                   std::span<const size_t> sent_bytes,
                                                   std::span<std::byte> received,
                                                   std::span<const size_t> received_bytes,
                                                   int) override {
    if (!sent_bytes.empty()) {
      return Start<PendingSlices>([&] {
        return group_->AllToAll({sent,
                                 {sent_bytes.begin(), sent_bytes.end()},
                                 received,
                                 {received_bytes.begin(), received_bytes.end()}},
                                timeout_);
      });
    }
    return Start<GlooPending>([&] {
      c10d::AllToAllOptions options;
      options.timeout = timeout_;
      at::Tensor input = ViewBytes(sent);
      at::Tensor output = ViewBytes(received);
      std::vector<int64_t> counts;  // equal slices
      return group_->alltoall_base(output, input, counts, counts, options);
    });
  }
  bool ChecksSizes() const override { return true; }

 private:
  template <typename Begun, typename Launch>
  StatusOr<std::unique_ptr<Pending>> Start(const Launch& launch) {
    if (aborted_) {
      return Unavailable("the group was aborted");
    }
    try {
      return std::make_unique<Begun>(launch(), &aborted_);
    } catch (const std::exception& error) {
      aborted_ = true;
      return CollectiveFailed(error);
    }
  }

  const int rank_;
  const int world_;
  std::chrono::milliseconds timeout_;
  c10::intrusive_ptr<GlooGroup> group_;
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
    auto group = c10::make_intrusive<GlooGroup>(store, options.rank, options.world_size, gloo);
    return Proven(MakeOrdered(std::make_unique<Gloo>(options, std::move(group))), options);
  } catch (const std::exception& error) {
    const std::string text = error.what();
    return Unavailable(Str("process group of ", options.world_size, " ranks at ",
                           options.data_address, ": ", text.substr(0, text.find('\n'))));
  }
}

}  // namespace heddle::comm
