#include "coordinator/state/secret.h"

#include <bit>

#include "base/status/status.h"

namespace heddle::state {

namespace {

uint64_t LittleEndian(const std::string& bytes, size_t offset, size_t count) {
  uint64_t value = 0;
  for (size_t i = 0; i < count; ++i) {
    value |= uint64_t{static_cast<unsigned char>(bytes[offset + i])} << (8 * i);
  }
  return value;
}

struct Sip {
  uint64_t v0, v1, v2, v3;
  void Rounds(int count) {
    for (int i = 0; i < count; ++i) {
      v0 += v1;
      v1 = std::rotl(v1, 13) ^ v0;
      v0 = std::rotl(v0, 32);
      v2 += v3;
      v3 = std::rotl(v3, 16) ^ v2;
      v0 += v3;
      v3 = std::rotl(v3, 21) ^ v0;
      v2 += v1;
      v1 = std::rotl(v1, 17) ^ v2;
      v2 = std::rotl(v2, 32);
    }
  }
};

}  // namespace

uint64_t SipHash24(const std::string& key, const std::string& data) {
  HEDDLE_CHECK(key.size() == 16, "SipHash needs a key of 16 bytes");
  const uint64_t k0 = LittleEndian(key, 0, 8);
  const uint64_t k1 = LittleEndian(key, 8, 8);
  Sip s{k0 ^ 0x736f6d6570736575, k1 ^ 0x646f72616e646f6d, k0 ^ 0x6c7967656e657261,
        k1 ^ 0x7465646279746573};
  const size_t whole = data.size() / 8 * 8;
  for (size_t i = 0; i < whole; i += 8) {
    const uint64_t word = LittleEndian(data, i, 8);
    s.v3 ^= word;
    s.Rounds(2);
    s.v0 ^= word;
  }
  const uint64_t last =
      LittleEndian(data, whole, data.size() - whole) | (uint64_t{data.size()} << 56);
  s.v3 ^= last;
  s.Rounds(2);
  s.v0 ^= last;
  s.v2 ^= 0xff;
  s.Rounds(4);
  return s.v0 ^ s.v1 ^ s.v2 ^ s.v3;
}

std::string AttemptSecret(const std::string& cluster_secret, Fence fence) {
  std::string key = cluster_secret;
  key.resize(16, '\0');
  std::string secret;
  for (int part = 0; part < 2; ++part) {
    const uint64_t hash = SipHash24(key, Str("rendezvous ", part, " ", fence.value));
    for (int i = 0; i < 8; ++i) {
      secret.push_back(static_cast<char>(hash >> (8 * i)));
    }
  }
  return secret;
}

}  // namespace heddle::state
