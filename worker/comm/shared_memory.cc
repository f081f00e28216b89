#include "worker/comm/shared_memory.h"

#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <deque>
#include <fstream>
#include <string>
#include <utility>
#include <vector>

#include "worker/comm/ordered_sum.h"
#include "worker/comm/shared_segment.h"
#include "worker/comm/transport.h"

namespace heddle::comm {

namespace {

// A collective in rounds. Run(round) is called for rounds 0, 1, .. in turn; Fill may run long
// before Read, for the first round of a collective that nothing is ahead of.
class Operation {
 public:
  virtual ~Operation() = default;
  // May grow with what round 0 tells, in the same way on all ranks.
  virtual size_t rounds() const = 0;
  // Equal on all ranks, or they would read each other's bytes as what they are not.
  virtual uint64_t tag() const = 0;
  // This rank's part of a round into its slot.
  virtual void Fill(size_t round, std::byte* slot) = 0;
  // What this rank wants of the round, from everybody's slots.
  virtual void Read(size_t round, const std::vector<const std::byte*>& slots) = 0;
  // Of what was read so far.
  virtual Status verdict() const { return OkStatus(); }
};

// Kind in the low bits, elements above, the unit in the highest 16: all ones without one.
constexpr int kUnitShift = 48;
constexpr uint64_t Tag(uint64_t kind, size_t elements, int unit = kNoUnit) {
  return (static_cast<uint64_t>(unit) << kUnitShift) + elements * 8 + kind;
}

std::string TagText(uint64_t tag) {
  constexpr const char* kKinds[] = {"no collective",  "all-gather", "reduce-scatter",
                                    "reduce-scatter", "agreement",  "all-reduce",
                                    "all-to-all",     "unknown"};
  const uint64_t elements = (tag & ((uint64_t{1} << kUnitShift) - 1)) / 8;
  const uint64_t unit = tag >> kUnitShift;
  const bool of_unit = tag % 8 != 0 && unit != Tag(0, 0) >> kUnitShift;
  return Str(kKinds[tag % 8], tag % 8 == 6 ? "" : Str(" of ", elements, " elements"),
             tag % 8 == 3 ? " in bf16" : "", of_unit ? Str(" of unit ", unit) : "");
}

size_t Rounds(size_t total, size_t part) { return (total + part - 1) / part; }

class AllGather : public Operation {
 public:
  AllGather(std::span<const std::byte> mine, std::span<std::byte> all, int unit, size_t slot_bytes)
      : mine_(mine), all_(all), unit_(unit), part_(slot_bytes) {}
  size_t rounds() const override { return Rounds(mine_.size(), part_); }
  uint64_t tag() const override { return Tag(1, all_.size(), unit_); }
  void Fill(size_t round, std::byte* slot) override {
    const std::span<const std::byte> part = PartOf(round);
    std::memcpy(slot, part.data(), part.size());
  }
  void Read(size_t round, const std::vector<const std::byte*>& slots) override {
    const size_t size = PartOf(round).size();
    for (size_t r = 0; r < slots.size(); ++r) {
      std::memcpy(all_.data() + r * mine_.size() + round * part_, slots[r], size);
    }
  }

 private:
  std::span<const std::byte> PartOf(size_t round) const {
    return mine_.subspan(round * part_, std::min(part_, mine_.size() - round * part_));
  }
  const std::span<const std::byte> mine_;
  const std::span<std::byte> all_;
  const int unit_;
  const size_t part_;
};

// A slot holds one piece per rank that reads it.
template <typename T>
class ReduceScatter : public Operation {
 public:
  ReduceScatter(std::span<const float> all, std::span<float> sum, int unit, int rank, size_t world,
                size_t slot_bytes)
      : all_(all),
        sum_(sum),
        unit_(unit),
        rank_(static_cast<size_t>(rank)),
        world_(world),
        piece_(slot_bytes / (world * sizeof(T)) / 64 * 64) {}
  size_t rounds() const override { return Rounds(sum_.size(), piece_); }
  uint64_t tag() const override {
    return Tag(sizeof(T) == sizeof(float) ? 2 : 3, all_.size(), unit_);
  }
  void Fill(size_t round, std::byte* slot) override {
    const size_t count = CountOf(round);
    for (size_t r = 0; r < world_; ++r) {
      const float* from = all_.data() + r * sum_.size() + round * piece_;
      T* to = reinterpret_cast<T*>(slot) + r * piece_;
      if constexpr (sizeof(T) == sizeof(float)) {
        std::memcpy(to, from, count * sizeof(float));
      } else {
        RoundToBf16(from, count, to);
      }
    }
  }
  void Read(size_t round, const std::vector<const std::byte*>& slots) override {
    std::vector<const T*> rows;
    for (const std::byte* slot : slots) {
      rows.push_back(reinterpret_cast<const T*>(slot) + rank_ * piece_);
    }
    OrderedSum(rows.data(), world_, CountOf(round), sum_.data() + round * piece_);
  }

 private:
  size_t CountOf(size_t round) const { return std::min(piece_, sum_.size() - round * piece_); }
  const std::span<const float> all_;
  const std::span<float> sum_;
  const int unit_;
  const size_t rank_;
  const size_t world_;
  const size_t piece_;
};

// A few numbers: every rank adds up everything.
class SmallSum : public Operation {
 public:
  explicit SmallSum(std::span<double> values) : values_(values) {}
  size_t rounds() const override { return values_.empty() ? 0 : 1; }
  uint64_t tag() const override { return Tag(4, values_.size()); }
  void Fill(size_t, std::byte* slot) override {
    std::memcpy(slot, values_.data(), values_.size_bytes());
  }
  void Read(size_t, const std::vector<const std::byte*>& slots) override {
    std::vector<const double*> rows;
    for (const std::byte* slot : slots) rows.push_back(reinterpret_cast<const double*>(slot));
    OrderedSum(rows.data(), rows.size(), values_.size(), values_.data());
  }

 private:
  const std::span<double> values_;
};

// Sums a bucket in two rounds: every rank adds up its slice, then all read all slices.
class AllReduce : public Operation {
 public:
  AllReduce(std::span<float> values, int unit, int rank, size_t world, size_t slot_bytes)
      : values_(values),
        unit_(unit),
        rank_(static_cast<size_t>(rank)),
        world_(world),
        bucket_(slot_bytes / sizeof(float)) {}
  size_t rounds() const override { return 2 * Rounds(values_.size(), bucket_); }
  uint64_t tag() const override { return Tag(5, values_.size(), unit_); }
  void Fill(size_t round, std::byte* slot) override {
    const std::span<float> from = round % 2 == 0 ? Bucket(round) : Slice(round, rank_);
    std::memcpy(slot, from.data(), from.size_bytes());
  }
  void Read(size_t round, const std::vector<const std::byte*>& slots) override {
    if (round % 2 == 0) {
      const std::span<float> mine = Slice(round, rank_);
      const size_t offset = static_cast<size_t>(mine.data() - Bucket(round).data());
      std::vector<const float*> rows;
      for (const std::byte* slot : slots) {
        rows.push_back(reinterpret_cast<const float*>(slot) + offset);
      }
      OrderedSum(rows.data(), world_, mine.size(), mine.data());
      return;
    }
    for (size_t r = 0; r < world_; ++r) {
      const std::span<float> to = Slice(round, r);
      std::memcpy(to.data(), slots[r], to.size_bytes());
    }
  }

 private:
  std::span<float> Bucket(size_t round) const {
    const size_t begin = round / 2 * bucket_;
    return values_.subspan(begin, std::min(bucket_, values_.size() - begin));
  }
  std::span<float> Slice(size_t round, size_t rank) const {
    const std::span<float> bucket = Bucket(round);
    const size_t begin = bucket.size() * rank / world_;
    return bucket.subspan(begin, bucket.size() * (rank + 1) / world_ - begin);
  }
  const std::span<float> values_;
  const int unit_;
  const size_t rank_;
  const size_t world_;
  const size_t bucket_;
};

// A rank's slots hold what it sends, end to end, whoever it is for: one that sends much to one peer
// fills them too. In front of round 0 stand the sizes of its slices, so that all know how many
// rounds there are and where their own slices lie.
class AllToAll : public Operation {
 public:
  AllToAll(std::span<const std::byte> sent, std::span<const size_t> sent_bytes,
           std::span<std::byte> received, std::span<const size_t> received_bytes, int unit,
           int rank, size_t slot_bytes)
      : sent_(sent),
        sent_bytes_(sent_bytes.begin(), sent_bytes.end()),
        received_(received),
        received_bytes_(received_bytes.begin(), received_bytes.end()),
        unit_(unit),
        rank_(rank),
        header_((sent_bytes.size() * sizeof(uint64_t) + 63) / 64 * 64),
        part_(slot_bytes - header_) {}
  size_t rounds() const override { return rounds_; }
  uint64_t tag() const override { return Tag(6, 0, unit_); }
  void Fill(size_t round, std::byte* slot) override {
    if (round == 0) std::memcpy(slot, sent_bytes_.data(), sent_bytes_.size() * sizeof(uint64_t));
    const size_t begin = std::min(sent_.size(), round * part_);
    const size_t size = std::min(part_, sent_.size() - begin);
    if (size > 0) std::memcpy(slot + header_, sent_.data() + begin, size);
  }
  void Read(size_t round, const std::vector<const std::byte*>& slots) override {
    if (round == 0) TakeSizes(slots);
    if (!verdict_.ok()) return;
    size_t at = 0;
    for (size_t r = 0; r < slots.size(); at += received_bytes_[r++]) {
      // The round's part of r's bytes, and of it what lies in the slice for this rank.
      const size_t part = round * part_;
      const size_t begin = std::max(slices_[r], part);
      const size_t end = std::min(slices_[r] + received_bytes_[r], part + part_);
      if (begin >= end) continue;
      std::memcpy(received_.data() + at + (begin - slices_[r]), slots[r] + header_ + (begin - part),
                  end - begin);
    }
  }
  Status verdict() const override { return verdict_; }

 private:
  void TakeSizes(const std::vector<const std::byte*>& slots) {
    const size_t own = static_cast<size_t>(rank_);
    for (size_t r = 0; r < slots.size(); ++r) {
      std::vector<uint64_t> sizes(slots.size());
      std::memcpy(sizes.data(), slots[r], sizes.size() * sizeof(uint64_t));
      size_t total = 0;
      for (size_t to = 0; to < sizes.size(); ++to) {
        if (to == own) slices_.push_back(total);
        total += sizes[to];
      }
      rounds_ = std::max(rounds_, Rounds(total, part_));
      if (sizes[own] != received_bytes_[r] && verdict_.ok()) {
        verdict_ = SizeMismatch(rank_, static_cast<int>(r), sizes[own], received_bytes_[r]);
      }
    }
  }

  const std::span<const std::byte> sent_;
  const std::vector<uint64_t> sent_bytes_;
  const std::span<std::byte> received_;
  const std::vector<size_t> received_bytes_;
  const int unit_;
  const int rank_;
  const size_t header_;  // bytes in front of every round's part
  const size_t part_;
  size_t rounds_ = 1;
  std::vector<size_t> slices_;  // where the slice for this rank begins in what a rank sends
  Status verdict_;
};

// Operations are carried out in the order of their starts, by whoever waits: there is no thread of
// its own, since memory is copied by the same cores that compute.
class SharedMemory : public Communicator {
 public:
  SharedMemory(std::unique_ptr<Communicator> base, std::unique_ptr<SharedSegment> segment)
      : base_(std::move(base)), segment_(std::move(segment)) {}

  int rank() const override { return base_->rank(); }
  int world_size() const override { return base_->world_size(); }
  std::string backend() const override { return base_->backend() + " over shared memory"; }
  void SetTimeout(std::chrono::milliseconds timeout) override {
    timeout_ = timeout;
    base_->SetTimeout(timeout);
  }
  void Abort() override {
    dead_ = true;
    segment_->Abort();
    base_->Abort();
  }

  Status AllReduceSum(std::span<float> values, int unit) override {
    return RunNow(
        std::make_unique<AllReduce>(values, unit, rank(), World(), segment_->slot_bytes()));
  }
  Status AllReduceSum(std::span<double> values) override {
    if (values.size_bytes() > segment_->slot_bytes()) return base_->AllReduceSum(values);
    return RunNow(std::make_unique<SmallSum>(values));
  }
  StatusOr<std::unique_ptr<Pending>> StartAllGather(std::span<const std::byte> mine,
                                                    std::span<std::byte> all, int unit) override {
    return Start(std::make_unique<AllGather>(mine, all, unit, segment_->slot_bytes()));
  }
  StatusOr<std::unique_ptr<Pending>> StartReduceScatterSum(std::span<const float> all,
                                                           std::span<float> sum, Wire wire,
                                                           int unit) override {
    if (wire == Wire::kFp32) {
      return Start(std::make_unique<ReduceScatter<float>>(all, sum, unit, rank(), World(),
                                                          segment_->slot_bytes()));
    }
    return Start(std::make_unique<ReduceScatter<uint16_t>>(all, sum, unit, rank(), World(),
                                                           segment_->slot_bytes()));
  }
  StatusOr<std::unique_ptr<Pending>> StartAllToAll(std::span<const std::byte> sent,
                                                   std::span<const size_t> sent_bytes,
                                                   std::span<std::byte> received,
                                                   std::span<const size_t> received_bytes,
                                                   int unit) override {
    RETURN_IF_ERROR(
        CheckSlices(world_size(), sent.size(), sent_bytes, received.size(), received_bytes));
    return Start(std::make_unique<AllToAll>(sent, sent_bytes, received, received_bytes, unit,
                                            rank(), segment_->slot_bytes()));
  }

 private:
  class Waiting : public Pending {
   public:
    Waiting(SharedMemory* group, uint64_t number) : group_(group), number_(number) {}
    Status Wait() override { return group_->CompleteUpTo(number_); }

   private:
    SharedMemory* const group_;
    const uint64_t number_;
  };

  size_t World() const { return static_cast<size_t>(world_size()); }
  SharedSegment::Deadline DeadlineNow() const {
    return std::chrono::steady_clock::now() + timeout_;
  }

  StatusOr<std::unique_ptr<Pending>> Start(std::unique_ptr<Operation> operation) {
    if (dead_) return Unavailable("the group was aborted");
    queue_.push_back(std::move(operation));
    const uint64_t number = started_++;
    if (queue_.size() == 1 && queue_.front()->rounds() > 0) {
      RETURN_IF_ERROR(Guarded(FillNext(0)));
      filled_ = true;
    }
    return std::make_unique<Waiting>(this, number);
  }

  Status RunNow(std::unique_ptr<Operation> operation) {
    ASSIGN_OR_RETURN(const std::unique_ptr<Pending> pending, Start(std::move(operation)));
    return pending->Wait();
  }

  Status CompleteUpTo(uint64_t number) {
    if (dead_) return Unavailable("the group was aborted");
    while (completed_ <= number) {
      Operation& operation = *queue_.front();
      for (size_t round = 0; round < operation.rounds(); ++round) {
        if (!std::exchange(filled_, false)) RETURN_IF_ERROR(Guarded(FillNext(round)));
        RETURN_IF_ERROR(Guarded(ReadNext(round)));
      }
      queue_.pop_front();
      ++completed_;
    }
    // Peers need not wait for this rank's part of what comes next. It never blocks: who posted the
    // last round has read the one before.
    if (!queue_.empty() && queue_.front()->rounds() > 0 && !filled_) {
      RETURN_IF_ERROR(Guarded(FillNext(0)));
      filled_ = true;
    }
    return OkStatus();
  }

  Status FillNext(size_t round) {
    RETURN_IF_ERROR(segment_->AwaitFree(round_, DeadlineNow()));
    queue_.front()->Fill(round, segment_->slot(rank(), round_));
    segment_->Post(round_, queue_.front()->tag());
    return OkStatus();
  }

  Status ReadNext(size_t round) {
    RETURN_IF_ERROR(segment_->AwaitPosted(round_, DeadlineNow()));
    RETURN_IF_ERROR(CheckSame(queue_.front()->tag()));
    std::vector<const std::byte*> slots;
    for (int r = 0; r < world_size(); ++r) slots.push_back(segment_->slot(r, round_));
    queue_.front()->Read(round, slots);
    RETURN_IF_ERROR(queue_.front()->verdict());
    segment_->Finish(round_++);
    return OkStatus();
  }

  // Ranks that launched different collectives would take each other's bytes for their own kind.
  Status CheckSame(uint64_t tag) const {
    for (int r = 0; r < world_size(); ++r) {
      const uint64_t other = segment_->tag(r, round_);
      if (other == tag) continue;
      return Internal(Str("collective mismatch: rank ", rank(), " launched ", TagText(tag),
                          ", rank ", r, " ", TagText(other), " in its place"));
    }
    return OkStatus();
  }

  // After an error the group is dead.
  Status Guarded(const Status& status) {
    if (!status.ok()) Abort();
    return status;
  }

  std::unique_ptr<Communicator> base_;
  std::unique_ptr<SharedSegment> segment_;
  std::chrono::milliseconds timeout_{300'000};
  std::atomic<bool> dead_ = false;
  std::deque<std::unique_ptr<Operation>> queue_;
  uint64_t started_ = 0;
  uint64_t completed_ = 0;
  uint64_t round_ = 0;   // of the segment
  bool filled_ = false;  // this rank's slot of round_ has been posted
};

// Ranks can reach each other's descriptors iff they see the same kernel and the same processes.
struct Place {
  char boot[48] = {};
  uint64_t processes = 0;
  int32_t pid = 0;
  int32_t fd = -1;

  bool SameAs(const Place& other) const {
    return std::memcmp(boot, other.boot, sizeof(boot)) == 0 && processes == other.processes;
  }
};

Place PlaceOfThisProcess() {
  Place place;
  std::ifstream("/proc/sys/kernel/random/boot_id").getline(place.boot, sizeof(place.boot));
  struct stat information = {};
  if (stat("/proc/self/ns/pid", &information) == 0) place.processes = information.st_ino;
  place.pid = getpid();
  return place;
}

StatusOr<std::vector<Place>> GatherPlaces(Communicator* group, const Place& mine) {
  std::vector<Place> all(static_cast<size_t>(group->world_size()));
  ASSIGN_OR_RETURN(const std::unique_ptr<Pending> gather,
                   group->StartAllGather(std::as_bytes(std::span<const Place>(&mine, 1)),
                                         std::as_writable_bytes(std::span<Place>(all)), -1));
  RETURN_IF_ERROR(gather->Wait());
  return all;
}

// Whether all ranks say yes.
StatusOr<bool> AllAgree(Communicator* group, bool yes) {
  double no = yes ? 0 : 1;
  RETURN_IF_ERROR(group->AllReduceSum(std::span<double>(&no, 1)));
  return no == 0;
}

}  // namespace

StatusOr<std::unique_ptr<Communicator>> OverSharedMemory(std::unique_ptr<Communicator> group,
                                                         std::string* why_not) {
  const int world = group->world_size();
  Place mine = PlaceOfThisProcess();
  StatusOr<std::unique_ptr<SharedSegment>> segment = Unavailable("made by rank 0");
  if (group->rank() == 0) segment = SharedSegment::Create(world);
  if (segment.ok()) mine.fd = (*segment)->fd();
  ASSIGN_OR_RETURN(const std::vector<Place> places, GatherPlaces(group.get(), mine));
  const bool together = std::all_of(places.begin(), places.end(), [&](const Place& place) {
    return place.SameAs(places.front());
  });
  if (!together) {
    *why_not = "ranks are on several hosts";
    return group;
  }
  if (group->rank() != 0 && places.front().fd >= 0) {
    segment = SharedSegment::Open(places.front().pid, places.front().fd, world);
  }
  if (segment.ok()) (*segment)->Enter(group->rank());
  ASSIGN_OR_RETURN(const bool mapped, AllAgree(group.get(), segment.ok()));
  const Status watched = mapped ? (*segment)->WatchPeers() : OkStatus();
  ASSIGN_OR_RETURN(const bool ready, AllAgree(group.get(), mapped && watched.ok()));
  if (!ready) {
    *why_not = !segment.ok()   ? Message(segment.status())
               : !watched.ok() ? Message(watched)
                               : "another rank cannot map the memory";
    return group;
  }
  return std::make_unique<SharedMemory>(std::move(group), *std::move(segment));
}

}  // namespace heddle::comm
