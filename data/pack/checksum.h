// CRC-32C for blocks, XXH3-128 for whole files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

namespace heddle::pack {

// CRC-32C (Castagnoli) of `bytes`; with SSE4.2 where the processor has it.
uint32_t Crc32c(const void* bytes, size_t size);
// The same without special instructions; equal for every input.
uint32_t Crc32cPortable(const void* bytes, size_t size);

// 32 hex digits, most significant first.
std::string Xxh3Hex(std::string_view bytes);

// XXH3-128 of a stream.
class Xxh3Stream {
 public:
  Xxh3Stream();
  ~Xxh3Stream();
  Xxh3Stream(const Xxh3Stream&) = delete;
  Xxh3Stream& operator=(const Xxh3Stream&) = delete;

  void Update(std::string_view bytes);
  // As Xxh3Hex, of everything so far.
  std::string Hex() const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// XXH3-64 with a seed.
uint64_t Xxh3(std::string_view bytes, uint64_t seed);

}  // namespace heddle::pack
