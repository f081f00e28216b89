// Random sequences of every call against a model in memory: every byte of every block is compared
// each time it is pinned, the bound is looked at after every call, and whatever gives way is what a
// look at all blocks gives.
#include <gtest/gtest.h>

#include <map>
#include <tuple>

#include "tests/worker/offload/offload_test_util.h"

namespace heddle::offload {
namespace {

constexpr uint32_t kSlots = 30;
constexpr int64_t kPinnedMost = 3;

struct Pinned {
  Block block;
  std::byte* data;
};

std::vector<SlotBytes> RandomSlots(RngCursor& random) {
  std::vector<SlotBytes> slots(kSlots);
  for (SlotBytes& slot : slots) {
    // Few sizes, so that memory is handed on, and some that are not whole pages.
    for (int64_t& bytes : slot) bytes = static_cast<int64_t>(random.Below(5) * 5000);
  }
  slots[0] = {1, 4096, 20'000};
  return slots;
}

class RandomTest : public ::testing::TestWithParam<std::tuple<const char*, int>> {
 protected:
  void Run(uint64_t seed, int steps) {
    SCOPED_TRACE(Str("seed ", seed));
    RngCursor random(Rng(seed, "test.offload"));
    const std::vector<SlotBytes> slots = RandomSlots(random);
    const BlockTable table = *BlockTable::Make(slots);
    Prepare(table);
    const auto [name, percent] = GetParam();
    int64_t largest = 0;
    int64_t total = 0;
    for (uint32_t block = 0; block < table.size(); ++block) {
      largest = std::max(largest, table.MemoryBytes(block));
      total += table.MemoryBytes(block);
    }
    budget_ = std::max(total * percent / 100, kPinnedMost * largest);
    StatusOr<std::unique_ptr<Home>> home = MakeHomeNamed(name, dir_.path(), table);
    ASSERT_OK(home);
    ASSERT_OK_AND_ASSIGN(set_,
                         ResidentSet::Create(table,
                                             {.budget_bytes = budget_,
                                              .min_pinned_bytes = kPinnedMost * largest,
                                              .transfers = 1 + static_cast<int>(random.Below(8)),
                                              .check_order = true},
                                             *std::move(home)));
    for (int step = 0; step < steps && !HasFailure(); ++step) Step(random);
    EXPECT_LE(set_->TakeStats().peak_bytes, budget_);
    set_.reset();
  }

  void Prepare(const BlockTable& table) {
    pinned_.clear();
    expected_.clear();
    contents_.assign(table.size(), {});
    blocks_.clear();
    for (uint32_t number = 0; number < table.size(); ++number) {
      contents_[number].resize(static_cast<size_t>(table.Bytes(number)));
      if (table.Bytes(number) > 0) blocks_.push_back(table.At(number));
    }
  }

  std::vector<std::byte>& ContentsOf(Block block) {
    return contents_[block.slot * kKinds + static_cast<size_t>(block.kind)];
  }

  void Step(RngCursor& random) {
    const uint64_t what = random.Below(100);
    if (what < 5) {
      AnnounceSome(random);
    } else if (what < 8) {
      DiscardOne(random);
    } else if (pinned_.size() < kPinnedMost && what < 55) {
      PinOne(random);
    } else if (!pinned_.empty()) {
      UnpinOne(random);
    }
    const ResidentSetStats stats = set_->TakeStats();
    ASSERT_LE(stats.resident_bytes, budget_);
    ASSERT_LE(stats.peak_bytes, budget_);
  }

  void AnnounceSome(RngCursor& random) {
    expected_.clear();
    for (uint64_t n = random.Below(60); n > 0; --n) {
      expected_.push_back(
          {blocks_[random.Below(blocks_.size())], static_cast<Access>(random.Below(3))});
    }
    at_ = 0;
    ASSERT_OK(set_->Expect(expected_));
  }

  void PinOne(RngCursor& random) {
    ExpectedUse use = {blocks_[random.Below(blocks_.size())], static_cast<Access>(random.Below(3))};
    // Mostly as announced, with jumps, other blocks and other accesses in between.
    if (at_ < expected_.size() && random.Below(10) > 0) use = expected_[at_++];
    if (random.Below(20) == 0) ++at_;
    if (random.Below(20) == 0) use.access = static_cast<Access>(random.Below(3));
    const auto same = [&use](const Pinned& other) {
      return other.block.slot == use.block.slot && other.block.kind == use.block.kind;
    };
    // Two pins of a block may share it, but not to overwrite it.
    if (std::ranges::any_of(pinned_, same)) use.access = Access::kRead;
    ASSERT_OK_AND_ASSIGN(std::byte* const data,
                         set_->Pin(use.block.slot, use.block.kind, use.access));
    ASSERT_EQ(reinterpret_cast<uintptr_t>(data) % kPageBytes, 0u);
    std::vector<std::byte>& contents = ContentsOf(use.block);
    if (use.access == Access::kOverwrite) {
      contents = Contents(use.block.slot, random.Next(), static_cast<int64_t>(contents.size()));
      std::ranges::copy(contents, data);
    }
    ASSERT_TRUE(Equal(data, contents)) << Str(use.block);
    if (use.access == Access::kUpdate) {
      for (int i = 0; i < 3; ++i) {
        const size_t at = random.Below(contents.size());
        contents[at] = data[at] = static_cast<std::byte>(random.Below(256));
      }
    }
    pinned_.push_back({use.block, data});
  }

  void UnpinOne(RngCursor& random) {
    const size_t which = random.Below(pinned_.size());
    const Pinned pinned = pinned_[which];
    pinned_.erase(pinned_.begin() + static_cast<std::ptrdiff_t>(which));
    ASSERT_TRUE(Equal(pinned.data, ContentsOf(pinned.block))) << Str(pinned.block);
    ASSERT_OK(set_->Unpin(pinned.block.slot, pinned.block.kind));
  }

  void DiscardOne(RngCursor& random) {
    const Block block = blocks_[random.Below(blocks_.size())];
    const Status status = set_->Discard(block.slot, block.kind);
    if (status.code() == StatusCode::kFailedPrecondition) return;  // pinned
    ASSERT_OK(status);
    std::ranges::fill(ContentsOf(block), std::byte{0});
  }

  DiskDir dir_;
  std::unique_ptr<ResidentSet> set_;
  int64_t budget_ = 0;
  std::vector<std::vector<std::byte>> contents_;  // by number
  std::vector<Block> blocks_;
  std::vector<ExpectedUse> expected_;
  size_t at_ = 0;
  std::vector<Pinned> pinned_;
};

TEST_P(RandomTest, EveryByteIsThatOfTheModel) {
  if (std::string_view(std::get<0>(GetParam())) == "io_uring") {
    if (const Status status = UringHere(); !status.ok()) GTEST_SKIP() << status.ToString();
  }
  for (uint64_t seed = 1; seed <= 4 && !HasFailure(); ++seed) Run(seed, 1500);
}

INSTANTIATE_TEST_SUITE_P(HomesAndBudgets, RandomTest,
                         ::testing::Combine(::testing::Values("io_uring", "threads", "arena"),
                                            ::testing::Values(100, 50, 10)),
                         [](const auto& info) {
                           return Str(std::get<0>(info.param), "_", std::get<1>(info.param),
                                      "_percent");
                         });

}  // namespace
}  // namespace heddle::offload
