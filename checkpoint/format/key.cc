#include "checkpoint/format/key.h"

namespace heddle::checkpoint {

namespace {

void PutU32(uint32_t value, std::string& out) {
  for (int shift = 24; shift >= 0; shift -= 8) {
    out.push_back(static_cast<char>(value >> shift & 0xFFu));
  }
}

uint32_t GetU32(std::string_view bytes, size_t at) {
  uint32_t value = 0;
  for (size_t i = at; i < at + 4; ++i) {
    value = value << 8 | static_cast<uint8_t>(bytes[i]);
  }
  return value;
}

}  // namespace

std::string EncodeKey(const EntryKey& key) {
  std::string out;
  out.reserve(kKeyBytes);
  PutU32(key.tensor, out);
  out.push_back(static_cast<char>(key.tensor_class));
  PutU32(key.chunk, out);
  PutU32(key.first, out);
  return out;
}

StatusOr<EntryKey> DecodeKey(std::string_view bytes) {
  if (bytes.size() != kKeyBytes) {
    return DataLoss(Str("a key of ", bytes.size(), " bytes, expected ", kKeyBytes));
  }
  const int tensor_class = static_cast<uint8_t>(bytes[4]);
  if (!heddle::v1::TensorClass_IsValid(tensor_class)) {
    return DataLoss(Str("a key with the unknown tensor class ", tensor_class));
  }
  return EntryKey{.tensor = GetU32(bytes, 0),
                  .tensor_class = static_cast<heddle::v1::TensorClass>(tensor_class),
                  .chunk = GetU32(bytes, 5),
                  .first = GetU32(bytes, 9)};
}

std::string HeaderKey() { return std::string(kKeyBytes, '\0'); }

}  // namespace heddle::checkpoint
