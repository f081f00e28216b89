#include "data/pack/dataset.h"

#include <algorithm>
#include <utility>

#include "data/pack/files.h"
#include "data/pack/shard_reader.h"
#include "data/tokenizer/tokenizer.h"

namespace heddle::pack {
struct Dataset::Impl {
  std::string dir;
  Manifest manifest;
  std::vector<std::unique_ptr<ShardReader>> shards;
  std::vector<int64_t> first_document;  // of each shard

  // The shard that holds document `d`; `local` is its number there.
  const ShardReader& ShardOf(int64_t d, int64_t* local) const {
    const auto next = std::upper_bound(first_document.begin(), first_document.end(), d);
    const auto index = static_cast<size_t>(next - first_document.begin()) - 1;
    *local = d - first_document[index];
    return *shards[index];
  }
};

Dataset::Dataset(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Dataset::~Dataset() = default;

StatusOr<std::unique_ptr<Dataset>> Dataset::Open(const std::string& dir,
                                                 const OpenOptions& options) {
  const std::string path = Str(dir, "/", kManifestName);
  const StatusOr<std::string> bytes = ReadFile(path);
  if (!bytes.ok() && bytes.status().code() == StatusCode::kNotFound) {
    return NotFound(
        Str(dir, ": no data set here (no ", kManifestName, "); make one with heddle data prepare"));
  }
  if (!bytes.ok()) return bytes.status();
  auto impl = std::make_unique<Impl>();
  impl->dir = dir;
  ASSIGN_OR_RETURN(impl->manifest, ParseManifest(*bytes, path));
  const Manifest& manifest = impl->manifest;
  if (!options.tokenizer_sha256.empty() && options.tokenizer_sha256 != manifest.tokenizer_sha256) {
    return FailedPrecondition(Str(path, ": made with another tokenizer: its SHA-256 is ",
                                  manifest.tokenizer_sha256, ", wanted ",
                                  options.tokenizer_sha256));
  }
  if (!options.manifest_hash.empty() && options.manifest_hash != manifest.hash) {
    return FailedPrecondition(Str(path, ": another data set than before: its manifest hash is ",
                                  manifest.hash, ", wanted ", options.manifest_hash));
  }
  int64_t first = 0;
  for (size_t i = 0; i < manifest.shards.size(); ++i) {
    const ShardEntry& entry = manifest.shards[i];
    ASSIGN_OR_RETURN(
        std::unique_ptr<ShardReader> shard,
        ShardReader::Open(Str(dir, "/", entry.file), static_cast<uint32_t>(i), manifest, entry));
    impl->first_document.push_back(first);
    first += shard->documents();
    impl->shards.push_back(std::move(shard));
  }
  return std::unique_ptr<Dataset>(new Dataset(std::move(impl)));
}

const Manifest& Dataset::manifest() const { return impl_->manifest; }
const std::string& Dataset::dir() const { return impl_->dir; }

int64_t Dataset::DocumentLength(int64_t d) const {
  HEDDLE_CHECK(d >= 0 && d < documents());
  int64_t local = 0;
  const ShardReader& shard = impl_->ShardOf(d, &local);
  return static_cast<int64_t>(shard.DocumentOffset(local + 1) - shard.DocumentOffset(local));
}

Status Dataset::ReadTokens(int64_t d, int64_t begin, std::span<uint32_t> out) const {
  HEDDLE_CHECK(d >= 0 && d < documents());
  int64_t local = 0;
  const ShardReader& shard = impl_->ShardOf(d, &local);
  const uint64_t first = shard.DocumentOffset(local);
  const uint64_t length = shard.DocumentOffset(local + 1) - first;
  HEDDLE_CHECK(begin >= 0 && static_cast<uint64_t>(begin) + out.size() <= length);
  return shard.Read(first + static_cast<uint64_t>(begin), out);
}

Status Dataset::CheckTokenizer() const {
  ASSIGN_OR_RETURN(const std::string sha, TokenizerSha256(dir()));
  if (!sha.empty() && sha != manifest().tokenizer_sha256) {
    return FailedPrecondition(
        Str(dir(), "/tokenizer.json: not the tokenizer the data were made with: its SHA-256 is ",
            sha, ", ", kManifestName, " says ", manifest().tokenizer_sha256));
  }
  return OkStatus();
}

StatusOr<std::string> TokenizerSha256(const std::string& folder) {
  const StatusOr<std::string> bytes = ReadFile(Str(folder, "/tokenizer.json"));
  if (bytes.status().code() == StatusCode::kNotFound) {
    return std::string();
  }
  RETURN_IF_ERROR(bytes.status());
  return tokenizer::Sha256Hex(*bytes);
}

Status Dataset::Verify() const {
  for (size_t i = 0; i < impl_->shards.size(); ++i) {
    RETURN_IF_ERROR(impl_->shards[i]->Verify(impl_->manifest.shards[i]));
  }
  return OkStatus();
}

}  // namespace heddle::pack
