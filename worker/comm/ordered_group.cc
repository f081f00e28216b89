#include <arpa/inet.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "worker/comm/ordered_sum.h"
#include "worker/comm/transport.h"

namespace heddle::comm {

namespace {

// Elements reduced at a time: receive buffers stay at one bucket, and every rank's slice of it is
// large enough to fill the link.
constexpr size_t kBucketElements = size_t{4} << 20;

// Receive buffers, kept from one collective to the next: fresh pages would cost as much as the
// transfer.
class Buffers {
 public:
  std::vector<std::byte> Take(size_t bytes) {
    std::vector<std::byte> buffer;
    if (!spare_.empty()) {
      buffer = std::move(spare_.back());
      spare_.pop_back();
    }
    if (buffer.size() < bytes) {
      buffer.resize(bytes);
    }
    return buffer;
  }
  void Give(std::vector<std::byte> buffer) { spare_.push_back(std::move(buffer)); }
  // Lives as long as the group and is not used again.
  void Bury(std::vector<std::byte> buffer) { buried_.push_back(std::move(buffer)); }

 private:
  std::vector<std::vector<std::byte>> spare_;
  std::vector<std::vector<std::byte>> buried_;
};

// An all-to-all whose slices are summed when it is waited for.
class PendingSum : public Pending {
 public:
  struct Slices {
    std::vector<std::byte> sent;  // bf16 only
    std::vector<std::byte> received;
  };
  PendingSum(std::unique_ptr<Pending> exchange, Slices slices, Buffers* spare, size_t world,
             std::span<float> sum, Wire wire)
      : exchange_(std::move(exchange)),
        slices_(std::move(slices)),
        spare_(spare),
        world_(world),
        sum_(sum),
        wire_(wire) {}

  Status Wait() override {
    const Status exchanged = exchange_->Wait();
    if (!exchanged.ok()) {
      // A back end that failed may still write to them.
      spare_->Bury(std::move(slices_.received));
      spare_->Bury(std::move(slices_.sent));
      return exchanged;
    }
    const void* rows = slices_.received.data();
    if (wire_ == Wire::kFp32) {
      OrderedSum(static_cast<const float*>(rows), world_, sum_.size(), sum_.data());
    } else {
      OrderedSum(static_cast<const uint16_t*>(rows), world_, sum_.size(), sum_.data());
    }
    spare_->Give(std::move(slices_.received));
    if (!slices_.sent.empty()) spare_->Give(std::move(slices_.sent));
    return OkStatus();
  }

 private:
  std::unique_ptr<Pending> exchange_;
  Slices slices_;
  Buffers* const spare_;
  const size_t world_;
  const std::span<float> sum_;
  const Wire wire_;
};

template <typename T>
std::span<std::byte> Writable(T* data, size_t count) {
  return std::as_writable_bytes(std::span<T>(data, count));
}

class OrderedGroup : public Communicator {
 public:
  explicit OrderedGroup(std::unique_ptr<Transport> transport)
      : transport_(std::move(transport)), world_(static_cast<size_t>(transport_->world_size())) {}

  int rank() const override { return transport_->rank(); }
  int world_size() const override { return transport_->world_size(); }
  std::string backend() const override { return transport_->backend(); }
  void SetTimeout(std::chrono::milliseconds timeout) override { transport_->SetTimeout(timeout); }
  void Abort() override { transport_->Abort(); }

  Status AllReduceSum(std::span<float> values) override {
    for (size_t at = 0; at < values.size(); at += kBucketElements) {
      RETURN_IF_ERROR(Reduce(values.subspan(at, std::min(kBucketElements, values.size() - at))));
    }
    return OkStatus();
  }
  Status AllReduceSum(std::span<double> values) override { return ReduceSmall(values); }

  StatusOr<std::unique_ptr<Pending>> StartAllGather(std::span<const std::byte> mine,
                                                    std::span<std::byte> all, int) override {
    return transport_->StartAllGather(mine, all);
  }

  StatusOr<std::unique_ptr<Pending>> StartReduceScatterSum(std::span<const float> all,
                                                           std::span<float> sum, Wire wire,
                                                           int) override {
    const size_t bytes = all.size() * (wire == Wire::kFp32 ? sizeof(float) : sizeof(uint16_t));
    PendingSum::Slices slices;
    std::span<const std::byte> send = std::as_bytes(all);
    if (wire == Wire::kBf16) {
      slices.sent = spare_.Take(bytes);
      RoundToBf16(all.data(), all.size(), reinterpret_cast<uint16_t*>(slices.sent.data()));
      send = std::span<const std::byte>(slices.sent).first(bytes);
    }
    slices.received = spare_.Take(bytes);
    ASSIGN_OR_RETURN(
        std::unique_ptr<Pending> exchange,
        transport_->StartAllToAll(send, std::span<std::byte>(slices.received).first(bytes)));
    return std::make_unique<PendingSum>(std::move(exchange), std::move(slices), &spare_, world_,
                                        sum, wire);
  }

 private:
  template <typename T>
  Status AllGather(const T* mine, size_t count, T* all) {
    ASSIGN_OR_RETURN(const std::unique_ptr<Pending> gather,
                     transport_->StartAllGather(std::as_bytes(std::span<const T>(mine, count)),
                                                Writable(all, count * world_)));
    return gather->Wait();
  }

  template <typename T>
  Status ReduceSmall(std::span<T> values) {
    if (values.empty()) {
      return OkStatus();
    }
    // This rank's part and, behind it, everybody's.
    std::vector<std::byte> buffer = spare_.Take(values.size_bytes() * (world_ + 1));
    T* mine = reinterpret_cast<T*>(buffer.data());
    T* rows = mine + values.size();
    std::copy(values.begin(), values.end(), mine);
    const Status gathered = AllGather(mine, values.size(), rows);
    if (!gathered.ok()) {
      spare_.Bury(std::move(buffer));
      return gathered;
    }
    OrderedSum(rows, world_, values.size(), values.data());
    spare_.Give(std::move(buffer));
    return OkStatus();
  }

  Status Reduce(std::span<float> bucket) {
    const size_t slice = bucket.size() / world_;
    if (slice > 0) {
      received_.resize(slice * world_);
      sum_.resize(slice);
      ASSIGN_OR_RETURN(const std::unique_ptr<Pending> exchange,
                       transport_->StartAllToAll(std::as_bytes(bucket.first(slice * world_)),
                                                 Writable(received_.data(), received_.size())));
      RETURN_IF_ERROR(exchange->Wait());
      OrderedSum(received_.data(), world_, slice, sum_.data());
      RETURN_IF_ERROR(AllGather(sum_.data(), slice, bucket.data()));
    }
    return ReduceSmall(bucket.subspan(slice * world_));  // fewer than one element per rank
  }

  const std::unique_ptr<Transport> transport_;
  const size_t world_;
  Buffers spare_;
  std::vector<float> received_;
  std::vector<float> sum_;
};

bool IsNumericAddress(const std::string& address) {
  in6_addr buffer;
  return inet_pton(AF_INET, address.c_str(), &buffer) == 1 ||
         inet_pton(AF_INET6, address.c_str(), &buffer) == 1;
}

}  // namespace

std::unique_ptr<Communicator> MakeOrdered(std::unique_ptr<Transport> transport) {
  return std::make_unique<OrderedGroup>(std::move(transport));
}

Status CheckGroupOptions(const GroupOptions& options) {
  if (options.world_size < 1 || options.rank < 0 || options.rank >= options.world_size) {
    return InvalidArgument(Str("rank ", options.rank, " of ", options.world_size));
  }
  if (!IsNumericAddress(options.data_address)) {
    return InvalidArgument(Str("data address \"", options.data_address, "\" is not numeric"));
  }
  return OkStatus();
}

StatusOr<std::unique_ptr<Communicator>> Proven(std::unique_ptr<Communicator> group,
                                               const GroupOptions& options) {
  group->SetTimeout(options.init_timeout);
  const size_t world = static_cast<size_t>(options.world_size);
  for (int round = 0; round < 2; ++round) {
    std::vector<float> ranks(world * world, 0.0f);
    for (size_t peer = 0; peer < world; ++peer) {
      ranks[peer * world + static_cast<size_t>(options.rank)] = 1.0f;
    }
    RETURN_IF_ERROR(group->AllReduceSum(std::span<float>(ranks)));
    if (std::any_of(ranks.begin(), ranks.end(), [](float count) { return count != 1.0f; })) {
      return Unavailable("the process group does not hold every rank once");
    }
  }
  group->SetTimeout(options.step_timeout);
  return group;
}

}  // namespace heddle::comm
