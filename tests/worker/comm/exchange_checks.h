// All-to-alls of uneven slices on a group of any back end, and what ought to come of them.
#pragma once

#include <gtest/gtest.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <vector>

#include "tests/support/status_matchers.h"
#include "worker/comm/communicator.h"

namespace heddle::comm {

using Sizes = std::vector<std::vector<size_t>>;  // [from][to], in bytes

inline Sizes EqualSizes(int world, size_t bytes) {
  const size_t ranks = static_cast<size_t>(world);
  return Sizes(ranks, std::vector<size_t>(ranks, bytes));
}

// A third of the pairs has nothing to say.
inline Sizes RandomSizes(uint64_t seed, int world, size_t most) {
  std::mt19937_64 random(seed);
  Sizes sizes = EqualSizes(world, 0);
  for (std::vector<size_t>& row : sizes) {
    for (size_t& size : row) size = random() % 3 == 0 ? 0 : random() % (most + 1);
  }
  return sizes;
}

inline std::vector<std::byte> SliceBetween(size_t from, size_t to, size_t bytes, uint64_t salt) {
  std::vector<std::byte> slice(bytes);
  uint64_t state = (from + 1) * 1'000'003 + (to + 1) * 10'007 + salt;
  for (std::byte& byte : slice) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    byte = static_cast<std::byte>(state >> 56);
  }
  return slice;
}

// One rank's part of an exchange. Outlives the operation.
struct Exchanged {
  Exchanged(size_t rank, const Sizes& sizes, uint64_t salt) {
    for (size_t peer = 0; peer < sizes.size(); ++peer) {
      sent_bytes.push_back(sizes[rank][peer]);
      received_bytes.push_back(sizes[peer][rank]);
      const auto give = SliceBetween(rank, peer, sent_bytes.back(), salt);
      const auto take = SliceBetween(peer, rank, received_bytes.back(), salt);
      sent.insert(sent.end(), give.begin(), give.end());
      expected.insert(expected.end(), take.begin(), take.end());
    }
    received.assign(expected.size(), std::byte{0xEE});
  }
  StatusOr<std::unique_ptr<Pending>> Start(Communicator* group, int unit = 0) {
    return group->StartAllToAll(sent, sent_bytes, received, received_bytes, unit);
  }
  std::vector<std::byte> sent;
  std::vector<size_t> sent_bytes;
  std::vector<std::byte> received;
  std::vector<size_t> received_bytes;
  std::vector<std::byte> expected;
};

inline void ExpectExchanged(Communicator* group, const Sizes& sizes, uint64_t salt) {
  Exchanged mine(static_cast<size_t>(group->rank()), sizes, salt);
  auto pending = mine.Start(group);
  ASSERT_OK(pending.status());
  ASSERT_OK((*pending)->Wait());
  EXPECT_TRUE(mine.received == mine.expected) << "rank " << group->rank() << ", salt " << salt;
}

// Two at a time and a gather between them, waited for out of order.
inline void ExpectExchangedOutOfOrder(Communicator* group, uint64_t salt) {
  const int world = group->world_size();
  const size_t rank = static_cast<size_t>(group->rank());
  Exchanged first(rank, RandomSizes(salt, world, 9000), salt);
  Exchanged second(rank, RandomSizes(salt + 1, world, 90'000), salt + 1);
  const std::vector<size_t> mine = {rank};
  std::vector<size_t> all(static_cast<size_t>(world), 99);
  auto one = first.Start(group, 1);
  auto gather = group->StartAllGather(std::as_bytes(std::span<const size_t>(mine)),
                                      std::as_writable_bytes(std::span<size_t>(all)), 2);
  auto two = second.Start(group, 3);
  ASSERT_OK(two.status());
  ASSERT_OK((*two)->Wait());
  ASSERT_OK((*one)->Wait());
  ASSERT_OK((*gather)->Wait());
  EXPECT_TRUE(first.received == first.expected);
  EXPECT_TRUE(second.received == second.expected);
  for (size_t r = 0; r < all.size(); ++r) EXPECT_EQ(all[r], r);
}

// All ranks at the same time. `salt` as in AllResults.
inline void ExpectAllExchanges(Communicator* group, int salt = 0) {
  const int world = group->world_size();
  const size_t last = static_cast<size_t>(world) - 1;
  const uint64_t base = 1000 * (static_cast<uint64_t>(salt) + 1);
  for (uint64_t seed = base; seed < base + 6; ++seed) {
    ExpectExchanged(group, RandomSizes(seed, world, seed % 2 == 0 ? 5 : 70'001), seed);
  }
  ExpectExchanged(group, EqualSizes(world, 0), base);
  ExpectExchanged(group, EqualSizes(world, 24), base);
  Sizes one_way = EqualSizes(world, 0);
  one_way[0][last] = 12'345;
  ExpectExchanged(group, one_way, base);
  Sizes silent = RandomSizes(base + 7, world, 4000);  // the last rank: nothing to say or to hear
  for (size_t r = 0; r <= last; ++r) silent[r][last] = silent[last][r] = 0;
  ExpectExchanged(group, silent, base);
  // More than slots of shared memory hold, from one rank much more than from the others.
  Sizes large = RandomSizes(base + 8, world, 3'000'000);
  large[last][0] = (size_t{9} << 20) + 3;
  ExpectExchanged(group, large, base);
  ExpectExchangedOutOfOrder(group, base + 20);
}

// Rank 0 sends rank 1 `sent` bytes, which expects another number.
inline Status ExchangeApart(Communicator* group, size_t sent, size_t expected) {
  Sizes sizes = EqualSizes(group->world_size(), 8);
  sizes[0][1] = group->rank() == 1 ? expected : sent;
  Exchanged mine(static_cast<size_t>(group->rank()), sizes, 0);
  ASSIGN_OR_RETURN(const std::unique_ptr<Pending> pending, mine.Start(group));
  return pending->Wait();
}

struct Apart {
  size_t sent;
  size_t expected;
};
// Less, more, nothing and something out of nothing.
inline constexpr Apart kApart[] = {{100, 60}, {100, 140}, {100, 0}, {0, 50}};

inline std::string ApartText(const Apart& apart) {
  return Str("rank 0 sends ", apart.sent, " bytes to rank 1, which expects ", apart.expected);
}

}  // namespace heddle::comm
