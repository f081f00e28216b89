#include <algorithm>
#include <atomic>
#include <vector>

#include "worker/comm/communicator.h"
#include "worker/comm/ordered_sum.h"
#include "worker/comm/transport.h"

namespace heddle::comm {

namespace {

class Done : public Pending {
 public:
  Status Wait() override { return OkStatus(); }
};

class Solo : public Communicator {
 public:
  int rank() const override { return 0; }
  int world_size() const override { return 1; }
  std::string backend() const override { return "solo"; }
  Status AllReduceSum(std::span<float>, int /*unit*/) override { return Verdict(); }
  Status AllReduceSum(std::span<double>) override { return Verdict(); }
  StatusOr<std::unique_ptr<Pending>> StartAllGather(std::span<const std::byte> mine,
                                                    std::span<std::byte> all, int) override {
    RETURN_IF_ERROR(Verdict());
    if (mine.data() != all.data()) {
      std::copy(mine.begin(), mine.end(), all.begin());
    }
    return std::make_unique<Done>();
  }
  StatusOr<std::unique_ptr<Pending>> StartReduceScatterSum(std::span<const float> all,
                                                           std::span<float> sum, Wire wire,
                                                           int) override {
    RETURN_IF_ERROR(Verdict());
    if (wire == Wire::kFp32) {
      std::copy(all.begin(), all.end(), sum.begin());
    } else {
      std::vector<uint16_t> rounded(all.size());
      RoundToBf16(all.data(), all.size(), rounded.data());
      OrderedSum(rounded.data(), 1, sum.size(), sum.data());
    }
    return std::make_unique<Done>();
  }
  StatusOr<std::unique_ptr<Pending>> StartAllToAll(std::span<const std::byte> sent,
                                                   std::span<const size_t> sent_bytes,
                                                   std::span<std::byte> received,
                                                   std::span<const size_t> received_bytes,
                                                   int) override {
    RETURN_IF_ERROR(Verdict());
    RETURN_IF_ERROR(CheckSlices(1, sent.size(), sent_bytes, received.size(), received_bytes));
    if (sent.size() != received.size()) return SizeMismatch(0, 0, sent.size(), received.size());
    std::copy(sent.begin(), sent.end(), received.begin());
    return std::make_unique<Done>();
  }
  void SetTimeout(std::chrono::milliseconds) override {}
  void Abort() override { aborted_ = true; }

 private:
  Status Verdict() const { return aborted_ ? Unavailable("the group was aborted") : OkStatus(); }
  std::atomic<bool> aborted_ = false;
};

}  // namespace

std::unique_ptr<Communicator> MakeSolo() { return std::make_unique<Solo>(); }

}  // namespace heddle::comm
