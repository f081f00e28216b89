// The ids of recent short words: a direct-mapped table that stays within a core's L2 cache.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>
#include <vector>

namespace heddle::tokenizer {

class WordCache {
 public:
  static constexpr size_t kWordBytesMax = 24;
  static constexpr size_t kIdsMax = 5;

  struct Key {
    uint64_t words[3];  // the bytes, zero-padded
    uint8_t bytes;
  };
  struct Entry {
    uint64_t words[3] = {};
    uint32_t ids[kIdsMax] = {};
    uint8_t bytes = 0;  // 0 = empty
    uint8_t count = 0;
  };

  WordCache() : entries_(kEntries) {}

  // REQUIRES: 1 <= size <= kWordBytesMax. `readable` bytes may be read at `data`.
  static Key MakeKey(const char* data, size_t size, size_t readable) {
    Key key{{0, 0, 0}, static_cast<uint8_t>(size)};
    if (readable < kWordBytesMax) {
      std::memcpy(key.words, data, size);
      return key;
    }
    std::memcpy(key.words, data, kWordBytesMax);
    const size_t partial = size / 8;
    if (partial < 3) {
      key.words[partial] &= (uint64_t{1} << (8 * (size % 8))) - 1;
      for (size_t i = partial + 1; i < 3; ++i) key.words[i] = 0;
    }
    return key;
  }

  // The entry where `key` is, or would be.
  Entry& At(const Key& key) {
    uint64_t hash = key.words[0] * 0x9E3779B97F4A7C15u;
    hash = (hash ^ (hash >> 32) ^ key.words[1]) * 0xD6E8FEB86659FD93u;
    hash = (hash ^ (hash >> 32) ^ key.words[2] ^ key.bytes) * 0x9E3779B97F4A7C15u;
    return entries_[hash >> (64 - kEntriesLog2)];
  }
  static bool Holds(const Entry& entry, const Key& key) {
    return entry.bytes == key.bytes && entry.words[0] == key.words[0] &&
           entry.words[1] == key.words[1] && entry.words[2] == key.words[2];
  }
  static void Fill(Entry* entry, const Key& key, const uint32_t* ids, size_t count) {
    std::memcpy(entry->words, key.words, sizeof(entry->words));
    std::memcpy(entry->ids, ids, count * sizeof(uint32_t));
    entry->bytes = key.bytes;
    entry->count = static_cast<uint8_t>(count);
  }

 private:
  static constexpr int kEntriesLog2 = 15;
  static constexpr size_t kEntries = size_t{1} << kEntriesLog2;
  std::vector<Entry> entries_;
};

}  // namespace heddle::tokenizer
