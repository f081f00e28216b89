#include "worker/comm/recorder.h"

#include <utility>

#include "worker/control/rank_page.h"

namespace heddle::comm {

namespace {

// The numbers of the page are those of the table that its readers have.
#define HEDDLE_COLLECTIVE(number, name, text, has_unit) \
  static_assert(static_cast<int>(CollectiveOp::name) == (number), text);
#include "base/rank_words/words.def"

uint64_t Mix(uint64_t mixed, uint64_t part) {
  mixed = (mixed ^ part) * 0x100000001B3u;
  return mixed ^ (mixed >> 29);
}

// Equal on two ranks iff they launch the same operation on as many elements of the same unit; ranks
// of an all-to-all send as much as they like.
uint64_t Fingerprint(uint32_t group, CollectiveOp op, uint64_t count, int unit) {
  uint64_t mixed = 0xCBF29CE484222325u;
  if (op == CollectiveOp::kAllToAll) count = 0;
  for (const uint64_t part : {uint64_t{group}, static_cast<uint64_t>(op), count,
                              static_cast<uint64_t>(static_cast<uint32_t>(unit))}) {
    mixed = Mix(mixed, part);
  }
  return mixed;
}

uint16_t ElementBytes(CollectiveOp op) {
  switch (op) {
    case CollectiveOp::kAllReduceDouble:
      return 8;
    case CollectiveOp::kAllGather:
    case CollectiveOp::kAllToAll:
      return 1;
    case CollectiveOp::kReduceScatterBf16:
      return 2;
    case CollectiveOp::kAllReduceFloat:
    case CollectiveOp::kReduceScatterFloat:
      break;
  }
  return 4;
}

// A failed collective never ended: its entry stays open, which is what a report looks for.
Status End(control::CollectiveEntry* entry, const Status& status) {
  if (status.ok()) {
    entry->ended_ns = control::BootTimeNs();
  }
  return status;
}

// The time that a rank waits is not its own: it is the last rank's to arrive (17.4).
template <typename Body>
auto Waiting(control::RankPage* page, const Body& body) {
  page->BeginWait();
  auto result = body();
  page->EndWait();
  return result;
}

class RecordedPending : public Pending {
 public:
  RecordedPending(std::unique_ptr<Pending> pending, control::RankPage* page,
                  control::CollectiveEntry* entry)
      : pending_(std::move(pending)), page_(page), entry_(entry) {}
  Status Wait() override {
    return End(entry_, Waiting(page_, [this] { return pending_->Wait(); }));
  }

 private:
  std::unique_ptr<Pending> pending_;
  control::RankPage* const page_;
  control::CollectiveEntry* const entry_;
};

class Recorded : public Communicator {
 public:
  Recorded(std::unique_ptr<Communicator> group, uint32_t group_id, control::RankPage* page)
      : group_(std::move(group)), group_id_(group_id), page_(page) {}

  int rank() const override { return group_->rank(); }
  int world_size() const override { return group_->world_size(); }
  std::string backend() const override { return group_->backend(); }
  void SetTimeout(std::chrono::milliseconds timeout) override { group_->SetTimeout(timeout); }
  void Abort() override { group_->Abort(); }
  uint64_t Launched() const override { return launched_; }

  Status AllReduceSum(std::span<float> values, int unit) override {
    control::CollectiveEntry* entry = Launch(CollectiveOp::kAllReduceFloat, values.size(), unit);
    return End(entry, Waiting(page_, [&] { return group_->AllReduceSum(values, unit); }));
  }
  Status AllReduceSum(std::span<double> values) override {
    control::CollectiveEntry* entry =
        Launch(CollectiveOp::kAllReduceDouble, values.size(), kNoUnit);
    return End(entry, Waiting(page_, [&] { return group_->AllReduceSum(values); }));
  }
  StatusOr<std::unique_ptr<Pending>> StartAllGather(std::span<const std::byte> mine,
                                                    std::span<std::byte> all, int unit) override {
    control::CollectiveEntry* entry = Launch(CollectiveOp::kAllGather, all.size(), unit);
    ASSIGN_OR_RETURN(std::unique_ptr<Pending> pending, group_->StartAllGather(mine, all, unit));
    return Wrap(std::move(pending), entry);
  }
  StatusOr<std::unique_ptr<Pending>> StartReduceScatterSum(std::span<const float> all,
                                                           std::span<float> sum, Wire wire,
                                                           int unit) override {
    const CollectiveOp op =
        wire == Wire::kFp32 ? CollectiveOp::kReduceScatterFloat : CollectiveOp::kReduceScatterBf16;
    control::CollectiveEntry* entry = Launch(op, all.size(), unit);
    ASSIGN_OR_RETURN(std::unique_ptr<Pending> pending,
                     group_->StartReduceScatterSum(all, sum, wire, unit));
    return Wrap(std::move(pending), entry);
  }
  StatusOr<std::unique_ptr<Pending>> StartAllToAll(std::span<const std::byte> sent,
                                                   std::span<const size_t> sent_bytes,
                                                   std::span<std::byte> received,
                                                   std::span<const size_t> received_bytes,
                                                   int unit) override {
    control::CollectiveEntry* entry = Launch(CollectiveOp::kAllToAll, sent.size(), unit);
    ASSIGN_OR_RETURN(std::unique_ptr<Pending> pending,
                     group_->StartAllToAll(sent, sent_bytes, received, received_bytes, unit));
    return Wrap(std::move(pending), entry);
  }

 private:
  control::CollectiveEntry* Launch(CollectiveOp op, uint64_t count, int unit) {
    const uint64_t seq = ++seq_;
    control::CollectiveEntry* entry = &page_->ring()[seq % control::kRingEntries];
    const int64_t now = control::BootTimeNs();
    const uint64_t fingerprint = Fingerprint(group_id_, op, count, unit);
    launched_ = Mix(launched_, fingerprint);
    *entry = {.seq = seq,
              .group = group_id_,
              .op = static_cast<uint16_t>(op),
              .dtype = ElementBytes(op),
              .count = count,
              .unit = static_cast<uint32_t>(unit),
              .fingerprint = fingerprint,
              .launched_ns = now,
              .started_ns = now,
              .ended_ns = 0};
    page_->ring_head().store(seq, std::memory_order_release);
    return entry;
  }

  std::unique_ptr<Pending> Wrap(std::unique_ptr<Pending> pending, control::CollectiveEntry* entry) {
    return std::make_unique<RecordedPending>(std::move(pending), page_, entry);
  }

  std::unique_ptr<Communicator> group_;
  const uint32_t group_id_;
  control::RankPage* const page_;
  uint64_t seq_ = 0;
  uint64_t launched_ = 0;
};

}  // namespace

std::unique_ptr<Communicator> MakeRecorded(std::unique_ptr<Communicator> group, uint32_t group_id,
                                           control::RankPage* page) {
  return std::make_unique<Recorded>(std::move(group), group_id, page);
}

}  // namespace heddle::comm
