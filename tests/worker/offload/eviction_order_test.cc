#include "worker/offload/eviction_order.h"

#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <optional>

#include "base/rng/rng.h"
#include "base/status/status.h"

namespace heddle::offload {
namespace {

constexpr size_t kNever = std::numeric_limits<size_t>::max();

// What First is to give: the rule, one block after the other.
std::optional<uint32_t> Choice(const std::map<uint32_t, EvictionOrder::Turn>& may_go,
                               std::optional<uint32_t> kept) {
  std::optional<uint32_t> chosen;
  for (const auto& [block, turn] : may_go) {
    if (block == kept) continue;
    if (chosen) {
      const EvictionOrder::Turn& other = may_go.at(*chosen);
      if (turn.next < other.next || (turn.next == other.next && turn.used >= other.used)) continue;
    }
    chosen = block;
  }
  return chosen;
}

TEST(EvictionOrder, TakesWhatIsExpectedLastAndOfTheRestTheOldest) {
  EvictionOrder order(5);
  EXPECT_EQ(order.First({}), std::nullopt);
  order.Put(0, {.next = 3, .used = 1});
  order.Put(1, {.next = 7, .used = 9});
  EXPECT_EQ(order.First({}), 1u);
  order.Put(2, {.next = kNever, .used = 5});
  order.Put(3, {.next = kNever, .used = 4});
  order.Put(4, {.next = kNever, .used = 4});
  EXPECT_EQ(order.First({}), 3u) << "of equals the first";
  EXPECT_EQ(order.First(3), 4u);
  order.Drop(3);
  order.Drop(4);
  EXPECT_EQ(order.First({}), 2u);
  order.Renew([](uint32_t block) -> size_t { return block == 0 ? kNever : block; });
  EXPECT_EQ(order.First({}), 0u);
  EXPECT_EQ(order.First(0), 2u);
}

TEST(EvictionOrder, ChoosesAsALookAtAllBlocksDoes) {
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    SCOPED_TRACE(Str("seed ", seed));
    RngCursor random(Rng(seed, "test.order"));
    const auto blocks = static_cast<uint32_t>(1 + random.Below(60));
    EvictionOrder order(blocks);
    std::map<uint32_t, EvictionOrder::Turn> may_go;
    // Few numbers, so that many are equal.
    const auto next = [&random] { return random.Below(3) == 0 ? kNever : random.Below(20); };
    for (int step = 0; step < 3000; ++step) {
      const auto block = static_cast<uint32_t>(random.Below(blocks));
      const uint64_t what = random.Below(100);
      if (what < 2) {
        std::map<uint32_t, size_t> renewed;
        for (auto& [number, turn] : may_go) renewed[number] = turn.next = next();
        order.Renew([&renewed](uint32_t number) { return renewed.at(number); });
      } else if (what < 40) {
        may_go.erase(block);
        order.Drop(block);
      } else {
        may_go[block] = {.next = next(), .used = random.Below(8)};
        order.Put(block, may_go[block]);
      }
      const std::optional<uint32_t> kept =
          random.Below(2) == 0 ? std::nullopt : order.First(std::nullopt);
      ASSERT_EQ(order.First(kept), Choice(may_go, kept));
    }
  }
}

}  // namespace
}  // namespace heddle::offload
