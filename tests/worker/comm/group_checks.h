// Everything that a rank computes from collectives of many sizes, for comparing back ends bit by
// bit.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "tests/support/status_matchers.h"
#include "worker/comm/communicator.h"

namespace heddle::comm {

inline std::vector<float> RandomValues(uint64_t seed, size_t count) {
  std::mt19937_64 random(seed);
  std::uniform_real_distribution<float> values(-1.0f, 1.0f);
  std::vector<float> out(count);
  for (float& value : out) {
    value = values(random) * std::pow(10.0f, values(random) * 6);
  }
  return out;
}

// `salt`: of groups whose values are to be told apart. 1.2M floats are more than a slot of shared
// memory.
inline std::vector<float> AllResults(int rank, Communicator* group, int salt = 0,
                                     size_t largest = 1'200'001) {
  const size_t world = static_cast<size_t>(group->world_size());
  std::vector<float> found;
  const auto keep = [&](std::span<const float> values) {
    found.insert(found.end(), values.begin(), values.end());
  };
  for (const size_t count : {size_t{1}, size_t{7}, size_t{4096}, largest}) {
    const uint64_t seed = 100 * count + static_cast<uint64_t>(rank + 1'000'003 * salt);
    std::vector<float> reduced = RandomValues(seed, count);
    EXPECT_OK(group->AllReduceSum(std::span<float>(reduced), kNoUnit));
    keep(reduced);
    // Two under way at a time, waited for out of order.
    const std::vector<float> mine = RandomValues(seed + 1, count);
    std::vector<float> all(count * world);
    auto gather = group->StartAllGather(std::as_bytes(std::span<const float>(mine)),
                                        std::as_writable_bytes(std::span<float>(all)), 3);
    EXPECT_OK(gather.status());
    const std::vector<float> parts = RandomValues(seed + 2, count * world);
    std::vector<float> sum(count);
    std::vector<float> rounded(count);
    auto scatter = group->StartReduceScatterSum(parts, sum, Wire::kFp32, 4);
    auto narrow = group->StartReduceScatterSum(parts, rounded, Wire::kBf16, 5);
    EXPECT_OK(narrow.status());
    EXPECT_OK((*narrow)->Wait());
    EXPECT_OK((*gather)->Wait());
    EXPECT_OK((*scatter)->Wait());
    keep(all);
    keep(sum);
    keep(rounded);
  }
  std::vector<double> few = {0.1 * rank, 1e17 + salt, -1.0 - salt};
  EXPECT_OK(group->AllReduceSum(std::span<double>(few)));
  for (const double value : few) found.push_back(static_cast<float>(value));
  // A part in its own place; a part of nothing.
  std::vector<float> in_place(3 * world, -1.0f);
  const std::span<float> own = std::span<float>(in_place).subspan(3 * static_cast<size_t>(rank), 3);
  std::fill(own.begin(), own.end(), static_cast<float>(rank + 8 * salt) + 0.25f);
  for (const std::span<float> whole : {std::span<float>(in_place), std::span<float>()}) {
    const std::span<const float> part = whole.empty() ? std::span<const float>() : own;
    auto gather = group->StartAllGather(std::as_bytes(part), std::as_writable_bytes(whole), 0);
    EXPECT_OK(gather.status());
    EXPECT_OK((*gather)->Wait());
  }
  keep(in_place);
  return found;
}

}  // namespace heddle::comm
