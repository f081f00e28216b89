#include "coordinator/store/state_log.h"

namespace heddle::store {

const char* FamilyName(Family family) {
  constexpr const char* kNames[kFamilyCount] = {"meta",     "jobs", "attempts", "tasks",  "workers",
                                                "accounts", "deps", "noms",     "ckpts",  "events",
                                                "jobev",    "idem", "audit",    "series", "rdzv"};
  return kNames[static_cast<size_t>(family)];
}

void Batch::Put(Family family, std::string key, std::string value) {
  mutations.push_back({family, std::move(key), std::move(value), false});
}

void Batch::Delete(Family family, std::string key) {
  mutations.push_back({family, std::move(key), std::nullopt, false});
}

void Batch::DeletePrefix(Family family, std::string prefix) {
  mutations.push_back({family, std::move(prefix), std::nullopt, true});
}

size_t Batch::Bytes() const {
  size_t bytes = 0;
  for (const Mutation& mutation : mutations) {
    bytes += mutation.key.size() + (mutation.value ? mutation.value->size() : 0);
  }
  return bytes;
}

void AppendBigEndian64(std::string* key, uint64_t value) {
  for (int shift = 56; shift >= 0; shift -= 8) {
    key->push_back(static_cast<char>((value >> shift) & 0xff));
  }
}

uint64_t ReadBigEndian64(const std::string& bytes, size_t offset) {
  HEDDLE_CHECK(bytes.size() >= offset + 8);
  uint64_t value = 0;
  for (size_t i = 0; i < 8; ++i) {
    value = (value << 8) | static_cast<unsigned char>(bytes[offset + i]);
  }
  return value;
}

}  // namespace heddle::store
