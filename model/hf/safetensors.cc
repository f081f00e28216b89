#include "model/hf/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "model/hf/json_values.h"

namespace heddle::hf {
namespace {

using nlohmann::json;

constexpr uint64_t kHeaderBytesMax = 100'000'000;
constexpr size_t kLengthBytes = 8;
// {"name": {"shape": [..]}}
constexpr int kHeaderDepthMax = 3;

struct DTypeInfo {
  DType dtype;
  const char* name;
  int64_t bytes;
};
constexpr DTypeInfo kDTypes[] = {
    {DType::kU64, "U64", 8},        {DType::kI64, "I64", 8},        {DType::kF64, "F64", 8},
    {DType::kC64, "C64", 8},        {DType::kF32, "F32", 4},        {DType::kU32, "U32", 4},
    {DType::kI32, "I32", 4},        {DType::kBF16, "BF16", 2},      {DType::kF16, "F16", 2},
    {DType::kU16, "U16", 2},        {DType::kI16, "I16", 2},        {DType::kF8E8M0, "F8_E8M0", 1},
    {DType::kF8E4M3, "F8_E4M3", 1}, {DType::kF8E5M2, "F8_E5M2", 1}, {DType::kI8, "I8", 1},
    {DType::kU8, "U8", 1},          {DType::kBool, "BOOL", 1}};

const DTypeInfo* FindDType(const std::string& name) {
  for (const DTypeInfo& info : kDTypes) {
    if (name == info.name) return &info;
  }
  return nullptr;
}

uint64_t LittleEndian(std::string_view bytes) {
  uint64_t value = 0;
  for (size_t i = 0; i < kLengthBytes; ++i) {
    value |= static_cast<uint64_t>(static_cast<unsigned char>(bytes[i])) << (8 * i);
  }
  return value;
}

StatusOr<TensorEntry> ParseEntry(const std::string& name, const json& value) {
  const auto bad = [&](const std::string& why) {
    return InvalidArgument(Str("tensor '", name, "': ", why));
  };
  if (!value.is_object() || value.size() != 3 || !value.contains("dtype") ||
      !value.contains("shape") || !value.contains("data_offsets")) {
    return bad("needs exactly dtype, shape and data_offsets");
  }
  const json& dtype = value["dtype"];
  const json& shape = value["shape"];
  const json& range = value["data_offsets"];
  const DTypeInfo* info = dtype.is_string() ? FindDType(dtype.get<std::string>()) : nullptr;
  if (info == nullptr) return bad("unknown dtype");
  if (!shape.is_array() || !range.is_array() || range.size() != 2) return bad("bad shape or range");
  TensorEntry entry;
  entry.dtype = info->dtype;
  uint64_t bytes = static_cast<uint64_t>(info->bytes);
  for (const json& extent : shape) {
    if (!extent.is_number_unsigned()) return bad("shape is not made of counts");
    const uint64_t count = extent.get<uint64_t>();
    if (count > INT64_MAX || __builtin_mul_overflow(bytes, count, &bytes)) {
      return bad("shape overflows");
    }
    entry.shape.push_back(static_cast<int64_t>(count));
  }
  if (!range[0].is_number_unsigned() || !range[1].is_number_unsigned()) return bad("bad range");
  entry.begin = range[0].get<uint64_t>();
  entry.end = range[1].get<uint64_t>();
  if (entry.begin > entry.end || entry.end - entry.begin != bytes) {
    return bad(Str("range of ", entry.end - entry.begin, " bytes for a tensor of ", bytes));
  }
  return entry;
}

Status CheckTiling(const Header& header, uint64_t buffer_bytes) {
  std::vector<std::pair<const std::string*, const TensorEntry*>> order;
  for (const auto& [name, entry] : header.tensors) order.emplace_back(&name, &entry);
  std::stable_sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second->begin, a.second->end) < std::pair(b.second->begin, b.second->end);
  });
  uint64_t at = 0;
  for (const auto& [name, entry] : order) {
    if (entry->begin != at) {
      return InvalidArgument(
          Str("tensor '", *name, "': begins at ", entry->begin, ", not at ", at));
    }
    at = entry->end;
  }
  if (at != buffer_bytes) {
    return InvalidArgument(Str("tensors end at ", at, " of a buffer of ", buffer_bytes, " bytes"));
  }
  return OkStatus();
}

float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const int exponent = (half >> 10) & 0x1f;
  const uint32_t fraction = half & 0x3ffu;
  if (exponent == 0) {
    const float tiny = std::ldexp(static_cast<float>(fraction), -24);
    return sign != 0 ? -tiny : tiny;
  }
  const uint32_t wide = exponent == 31 ? 255u : static_cast<uint32_t>(exponent - 15 + 127);
  const uint32_t bits = sign | (wide << 23) | (fraction << 13);
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

float BFloatToFloat(uint16_t half) {
  const uint32_t bits = static_cast<uint32_t>(half) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

template <typename T>
T ReadAt(std::string_view data, size_t index) {
  T value;
  std::memcpy(&value, data.data() + index * sizeof(T), sizeof(T));
  return value;
}

}  // namespace

int64_t DTypeBytes(DType dtype) { return kDTypes[static_cast<size_t>(dtype)].bytes; }
const char* DTypeName(DType dtype) { return kDTypes[static_cast<size_t>(dtype)].name; }

int64_t TensorEntry::Elements() const {
  int64_t count = 1;
  for (const int64_t extent : shape) count *= extent;
  return count;
}

StatusOr<Header> ParseHeader(std::string_view start, uint64_t file_bytes) {
  if (file_bytes < kLengthBytes || start.size() < kLengthBytes) {
    return InvalidArgument("offset 0: shorter than the length of the header");
  }
  const uint64_t length = LittleEndian(start);
  if (length > kHeaderBytesMax || length > file_bytes - kLengthBytes) {
    return InvalidArgument(Str("offset 0: header of ", length, " bytes in a file of ", file_bytes));
  }
  HEDDLE_CHECK(start.size() >= kLengthBytes + length);
  const std::string_view text = start.substr(kLengthBytes, length);
  if (text.empty() || text.front() != '{') {
    return InvalidArgument("offset 8: header does not begin with '{'");
  }
  StatusOr<json> object = ParseJsonObject(text, kHeaderDepthMax);
  if (!object.ok()) return Annotate(object.status(), "header");
  const json parsed = *std::move(object);
  Header header;
  header.buffer_offset = kLengthBytes + length;
  for (const auto& [name, value] : parsed.items()) {
    if (name == "__metadata__") {
      if (!value.is_object()) return InvalidArgument("__metadata__: not an object");
      for (const auto& [key, text_value] : value.items()) {
        if (!text_value.is_string()) return InvalidArgument("__metadata__: not text to text");
        header.metadata[key] = text_value.get<std::string>();
      }
      continue;
    }
    ASSIGN_OR_RETURN(header.tensors[name], ParseEntry(name, value));
  }
  RETURN_IF_ERROR(CheckTiling(header, file_bytes - header.buffer_offset));
  return header;
}

SafetensorsFile::SafetensorsFile(std::string path, const char* map, size_t bytes)
    : path_(std::move(path)), map_(map), bytes_(bytes) {}

SafetensorsFile::~SafetensorsFile() {
  if (map_ != nullptr) munmap(const_cast<char*>(map_), bytes_);
}

StatusOr<std::unique_ptr<SafetensorsFile>> SafetensorsFile::Open(const std::string& path) {
  // Without O_NONBLOCK a FIFO of that name would be waited for.
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) return FromErrno("open", path);
  struct stat info = {};
  if (fstat(fd, &info) != 0) {
    const Status status = FromErrno("stat", path);
    close(fd);
    return status;
  }
  if (!S_ISREG(info.st_mode)) {
    close(fd);
    return InvalidArgument(Str(path, ": not a regular file"));
  }
  const size_t bytes = static_cast<size_t>(info.st_size);
  void* map = bytes == 0 ? nullptr : mmap(nullptr, bytes, PROT_READ, MAP_PRIVATE, fd, 0);
  const int error = errno;
  close(fd);
  if (map == MAP_FAILED) return FromErrno("map", path, error);
  std::unique_ptr<SafetensorsFile> file(
      new SafetensorsFile(path, static_cast<const char*>(map), bytes));
  StatusOr<Header> header = ParseHeader({file->map_, bytes}, bytes);
  if (!header.ok()) return Annotate(header.status(), path);
  file->header_ = *std::move(header);
  return file;
}

std::string_view SafetensorsFile::Data(const std::string& name) const {
  const auto entry = header_.tensors.find(name);
  HEDDLE_CHECK(entry != header_.tensors.end(), name);
  return {map_ + header_.buffer_offset + entry->second.begin,
          static_cast<size_t>(entry->second.end - entry->second.begin)};
}

Status SafetensorsFile::CheckFloats(const std::string& name) const {
  const auto found = header_.tensors.find(name);
  if (found == header_.tensors.end())
    return InvalidArgument(Str(path_, ": no tensor '", name, "'"));
  switch (found->second.dtype) {
    case DType::kF32:
    case DType::kBF16:
    case DType::kF16:
    case DType::kF64:
      return OkStatus();
    default:
      return InvalidArgument(Str(path_, ": tensor '", name, "' is ", DTypeName(found->second.dtype),
                                 ", not F32, BF16, F16 or F64"));
  }
}

Status SafetensorsFile::ReadFloats(const std::string& name, std::span<float> out) const {
  const auto found = header_.tensors.find(name);
  if (found == header_.tensors.end())
    return InvalidArgument(Str(path_, ": no tensor '", name, "'"));
  if (found->second.Elements() != static_cast<int64_t>(out.size())) {
    return InvalidArgument(Str(path_, ": tensor '", name, "' has ", found->second.Elements(),
                               " elements, not ", out.size()));
  }
  return ReadFloats(name, 0, out);
}

Status SafetensorsFile::ReadFloats(const std::string& name, int64_t first,
                                   std::span<float> out) const {
  RETURN_IF_ERROR(CheckFloats(name));
  const TensorEntry& entry = header_.tensors.at(name);
  const auto count = static_cast<int64_t>(out.size());
  if (first < 0 || first > entry.Elements() || count > entry.Elements() - first) {
    return InvalidArgument(Str(path_, ": tensor '", name, "' has ", entry.Elements(),
                               " elements, not ", count, " from element ", first, " on"));
  }
  const int64_t width = DTypeBytes(entry.dtype);
  const std::string_view data =
      Data(name).substr(static_cast<size_t>(first * width), static_cast<size_t>(count * width));
  if (entry.dtype == DType::kF32) {
    if (!data.empty()) std::memcpy(out.data(), data.data(), data.size());
  } else if (entry.dtype == DType::kBF16) {
    for (size_t i = 0; i < out.size(); ++i) out[i] = BFloatToFloat(ReadAt<uint16_t>(data, i));
  } else if (entry.dtype == DType::kF16) {
    for (size_t i = 0; i < out.size(); ++i) out[i] = HalfToFloat(ReadAt<uint16_t>(data, i));
  } else {
    for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(ReadAt<double>(data, i));
  }
  return OkStatus();
}

void SafetensorsFile::Forget(const std::string& name, int64_t first, int64_t count) const {
  const std::string_view data = Data(name);
  const int64_t width = DTypeBytes(header_.tensors.at(name).dtype);
  HEDDLE_CHECK(first >= 0 && count >= 0 &&
               (first + count) * width <= static_cast<int64_t>(data.size()));
  static const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const auto begin = static_cast<size_t>(data.data() - map_ + first * width);
  const size_t aligned = begin / page * page;
  const size_t end = begin + static_cast<size_t>(count * width);
  // A hint: neighbours on the same pages come back from the file when they are read.
  if (end > aligned) madvise(const_cast<char*>(map_) + aligned, end - aligned, MADV_DONTNEED);
}

StatusOr<std::vector<int64_t>> SafetensorsFile::ReadIntegers(const std::string& name) const {
  const auto found = header_.tensors.find(name);
  if (found == header_.tensors.end())
    return InvalidArgument(Str(path_, ": no tensor '", name, "'"));
  const std::string_view data = Data(name);
  std::vector<int64_t> values(static_cast<size_t>(found->second.Elements()));
  for (size_t i = 0; i < values.size(); ++i) {
    if (found->second.dtype == DType::kI64) {
      values[i] = ReadAt<int64_t>(data, i);
    } else if (found->second.dtype == DType::kI32) {
      values[i] = ReadAt<int32_t>(data, i);
    } else {
      return InvalidArgument(Str(path_, ": tensor '", name, "' must be I32 or I64"));
    }
  }
  return values;
}

namespace {

// A file that is either complete under its name or not there.
class SafeFile {
 public:
  explicit SafeFile(std::string path) : path_(std::move(path)), temporary_(path_ + ".tmp") {}
  ~SafeFile() {
    if (fd_ >= 0) {
      close(fd_);
      unlink(temporary_.c_str());
    }
  }
  SafeFile(const SafeFile&) = delete;
  SafeFile& operator=(const SafeFile&) = delete;

  Status Open() {
    fd_ = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
    return fd_ < 0 ? FromErrno("create", temporary_) : OkStatus();
  }
  Status Write(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t written = write(fd_, bytes.data(), std::min(bytes.size(), size_t{1} << 30));
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) return FromErrno("write", temporary_);
      bytes.remove_prefix(static_cast<size_t>(written));
    }
    return OkStatus();
  }
  Status Commit() {
    if (fsync(fd_) != 0) return FromErrno("sync", temporary_);
    const int fd = std::exchange(fd_, -1);
    if (close(fd) != 0) return FromErrno("close", temporary_);
    if (rename(temporary_.c_str(), path_.c_str()) != 0) return FromErrno("rename", path_);
    const size_t slash = path_.rfind('/');
    const std::string folder = slash == std::string::npos ? "." : path_.substr(0, slash + 1);
    const int folder_fd = open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (folder_fd < 0) return FromErrno("open", folder);
    const int synced = fsync(folder_fd);
    const int error = errno;
    close(folder_fd);
    return synced != 0 ? FromErrno("sync", folder, error) : OkStatus();
  }

 private:
  std::string path_;
  std::string temporary_;
  int fd_ = -1;
};

int64_t BytesOf(const WriteTensor& tensor) {
  int64_t bytes = DTypeBytes(tensor.dtype);
  for (const int64_t extent : tensor.shape) bytes *= extent;
  return bytes;
}

std::string HeaderText(const std::vector<WriteTensor>& tensors) {
  std::string text = R"({"__metadata__":{"format":"pt"})";
  uint64_t at = 0;
  for (const WriteTensor& tensor : tensors) {
    const uint64_t end = at + static_cast<uint64_t>(BytesOf(tensor));
    text +=
        Str(",", json(tensor.name).dump(), ":{\"dtype\":\"", DTypeName(tensor.dtype),
            "\",\"shape\":", json(tensor.shape).dump(), ",\"data_offsets\":[", at, ",", end, "]}");
    at = end;
  }
  text += "}";
  text.append((8 - text.size() % 8) % 8, ' ');
  return text;
}

}  // namespace

Status WriteSafetensors(const std::string& path, std::vector<WriteTensor> tensors) {
  std::sort(tensors.begin(), tensors.end(), [](const WriteTensor& a, const WriteTensor& b) {
    return std::pair(a.dtype, a.name) < std::pair(b.dtype, b.name);
  });
  std::set<std::string> names;
  for (const WriteTensor& tensor : tensors) {
    if (tensor.name == "__metadata__" || !names.insert(tensor.name).second) {
      return InvalidArgument(
          Str(path, ": tensor name '", tensor.name, "' is reserved or repeated"));
    }
  }
  const std::string header = HeaderText(tensors);
  std::string length(kLengthBytes, '\0');
  for (size_t i = 0; i < kLengthBytes; ++i) {
    length[i] = static_cast<char>((static_cast<uint64_t>(header.size()) >> (8 * i)) & 0xff);
  }
  SafeFile file(path);
  RETURN_IF_ERROR(file.Open());
  RETURN_IF_ERROR(file.Write(length));
  RETURN_IF_ERROR(file.Write(header));
  for (const WriteTensor& tensor : tensors) {
    RETURN_IF_ERROR(
        file.Write({static_cast<const char*>(tensor.data), static_cast<size_t>(BytesOf(tensor))}));
  }
  return file.Commit();
}

Status WriteFileSafely(const std::string& path, std::string_view bytes) {
  SafeFile file(path);
  RETURN_IF_ERROR(file.Open());
  RETURN_IF_ERROR(file.Write(bytes));
  return file.Commit();
}

}  // namespace heddle::hf
