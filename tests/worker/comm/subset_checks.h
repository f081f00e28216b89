// Four ranks in two subsets of two, and what a group of two alone makes of the same values.
#pragma once

#include <array>
#include <vector>

#include "tests/worker/comm/exchange_checks.h"
#include "tests/worker/comm/group_checks.h"
#include "worker/comm/subset.h"

namespace heddle::comm {

using Pairs = std::array<std::vector<int>, 2>;
// Neighbours, and ranks of a column.
inline const std::array<Pairs, 2> kPairs = {Pairs{{{0, 1}, {2, 3}}}, Pairs{{{0, 2}, {1, 3}}}};

inline const std::vector<int>& MembersWith(const Pairs& pairs, int rank) {
  const std::vector<int>& first = pairs[0];
  return first[0] == rank || first[1] == rank ? first : pairs[1];
}
// By which the values of subsets differ.
inline int SaltOf(const std::vector<int>& members) { return 1 + members[0]; }
inline constexpr int kSalts[] = {1, 2, 3};

// What this rank of `whole` computes within its pair.
inline std::vector<float> SubsetResults(Communicator* whole, const Pairs& pairs) {
  const std::vector<int>& members = MembersWith(pairs, whole->rank());
  const std::unique_ptr<Communicator> subset = MakeSubset(whole, members);
  EXPECT_EQ(subset->world_size(), 2);
  EXPECT_EQ(members[static_cast<size_t>(subset->rank())], whole->rank());
  EXPECT_EQ(subset->backend(), whole->backend());
  ExpectAllExchanges(subset.get(), SaltOf(members));
  return AllResults(subset->rank(), subset.get(), SaltOf(members));
}

}  // namespace heddle::comm
