// The merge rules of a byte-level BPE vocabulary and their application to one word.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "base/status/status.h"

namespace heddle::tokenizer {

// (left, right) -> (rank, merged id), open addressing in one array.
class PairTable {
 public:
  static constexpr uint32_t kNoRank = ~uint32_t{0};
  struct Merge {
    uint32_t rank = kNoRank;
    uint32_t id = 0;
  };

  // Room for `pairs` entries.
  void Reserve(size_t pairs);
  // The first insertion of a pair wins. REQUIRES: Reserve() made room.
  void Insert(uint32_t left, uint32_t right, Merge merge);
  Merge Find(uint32_t left, uint32_t right) const {
    const uint64_t key = Key(left, right);
    for (size_t i = Slot(key);; i = (i + 1) & mask_) {
      if (slots_[i].key == key) return slots_[i].merge;
      if (slots_[i].key == kEmpty) return Merge{};
    }
  }

 private:
  static constexpr uint64_t kEmpty = ~uint64_t{0};
  struct Entry {
    uint64_t key = kEmpty;
    Merge merge;
  };
  static uint64_t Key(uint32_t left, uint32_t right) {
    return (static_cast<uint64_t>(left) << 32) | right;
  }
  size_t Slot(uint64_t key) const { return (key * 0x9E3779B97F4A7C15u) >> shift_; }

  std::vector<Entry> slots_ = std::vector<Entry>(2);
  size_t mask_ = 1;
  int shift_ = 63;
};

class BpeModel {
 public:
  // Applies merges in the order of their rank, leftmost first, and appends the ids of `word`. Not
  // empty.
  void Encode(std::string_view word, std::vector<uint32_t>* ids) const;

  // Bytes of a token, by id; empty for ids without a token.
  std::vector<std::string> bytes_of;
  std::unordered_map<std::string, uint32_t> id_of;  // by bytes
  std::array<uint32_t, 256> byte_id{};
  PairTable merges;
  bool ignore_merges = false;  // a word that is a token is that token, whatever the merges say

 private:
  void EncodeShort(std::string_view word, std::vector<uint32_t>* ids) const;
  void EncodeLong(std::string_view word, std::vector<uint32_t>* ids) const;
};

}  // namespace heddle::tokenizer
