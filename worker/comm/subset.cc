#include "worker/comm/subset.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "worker/comm/buffers.h"
#include "worker/comm/transport.h"

namespace heddle::comm {

namespace {

// Keeps what is sent until it has been.
class PendingSent : public Pending {
 public:
  PendingSent(std::unique_ptr<Pending> exchange, std::vector<std::byte> sent, Buffers* spare)
      : exchange_(std::move(exchange)), sent_(std::move(sent)), spare_(spare) {}

  Status Wait() override {
    Status exchanged = exchange_->Wait();
    if (exchanged.ok()) {
      spare_->Give(std::move(sent_));
    } else {
      spare_->Bury(std::move(sent_));  // a back end that failed may still read it
    }
    return exchanged;
  }

 private:
  std::unique_ptr<Pending> exchange_;
  std::vector<std::byte> sent_;
  Buffers* const spare_;
};

class SubsetTransport : public Transport {
 public:
  SubsetTransport(Communicator* whole, std::vector<int> members)
      : whole_(whole),
        members_(std::move(members)),
        place_(static_cast<int>(std::find(members_.begin(), members_.end(), whole->rank()) -
                                members_.begin())) {}

  int rank() const override { return place_; }
  int world_size() const override { return static_cast<int>(members_.size()); }
  std::string backend() const override { return whole_->backend(); }
  bool ChecksSizes() const override { return true; }
  void SetTimeout(std::chrono::milliseconds timeout) override { whole_->SetTimeout(timeout); }
  void Abort() override { whole_->Abort(); }

  StatusOr<std::unique_ptr<Pending>> StartAllGather(std::span<const std::byte> mine,
                                                    std::span<std::byte> all, int unit) override {
    std::vector<std::byte> sent = spare_.Take(mine.size() * members_.size());
    for (size_t place = 0; !mine.empty() && place < members_.size(); ++place) {
      std::memcpy(sent.data() + place * mine.size(), mine.data(), mine.size());
    }
    const auto copies = std::span<const std::byte>(sent).first(mine.size() * members_.size());
    StatusOr<std::unique_ptr<Pending>> exchange = StartAllToAll(copies, {}, all, {}, unit);
    if (!exchange.ok()) {
      spare_.Bury(std::move(sent));
      return exchange.status();
    }
    return std::make_unique<PendingSent>(*std::move(exchange), std::move(sent), &spare_);
  }

  StatusOr<std::unique_ptr<Pending>> StartAllToAll(std::span<const std::byte> sent,
                                                   std::span<const size_t> sent_bytes,
                                                   std::span<std::byte> received,
                                                   std::span<const size_t> received_bytes,
                                                   int unit) override {
    return whole_->StartAllToAll(sent, OfWhole(sent_bytes, sent.size()), received,
                                 OfWhole(received_bytes, received.size()), unit);
  }

 private:
  // Sizes by rank of the whole group; `sizes` empty: slices of one size.
  std::vector<size_t> OfWhole(std::span<const size_t> sizes, size_t total) const {
    std::vector<size_t> all(static_cast<size_t>(whole_->world_size()), 0);
    for (size_t place = 0; place < members_.size(); ++place) {
      all[static_cast<size_t>(members_[place])] =
          sizes.empty() ? total / members_.size() : sizes[place];
    }
    return all;
  }

  Communicator* const whole_;
  const std::vector<int> members_;
  const int place_;
  Buffers spare_;
};

}  // namespace

std::unique_ptr<Communicator> MakeSubset(Communicator* whole, std::vector<int> members) {
  const auto descending = [](int before, int after) { return before >= after; };
  HEDDLE_CHECK(std::adjacent_find(members.begin(), members.end(), descending) == members.end());
  HEDDLE_CHECK(std::binary_search(members.begin(), members.end(), whole->rank()));
  HEDDLE_CHECK(members.front() >= 0 && members.back() < whole->world_size());
  return MakeOrdered(std::make_unique<SubsetTransport>(whole, std::move(members)));
}

}  // namespace heddle::comm
