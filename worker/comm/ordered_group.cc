#include <arpa/inet.h>

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>
#include <vector>

#include "worker/comm/buffers.h"
#include "worker/comm/ordered_sum.h"
#include "worker/comm/transport.h"

namespace heddle::comm {

namespace {

// Elements reduced at a time: receive buffers stay at one bucket, and every rank's slice of it is
// large enough to fill the link.
constexpr size_t kBucketElements = size_t{4} << 20;

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
    Status exchanged = exchange_->Wait();
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

// An all-to-all together with one of the sizes: back ends cannot tell a short slice from a whole
// one.
class PendingSlices : public Pending {
 public:
  // `sizes` holds what this rank told the others and, behind it, what they told.
  PendingSlices(std::unique_ptr<Pending> told, std::unique_ptr<Pending> moved,
                std::vector<std::byte> sizes, std::span<const size_t> expected, Buffers* spare,
                Transport* transport)
      : told_(std::move(told)),
        moved_(std::move(moved)),
        sizes_(std::move(sizes)),
        expected_(expected.begin(), expected.end()),
        spare_(spare),
        transport_(transport) {}

  Status Wait() override {
    Status told = told_->Wait();
    // Also where it cannot end well: the back end is to be done with the caller's buffers.
    const Status moved = moved_->Wait();
    if (!told.ok()) {
      spare_->Bury(std::move(sizes_));
      return told;
    }
    const Status same = CheckSizes();
    spare_->Give(std::move(sizes_));
    if (!same.ok()) transport_->Abort();
    return same.ok() ? moved : same;
  }

 private:
  Status CheckSizes() const {
    const std::byte* heard = sizes_.data() + expected_.size() * sizeof(uint64_t);
    for (size_t r = 0; r < expected_.size(); ++r) {
      uint64_t size = 0;
      std::memcpy(&size, heard + r * sizeof(size), sizeof(size));
      if (size != expected_[r]) {
        return SizeMismatch(transport_->rank(), static_cast<int>(r), size, expected_[r]);
      }
    }
    return OkStatus();
  }

  std::unique_ptr<Pending> told_;
  std::unique_ptr<Pending> moved_;
  std::vector<std::byte> sizes_;
  const std::vector<size_t> expected_;
  Buffers* const spare_;
  Transport* const transport_;
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

  Status AllReduceSum(std::span<float> values, int unit) override {
    for (size_t at = 0; at < values.size(); at += kBucketElements) {
      const size_t size = std::min(kBucketElements, values.size() - at);
      RETURN_IF_ERROR(Reduce(values.subspan(at, size), unit));
    }
    return OkStatus();
  }
  Status AllReduceSum(std::span<double> values) override { return ReduceSmall(values, kNoUnit); }

  StatusOr<std::unique_ptr<Pending>> StartAllGather(std::span<const std::byte> mine,
                                                    std::span<std::byte> all, int unit) override {
    return transport_->StartAllGather(mine, all, unit);
  }

  StatusOr<std::unique_ptr<Pending>> StartReduceScatterSum(std::span<const float> all,
                                                           std::span<float> sum, Wire wire,
                                                           int unit) override {
    const size_t bytes = all.size() * (wire == Wire::kFp32 ? sizeof(float) : sizeof(uint16_t));
    PendingSum::Slices slices;
    std::span<const std::byte> send = std::as_bytes(all);
    if (wire == Wire::kBf16) {
      slices.sent = spare_.Take(bytes);
      RoundToBf16(all.data(), all.size(), reinterpret_cast<uint16_t*>(slices.sent.data()));
      send = std::span<const std::byte>(slices.sent).first(bytes);
    }
    slices.received = spare_.Take(bytes);
    ASSIGN_OR_RETURN(std::unique_ptr<Pending> exchange,
                     transport_->StartAllToAll(
                         send, {}, std::span<std::byte>(slices.received).first(bytes), {}, unit));
    return std::make_unique<PendingSum>(std::move(exchange), std::move(slices), &spare_, world_,
                                        sum, wire);
  }

  StatusOr<std::unique_ptr<Pending>> StartAllToAll(std::span<const std::byte> sent,
                                                   std::span<const size_t> sent_bytes,
                                                   std::span<std::byte> received,
                                                   std::span<const size_t> received_bytes,
                                                   int unit) override {
    RETURN_IF_ERROR(
        CheckSlices(world_size(), sent.size(), sent_bytes, received.size(), received_bytes));
    if (transport_->ChecksSizes()) {
      return transport_->StartAllToAll(sent, sent_bytes, received, received_bytes, unit);
    }
    const size_t row = world_ * sizeof(uint64_t);
    std::vector<std::byte> sizes = sizes_.Take(2 * row);
    const std::vector<uint64_t> told(sent_bytes.begin(), sent_bytes.end());
    std::memcpy(sizes.data(), told.data(), row);
    const std::span<std::byte> both(sizes);
    auto telling = transport_->StartAllToAll(both.first(row), {}, both.subspan(row, row), {}, unit);
    auto moving = telling.ok()
                      ? transport_->StartAllToAll(sent, sent_bytes, received, received_bytes, unit)
                      : telling.status();
    if (!moving.ok()) {
      sizes_.Bury(std::move(sizes));
      return moving.status();
    }
    return std::make_unique<PendingSlices>(*std::move(telling), *std::move(moving),
                                           std::move(sizes), received_bytes, &sizes_,
                                           transport_.get());
  }

 private:
  template <typename T>
  Status AllGather(const T* mine, size_t count, T* all, int unit) {
    ASSIGN_OR_RETURN(const std::unique_ptr<Pending> gather,
                     transport_->StartAllGather(std::as_bytes(std::span<const T>(mine, count)),
                                                Writable(all, count * world_), unit));
    return gather->Wait();
  }

  template <typename T>
  Status ReduceSmall(std::span<T> values, int unit) {
    if (values.empty()) {
      return OkStatus();
    }
    // This rank's part and, behind it, everybody's.
    std::vector<std::byte> buffer = spare_.Take(values.size_bytes() * (world_ + 1));
    T* mine = reinterpret_cast<T*>(buffer.data());
    T* rows = mine + values.size();
    std::copy(values.begin(), values.end(), mine);
    Status gathered = AllGather(mine, values.size(), rows, unit);
    if (!gathered.ok()) {
      spare_.Bury(std::move(buffer));
      return gathered;
    }
    OrderedSum(rows, world_, values.size(), values.data());
    spare_.Give(std::move(buffer));
    return OkStatus();
  }

  // Through received_ and sum_, which are as large as it takes.
  Status ReduceSlices(std::span<float> bucket, int unit) {
    const size_t slice = bucket.size() / world_;
    float* sum = reinterpret_cast<float*>(sum_.data());
    ASSIGN_OR_RETURN(const std::unique_ptr<Pending> exchange,
                     transport_->StartAllToAll(std::as_bytes(bucket), {}, received_, {}, unit));
    RETURN_IF_ERROR(exchange->Wait());
    OrderedSum(reinterpret_cast<const float*>(received_.data()), world_, slice, sum);
    return AllGather(sum, slice, bucket.data(), unit);
  }

  Status Reduce(std::span<float> bucket, int unit) {
    const size_t slice = bucket.size() / world_;
    if (slice > 0) {
      received_.resize(slice * world_ * sizeof(float));
      sum_.resize(slice * sizeof(float));
      Status reduced = ReduceSlices(bucket.first(slice * world_), unit);
      if (!reduced.ok()) {
        Buffers::Bury(std::move(received_));
        Buffers::Bury(std::move(sum_));
        return reduced;
      }
    }
    return ReduceSmall(bucket.subspan(slice * world_), unit);  // fewer than one element per rank
  }

  const std::unique_ptr<Transport> transport_;
  const size_t world_;
  Buffers spare_;
  Buffers sizes_;  // apart: few bytes each
  std::vector<std::byte> received_;
  std::vector<std::byte> sum_;
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

Status CheckSlices(int world_size, size_t sent, std::span<const size_t> sent_bytes, size_t received,
                   std::span<const size_t> received_bytes) {
  const auto check = [&](const char* what, size_t bytes, std::span<const size_t> sizes) {
    const size_t total = std::accumulate(sizes.begin(), sizes.end(), size_t{0});
    if (sizes.size() == static_cast<size_t>(world_size) && total == bytes) return OkStatus();
    return InvalidArgument(Str("all-to-all between ", world_size, " ranks: ", sizes.size(),
                               " sizes of what is ", what, ", together ", total, " of ", bytes,
                               " bytes; give one per rank that add up"));
  };
  RETURN_IF_ERROR(check("sent", sent, sent_bytes));
  return check("received", received, received_bytes);
}

Status SizeMismatch(int rank, int peer, uint64_t sent, uint64_t expected) {
  return Internal(Str("all-to-all mismatch: rank ", peer, " sends ", sent, " bytes to rank ", rank,
                      ", which expects ", expected,
                      "; ranks have to agree on sizes before they exchange"));
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
    RETURN_IF_ERROR(group->AllReduceSum(std::span<float>(ranks), kNoUnit));
    if (std::any_of(ranks.begin(), ranks.end(), [](float count) { return count != 1.0f; })) {
      return Unavailable("the process group does not hold every rank once");
    }
  }
  group->SetTimeout(options.step_timeout);
  return group;
}

}  // namespace heddle::comm
