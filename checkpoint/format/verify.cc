#include "checkpoint/format/verify.h"

#include <algorithm>
#include <map>
#include <memory>
#include <set>
#include <utility>

#include "checkpoint/format/key.h"
#include "checkpoint/format/shard_reader.h"

namespace heddle::checkpoint {

namespace {

using heddle::v1::CheckpointRecord;
using heddle::v1::ShardFile;
using heddle::v1::TensorInfo;

class Verifier {
 public:
  Verifier(const CheckpointRecord& record, const std::string& root)
      : record_(record), folder_(Str(root, "/", record.dir())) {
    for (const TensorInfo& tensor : record.tensors()) {
      tensors_[tensor.id()] = &tensor;
    }
  }

  VerifyReport Run(const std::function<bool(uint64_t)>& progress) {
    report_.tensors = static_cast<uint64_t>(record_.tensors_size());
    std::set<uint32_t> ranks;
    for (const heddle::v1::RankSeal& seal : record_.seals()) {
      if (!ranks.insert(seal.rank()).second || seal.rank() >= record_.world_size()) {
        Problem("", "", "",
                Str("rank ", seal.rank(), " of ", record_.world_size(), " is unexpected"));
      }
      for (const ShardFile& file : seal.files()) {
        CheckFile(seal.rank(), file);
        if (progress && !progress(report_.bytes)) {
          Problem("", "", "", "the check was stopped before its end");
          return std::move(report_);
        }
      }
    }
    if (ranks.size() != record_.world_size()) {
      Problem("", "", "", Str(ranks.size(), " of ", record_.world_size(), " ranks have sealed"));
    }
    CheckCover();
    return std::move(report_);
  }

 private:
  void Problem(const std::string& file, const std::string& block, const std::string& tensor,
               const std::string& what) {
    report_.problems.push_back({.file = file, .block = block, .tensor = tensor, .what = what});
  }

  std::string NameOf(uint32_t tensor, heddle::v1::TensorClass tensor_class) const {
    const auto found = tensors_.find(tensor);
    const std::string name =
        found == tensors_.end() ? Str("tensor ", tensor) : found->second->name();
    return Str(name, " (", ToText(tensor_class), ")");
  }

  void CheckHeader(const ShardFile& file, uint32_t rank, const heddle::v1::ShardHeader& header) {
    if (header.job() != record_.job() || header.fence() != record_.fence() ||
        header.step() != record_.step() || header.rank() != rank ||
        header.world_size() != record_.world_size()) {
      Problem(file.name(), "header", "",
              Str("belongs to job ", header.job(), ", fence ", header.fence(), ", step ",
                  header.step(), ", rank ", header.rank(), " of ", header.world_size()));
    }
  }

  void CheckFile(uint32_t rank, const ShardFile& file) {
    ++report_.files;
    const std::string path = Str(folder_, "/", file.name());
    // The digest first: it covers every bit. A mismatch does not end the check, since the blocks
    // then tell which tensors are hit.
    uint64_t bytes = 0;
    const StatusOr<std::string> digest = FileDigest(path, &bytes);
    if (!digest.ok()) {
      Problem(file.name(), "", "", Message(digest.status()));
      return;
    }
    report_.bytes += bytes;
    if (bytes != file.bytes()) {
      Problem(file.name(), "", "", Str(bytes, " bytes, the record says ", file.bytes()));
      return;
    }
    if (*digest != file.digest()) {
      Problem(file.name(), "", "", "the digest of the file is not the one of the record");
    }
    StatusOr<std::unique_ptr<ShardReader>> reader =
        ShardReader::Open(path, file, DigestCheck::kNone);
    if (!reader.ok()) {
      Problem(file.name(), "", "", Message(reader.status()));
      return;
    }
    CheckHeader(file, rank, (*reader)->header());
    if (const Status blocks = (*reader)->VerifyBlocks(); !blocks.ok()) {
      Problem(file.name(), "", "", Message(blocks));
    }
    CheckEntries(file, reader->get());
  }

  void CheckEntries(const ShardFile& file, ShardReader* reader) {
    uint64_t entries = 1;  // the header
    EntryKey last;
    std::map<std::pair<uint32_t, int>, uint64_t> counts;
    const Status scanned = reader->ScanAll([&](const EntryKey& key, std::string_view value) {
      ++entries;
      last = key;
      const auto found = tensors_.find(key.tensor);
      if (found == tensors_.end()) {
        Problem(file.name(), Str("chunk ", key.chunk), NameOf(key.tensor, key.tensor_class),
                "is not in the record");
        return OkStatus();
      }
      const heddle::v1::ElementType type = TypeOf(*found->second, key.tensor_class);
      const uint64_t count = value.size() / ElementBytes(type);
      if (value.size() % ElementBytes(type) != 0 || key.first + count > ChunkElements(type)) {
        Problem(file.name(), Str("chunk ", key.chunk), NameOf(key.tensor, key.tensor_class),
                Str(value.size(), " bytes from element ", key.first, " do not fit the chunk"));
        return OkStatus();
      }
      stored_[{key.tensor, key.tensor_class}].push_back(
          {.first = key.chunk * ChunkElements(type) + key.first, .count = count});
      counts[{key.tensor, key.tensor_class}] += count;
      return OkStatus();
    });
    report_.entries += entries;
    if (!scanned.ok()) {
      Problem(file.name(), Str("after chunk ", last.chunk), NameOf(last.tensor, last.tensor_class),
              Message(scanned));
    } else if (entries != file.entries()) {
      Problem(file.name(), "", "", Str(entries, " entries, the record says ", file.entries()));
    }
    for (const heddle::v1::ElementRange& range : file.ranges()) {
      counts[{range.tensor(), range.tensor_class()}] -= range.count();
    }
    for (const auto& [key, difference] : counts) {
      if (difference != 0 && scanned.ok()) {
        Problem(file.name(), "",
                NameOf(key.first, static_cast<heddle::v1::TensorClass>(key.second)),
                "the file does not hold the ranges that the record says");
      }
    }
  }

  void CheckCover() {
    for (const TensorInfo& tensor : record_.tensors()) {
      for (const int tensor_class : tensor.classes()) {
        const auto found = stored_.find({tensor.id(), tensor_class});
        for (const std::string& what :
             CoverProblems(found == stored_.end() ? std::vector<ElementSpan>() : found->second,
                           Elements(tensor))) {
          Problem("", "", NameOf(tensor.id(), static_cast<heddle::v1::TensorClass>(tensor_class)),
                  what);
        }
        if (found != stored_.end()) {
          stored_.erase(found);
        }
      }
    }
    for (const auto& [key, spans] : stored_) {
      Problem("", "", NameOf(key.first, static_cast<heddle::v1::TensorClass>(key.second)),
              "is stored, but the record has no such class");
    }
  }

  const CheckpointRecord& record_;
  const std::string folder_;
  std::map<uint32_t, const TensorInfo*> tensors_;
  std::map<std::pair<uint32_t, int>, std::vector<ElementSpan>> stored_;
  VerifyReport report_;
};

}  // namespace

std::string ToText(const VerifyProblem& problem) {
  std::string out;
  for (const std::string* part : {&problem.file, &problem.block, &problem.tensor}) {
    if (!part->empty()) {
      out += Str(*part, ": ");
    }
  }
  return out + problem.what;
}

VerifyReport VerifyCheckpoint(const CheckpointRecord& record, const std::string& root,
                              const std::function<bool(uint64_t)>& progress) {
  return Verifier(record, root).Run(progress);
}

}  // namespace heddle::checkpoint
