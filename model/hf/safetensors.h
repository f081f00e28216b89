// safetensors files (formats.md F10-F12): a hardened reader over a read-only map, and a writer
// whose bytes depend on the tensors only. Torch-free.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status/status.h"

namespace heddle::hf {

// In the order in which the writer places tensors.
enum class DType {
  kU64,
  kI64,
  kF64,
  kC64,
  kF32,
  kU32,
  kI32,
  kBF16,
  kF16,
  kU16,
  kI16,
  kF8E8M0,
  kF8E4M3,
  kF8E5M2,
  kI8,
  kU8,
  kBool
};
int64_t DTypeBytes(DType dtype);
const char* DTypeName(DType dtype);

struct TensorEntry {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  uint64_t begin = 0;  // within the buffer
  uint64_t end = 0;
  int64_t Elements() const;
};

struct Header {
  std::map<std::string, TensorEntry> tensors;
  std::map<std::string, std::string> metadata;
  uint64_t buffer_offset = 0;  // of the buffer in the file
};

// `start` holds at least the length and the header, `file_bytes` is the size of the file.
// INVALID_ARGUMENT with a byte offset or a tensor's name: header longer than 100,000,000 bytes or
// the file, not an object, repeated keys, unknown dtype or field, shape times dtype that overflows
// or differs from the range, ranges that do not tile the buffer from 0 to the end of the file.
StatusOr<Header> ParseHeader(std::string_view start, uint64_t file_bytes);

// A file mapped read-only; immutable, thread-safe.
class SafetensorsFile {
 public:
  // NOT_FOUND; INVALID_ARGUMENT as ParseHeader, with the path.
  static StatusOr<std::unique_ptr<SafetensorsFile>> Open(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  const Header& header() const { return header_; }
  const std::string& path() const { return path_; }
  // Bytes of one tensor, possibly unaligned; valid while the file lives. REQUIRES: the name exists.
  std::string_view Data(const std::string& name) const;
  // The values as fp32. INVALID_ARGUMENT for a dtype that is no floating point type of 2, 4 or 8
  // bytes, or a size other than `out`.
  Status ReadFloats(const std::string& name, std::span<float> out) const;
  // The same of elements [first, first + out.size()) of a tensor. INVALID_ARGUMENT also for a range
  // outside of it.
  Status ReadFloats(const std::string& name, int64_t first, std::span<float> out) const;
  // INVALID_ARGUMENT as ReadFloats for the tensor's dtype.
  Status CheckFloats(const std::string& name) const;
  // Elements [first, first + count) are not read again soon: their pages need not stay in this
  // process's memory, where a limit would count them. REQUIRES: within the tensor.
  void Forget(const std::string& name, int64_t first, int64_t count) const;
  // The values of an I32 or I64 tensor.
  StatusOr<std::vector<int64_t>> ReadIntegers(const std::string& name) const;

 private:
  SafetensorsFile(std::string path, const char* map, size_t bytes);
  std::string path_;
  const char* map_;
  size_t bytes_;
  Header header_;
};

struct WriteTensor {
  std::string name;
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  const void* data = nullptr;  // borrowed for the call
};

// Writes PATH.tmp, syncs, renames, syncs the folder. Tensors are placed by dtype, then name;
// metadata is {"format":"pt"}. INVALID_ARGUMENT for a repeated or reserved name.
Status WriteSafetensors(const std::string& path, std::vector<WriteTensor> tensors);

// Writes `bytes` to `path` in the same safe way.
Status WriteFileSafely(const std::string& path, std::string_view bytes);

}  // namespace heddle::hf
