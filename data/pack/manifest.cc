#include "data/pack/manifest.h"

#include <nlohmann/json.hpp>
#include <string>

#include "data/pack/checksum.h"

namespace heddle::pack {
namespace {

using nlohmann::ordered_json;

constexpr char kFormat[] = "heddle packed set";
constexpr char kNoChecksum[] = "00000000000000000000000000000000";
constexpr char kChecksumKey[] = "\"checksum\": \"";
constexpr size_t kChecksumDigits = 32;
constexpr int64_t kCountMax = int64_t{1} << 50;

// Takes members out of an object and remembers the first that is missing or of the wrong kind.
class Reader {
 public:
  explicit Reader(const ordered_json& object) : object_(object) {}

  std::string Text(const char* key) {
    const ordered_json* value = Find(key);
    if (value == nullptr || !value->is_string()) return Bad(key, "text"), "";
    return value->get<std::string>();
  }
  int64_t Count(const char* key, int64_t max = kCountMax) {
    const ordered_json* value = Find(key);
    if (value == nullptr || !value->is_number_integer()) return Bad(key, "a whole number"), 0;
    const auto number = value->get<int64_t>();
    if (number < 0 || number > max) return Bad(key, "in range"), 0;
    return number;
  }
  uint64_t Unsigned(const char* key) {
    const ordered_json* value = Find(key);
    if (value == nullptr || !value->is_number_unsigned()) return Bad(key, "a whole number"), 0;
    return value->get<uint64_t>();
  }
  double Number(const char* key) {
    const ordered_json* value = Find(key);
    if (value == nullptr || !value->is_number()) return Bad(key, "a number"), 0;
    return value->get<double>();
  }
  const ordered_json* Array(const char* key) {
    const ordered_json* value = Find(key);
    if (value == nullptr || !value->is_array()) return Bad(key, "a list"), nullptr;
    return value;
  }
  const std::string& problem() const { return problem_; }

 private:
  const ordered_json* Find(const char* key) const {
    if (!object_.is_object()) return nullptr;
    const auto it = object_.find(key);
    return it == object_.end() ? nullptr : &*it;
  }
  void Bad(const char* key, const char* wanted) {
    if (problem_.empty()) problem_ = Str(key, " is missing or not ", wanted);
  }

  const ordered_json& object_;
  std::string problem_;
};

Status CheckManifest(const Manifest& manifest) {
  int64_t tokens = 0;
  int64_t documents = 0;
  for (const ShardEntry& shard : manifest.shards) {
    if (shard.file.empty() || shard.file.find('/') != std::string::npos || shard.file[0] == '.') {
      return DataLoss(Str("shard name '", shard.file, "' is not a plain file name"));
    }
    tokens += shard.tokens;
    documents += shard.documents;
  }
  if (tokens != manifest.tokens || documents != manifest.documents) {
    return DataLoss("counts are not the sums of the shards' counts");
  }
  if (manifest.token_bytes != 2 && manifest.token_bytes != 4) {
    return DataLoss("token_bytes is neither 2 nor 4");
  }
  if (manifest.vocab_size == 0 || manifest.eos_id >= manifest.vocab_size) {
    return DataLoss("eos_id is not in the vocabulary");
  }
  return OkStatus();
}

StatusOr<Manifest> Read(const ordered_json& root) {
  Reader reader(root);
  Manifest manifest;
  manifest.split = reader.Text("split");
  manifest.tokenizer_sha256 = reader.Text("tokenizer_sha256");
  manifest.vocab_size = static_cast<uint32_t>(reader.Count("vocab_size", 1 << 24));
  manifest.eos_id = static_cast<uint32_t>(reader.Count("eos_id", 1 << 24));
  manifest.token_bytes = static_cast<int>(reader.Count("token_bytes", 8));
  manifest.seed = reader.Unsigned("seed");
  manifest.eval_fraction = reader.Number("eval_fraction");
  manifest.source_digest = reader.Text("source_digest");
  manifest.documents = reader.Count("documents");
  manifest.tokens = reader.Count("tokens");
  manifest.text_bytes = reader.Count("text_bytes");
  if (const ordered_json* sources = reader.Array("sources")) {
    for (const ordered_json& source : *sources) {
      if (source.is_string()) manifest.sources.push_back(source.get<std::string>());
    }
  }
  const ordered_json* shards = reader.Array("shards");
  if (!reader.problem().empty()) return DataLoss(reader.problem());
  for (const ordered_json& entry : *shards) {
    Reader fields(entry);
    ShardEntry shard;
    shard.file = fields.Text("file");
    shard.tokens = fields.Count("tokens");
    shard.documents = fields.Count("documents");
    shard.bytes = fields.Count("bytes");
    shard.xxh3_128 = fields.Text("xxh3_128");
    shard.table_crc32c = static_cast<uint32_t>(fields.Count("table_crc32c", 0xFFFFFFFFll));
    if (!fields.problem().empty()) return DataLoss(Str("shards: ", fields.problem()));
    manifest.shards.push_back(std::move(shard));
  }
  RETURN_IF_ERROR(CheckManifest(manifest));
  return manifest;
}

}  // namespace

std::string SerializeManifest(const Manifest& manifest) {
  ordered_json root;
  root["format"] = kFormat;
  root["version"] = kManifestVersion;
  root["checksum"] = kNoChecksum;
  root["split"] = manifest.split;
  root["tokenizer_sha256"] = manifest.tokenizer_sha256;
  root["vocab_size"] = manifest.vocab_size;
  root["eos_id"] = manifest.eos_id;
  root["token_bytes"] = manifest.token_bytes;
  root["seed"] = manifest.seed;
  root["eval_fraction"] = manifest.eval_fraction;
  root["sources"] = manifest.sources;
  root["source_digest"] = manifest.source_digest;
  root["documents"] = manifest.documents;
  root["tokens"] = manifest.tokens;
  root["text_bytes"] = manifest.text_bytes;
  root["shards"] = ordered_json::array();
  for (const ShardEntry& shard : manifest.shards) {
    root["shards"].push_back({{"file", shard.file},
                              {"tokens", shard.tokens},
                              {"documents", shard.documents},
                              {"bytes", shard.bytes},
                              {"xxh3_128", shard.xxh3_128},
                              {"table_crc32c", shard.table_crc32c}});
  }
  std::string text = root.dump(1, ' ', false, ordered_json::error_handler_t::replace) + "\n";
  const std::string checksum = Xxh3Hex(text);
  const size_t at = text.find(kChecksumKey) + sizeof(kChecksumKey) - 1;
  return text.replace(at, kChecksumDigits, checksum);
}

StatusOr<Manifest> ParseManifest(const std::string& bytes, const std::string& path) {
  const size_t key = bytes.find(kChecksumKey);
  const size_t at = key + sizeof(kChecksumKey) - 1;
  if (key == std::string::npos || at + kChecksumDigits > bytes.size()) {
    return DataLoss(Str(path, ": truncated or not a data set's manifest (no checksum)"));
  }
  std::string blank = bytes;
  blank.replace(at, kChecksumDigits, kNoChecksum);
  const bool intact = bytes.compare(at, kChecksumDigits, Xxh3Hex(blank)) == 0;
  ordered_json root;
  try {
    root = ordered_json::parse(bytes);
  } catch (const ordered_json::parse_error& error) {
    return DataLoss(Str(path, ": byte ", error.byte, ": not valid JSON"));
  }
  Reader reader(root);
  const std::string format = reader.Text("format");
  const int64_t version = reader.Count("version");
  if (!intact) return DataLoss(Str(path, ": checksum does not match: the file was changed"));
  if (format != kFormat) return DataLoss(Str(path, ": not a heddle packed set"));
  if (version > kManifestVersion) {
    return FailedPrecondition(Str(path, ": format version ", version, " is newer than ",
                                  kManifestVersion, "; use a newer heddle"));
  }
  StatusOr<Manifest> manifest = Read(root);
  if (!manifest.ok()) return Annotate(manifest.status(), path);
  manifest->hash = Xxh3Hex(bytes);
  return manifest;
}

}  // namespace heddle::pack
