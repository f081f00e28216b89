// Four ranks in two subsets of two, and what a group of two alone makes of the same values.
#pragma once

#include <signal.h>

#include <array>
#include <chrono>
#include <memory>
#include <span>
#include <string>
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
inline std::vector<float> SubsetResults(Communicator* whole, const Pairs& pairs,
                                        size_t largest = 1'200'001) {
  const std::vector<int>& members = MembersWith(pairs, whole->rank());
  const std::unique_ptr<Communicator> subset = MakeSubset(whole, members);
  EXPECT_EQ(subset->world_size(), 2);
  EXPECT_EQ(members[static_cast<size_t>(subset->rank())], whole->rank());
  EXPECT_EQ(subset->backend(), whole->backend());
  ExpectAllExchanges(subset.get(), SaltOf(members));
  return AllResults(subset->rank(), subset.get(), SaltOf(members), largest);
}

// Rank 3 dies in the third sum; what is wrong with how the others end.
inline std::string DieOrSurvive(Communicator* whole, const Pairs& pairs) {
  whole->SetTimeout(std::chrono::milliseconds(3000));
  const auto subset = MakeSubset(whole, MembersWith(pairs, whole->rank()));
  std::vector<float> values(100'000, 1.0f);
  for (int i = 0; i < 2; ++i) {
    if (!subset->AllReduceSum(std::span<float>(values), kNoUnit).ok()) return "no first sums";
  }
  if (values[0] != 4.0f) return "another sum";
  if (whole->rank() == 3) raise(SIGKILL);
  const auto begin = std::chrono::steady_clock::now();
  Status end = OkStatus();
  // The others' part of a sum may be done before they miss the dead one.
  for (int i = 0; i < 3 && end.ok(); ++i)
    end = subset->AllReduceSum(std::span<float>(values), kNoUnit);
  if (end.code() != StatusCode::kUnavailable) return "no error: " + Message(end);
  return std::chrono::steady_clock::now() - begin < std::chrono::milliseconds(6000)
             ? ""
             : "it took too long";
}

}  // namespace heddle::comm
