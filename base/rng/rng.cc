#include "base/rng/rng.h"

#include <cmath>
#include <numbers>

#include "base/status/status.h"

namespace heddle {

namespace {

constexpr uint64_t kFnvOffset = 0xcbf29ce484222325;
constexpr uint64_t kFnvPrime = 0x100000001b3;

uint64_t Fnv1a(uint64_t hash, std::string_view text) {
  for (const char c : text) {
    hash = (hash ^ static_cast<unsigned char>(c)) * kFnvPrime;
  }
  return hash;
}

double ToUniform(uint64_t bits) { return static_cast<double>(bits >> 11) * 0x1p-53; }

}  // namespace

PhiloxBlock Philox4x32(const PhiloxBlock& counter, const std::array<uint32_t, 2>& key) {
  constexpr uint64_t kMultiplier0 = 0xD2511F53;
  constexpr uint64_t kMultiplier1 = 0xCD9E8D57;
  constexpr uint32_t kWeyl0 = 0x9E3779B9;
  constexpr uint32_t kWeyl1 = 0xBB67AE85;
  PhiloxBlock x = counter;
  uint32_t k0 = key[0];
  uint32_t k1 = key[1];
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = kMultiplier0 * x[0];
    const uint64_t p1 = kMultiplier1 * x[2];
    x = {static_cast<uint32_t>(p1 >> 32) ^ x[1] ^ k0, static_cast<uint32_t>(p1),
         static_cast<uint32_t>(p0 >> 32) ^ x[3] ^ k1, static_cast<uint32_t>(p0)};
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return x;
}

Rng::Rng(uint64_t seed, std::string_view purpose)
    : seed_(seed), stream_(Fnv1a(kFnvOffset, purpose)) {}

Rng Rng::Child(std::string_view purpose) const {
  // The separator keeps Child("a").Child("b") apart from Child("ab").
  return Rng(seed_, Fnv1a(Fnv1a(stream_, std::string_view("\0", 1)), purpose));
}

Rng Rng::Child(uint64_t index) const {
  char bytes[9] = {'\1'};
  for (int i = 0; i < 8; ++i) {
    bytes[i + 1] = static_cast<char>(index >> (8 * i));
  }
  return Rng(seed_, Fnv1a(stream_, std::string_view(bytes, sizeof(bytes))));
}

PhiloxBlock Rng::BlockAt(uint64_t block) const {
  return Philox4x32({static_cast<uint32_t>(block), static_cast<uint32_t>(block >> 32),
                     static_cast<uint32_t>(stream_), static_cast<uint32_t>(stream_ >> 32)},
                    {static_cast<uint32_t>(seed_), static_cast<uint32_t>(seed_ >> 32)});
}

uint64_t Rng::At(uint64_t position) const {
  const PhiloxBlock block = BlockAt(position >> 1);
  const size_t half = (position & 1) * 2;
  return block[half] | (uint64_t{block[half + 1]} << 32);
}

uint64_t Rng::BelowAt(uint64_t position, uint64_t bound) const {
  HEDDLE_CHECK(bound > 0);
  uint64_t bits = At(position);
  // Lemire's multiplication with rejection of the biased low part.
  const uint64_t rest = -bound % bound;
  unsigned __int128 product = static_cast<unsigned __int128>(bits) * bound;
  for (uint64_t retry = 0; static_cast<uint64_t>(product) < rest; ++retry) {
    bits = Child("retry").Child(position).At(retry);
    product = static_cast<unsigned __int128>(bits) * bound;
  }
  return static_cast<uint64_t>(product >> 64);
}

double Rng::UniformAt(uint64_t position) const { return ToUniform(At(position)); }

double Rng::NormalAt(uint64_t position) const {
  const PhiloxBlock block = BlockAt(position >> 1);
  const uint64_t low = block[0] | (uint64_t{block[1]} << 32);
  const uint64_t high = block[2] | (uint64_t{block[3]} << 32);
  // 1 - u is in (0, 1], so the logarithm is finite.
  const double radius = std::sqrt(-2.0 * std::log(1.0 - ToUniform(low)));
  const double angle = 2.0 * std::numbers::pi * ToUniform(high);
  return radius * ((position & 1) == 0 ? std::cos(angle) : std::sin(angle));
}

}  // namespace heddle
