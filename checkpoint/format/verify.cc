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

using Slot = std::pair<uint32_t, int>;  // (tensor id, class)

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

  // Many problems of one kind: the first few, then their number.
  void Append(std::vector<VerifyProblem> found, const std::string& file, const char* what) {
    const size_t listed = std::min(found.size(), kListedMax);
    report_.problems.insert(report_.problems.end(), found.begin(),
                            found.begin() + static_cast<ptrdiff_t>(listed));
    if (listed < found.size()) {
      Problem(file, "", "", Str("and ", found.size() - listed, " more ", what));
    }
  }

  // What a file that cannot be read takes with it, in one line. Its ranges count as the record says
  // that they are: that each of them is missing would follow, and hide what else is wrong.
  void Lost(const ShardFile& file) {
    std::set<uint32_t> tensors;
    for (const heddle::v1::ElementRange& range : file.ranges()) {
      tensors.insert(range.tensor());
      stored_[{range.tensor(), range.tensor_class()}].push_back(
          {.first = range.first(), .count = range.count()});
    }
    if (!tensors.empty()) {
      Problem(file.name(), "", "",
              Str(file.ranges_size(), file.ranges_size() == 1 ? " range of " : " ranges of ",
                  tensors.size(), tensors.size() == 1 ? " tensor" : " tensors", " lie in it"));
    }
  }

  std::string NameOf(uint32_t tensor, heddle::v1::TensorClass tensor_class) const {
    const auto found = tensors_.find(tensor);
    const std::string name =
        found == tensors_.end() ? Str("tensor ", tensor) : found->second->name();
    return Str(name, " (", ToText(tensor_class), ")");
  }

  std::string NameOf(const Slot& slot) const {
    return NameOf(slot.first, static_cast<heddle::v1::TensorClass>(slot.second));
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
    const Status readable = ReadFile(rank, file);
    if (!readable.ok()) {
      Problem(file.name(), "", "", Message(readable));
      Lost(file);
    }
  }

  // The error of a file of which nothing can be read; other problems go to the report.
  Status ReadFile(uint32_t rank, const ShardFile& file) {
    const std::string path = Str(folder_, "/", file.name());
    // The digest first: it covers every bit. A mismatch does not end the check, since the blocks
    // then tell which tensors are hit.
    uint64_t bytes = 0;
    ASSIGN_OR_RETURN(const std::string digest, FileDigest(path, &bytes));
    report_.bytes += bytes;
    if (bytes != file.bytes()) {
      return DataLoss(Str(bytes, " bytes, the record says ", file.bytes()));
    }
    if (digest != file.digest()) {
      Problem(file.name(), "", "", "the digest of the file is not the one of the record");
    }
    ASSIGN_OR_RETURN(const std::unique_ptr<ShardReader> reader,
                     ShardReader::Open(path, file, DigestCheck::kNone));
    CheckHeader(file, rank, reader->header());
    // The scan names the tensor of a damaged block; what it does not read the checksums tell.
    if (!CheckEntries(file, reader.get())) {
      Lost(file);
    } else if (const Status blocks = reader->VerifyBlocks(); !blocks.ok()) {
      Problem(file.name(), "", "", Message(blocks));
    }
    return OkStatus();
  }

  // An entry that does not fit the record, or its elements.
  StatusOr<ElementSpan> SpanOf(const EntryKey& key, std::string_view value) const {
    const auto found = tensors_.find(key.tensor);
    if (found == tensors_.end()) {
      return DataLoss("is not in the record");
    }
    const heddle::v1::ElementType type = TypeOf(*found->second, key.tensor_class);
    const uint64_t count = value.size() / ElementBytes(type);
    if (value.size() % ElementBytes(type) != 0 || key.first + count > ChunkElements(type)) {
      return DataLoss(
          Str(value.size(), " bytes from element ", key.first, " do not fit the chunk"));
    }
    return ElementSpan{.first = key.chunk * ChunkElements(type) + key.first, .count = count};
  }

  // False if the file could not be read to its end; what was read of it then does not count.
  bool CheckEntries(const ShardFile& file, ShardReader* reader) {
    uint64_t entries = 1;  // the header
    EntryKey last;
    std::map<Slot, std::vector<ElementSpan>> spans;
    std::vector<VerifyProblem> unfit;
    const Status scanned = reader->ScanAll([&](const EntryKey& key, std::string_view value) {
      ++entries;
      last = key;
      const StatusOr<ElementSpan> span = SpanOf(key, value);
      if (span.ok()) {
        spans[{key.tensor, key.tensor_class}].push_back(*span);
      } else {
        unfit.push_back({.file = file.name(),
                         .block = Str("chunk ", key.chunk),
                         .tensor = NameOf(key.tensor, key.tensor_class),
                         .what = Message(span.status())});
      }
      return OkStatus();
    });
    report_.entries += entries;
    Append(std::move(unfit), file.name(), "entries that do not fit");
    if (!scanned.ok()) {
      Problem(file.name(), Str("after chunk ", last.chunk), NameOf(last.tensor, last.tensor_class),
              Message(scanned));
      return false;
    }
    if (entries != file.entries()) {
      Problem(file.name(), "", "", Str(entries, " entries, the record says ", file.entries()));
    }
    CheckRanges(file, spans);
    for (auto& [slot, found] : spans) {
      stored_[slot].insert(stored_[slot].end(), found.begin(), found.end());
    }
    return true;
  }

  void CheckRanges(const ShardFile& file, const std::map<Slot, std::vector<ElementSpan>>& spans) {
    std::map<Slot, uint64_t> counts;
    for (const auto& [slot, found] : spans) {
      for (const ElementSpan& span : found) {
        counts[slot] += span.count;
      }
    }
    for (const heddle::v1::ElementRange& range : file.ranges()) {
      counts[{range.tensor(), range.tensor_class()}] -= range.count();
    }
    std::vector<VerifyProblem> other;
    for (const auto& [slot, difference] : counts) {
      if (difference != 0) {
        other.push_back({.file = file.name(),
                         .block = "",
                         .tensor = NameOf(slot),
                         .what = "the file does not hold the ranges that the record says"});
      }
    }
    Append(std::move(other), file.name(), "tensors of which the same is to be said");
  }

  void CheckCover() {
    std::vector<VerifyProblem> gaps;
    for (const TensorInfo& tensor : record_.tensors()) {
      for (const int tensor_class : tensor.classes()) {
        const Slot slot{tensor.id(), tensor_class};
        for (const std::string& what : CoverProblems(stored_[slot], Elements(tensor))) {
          gaps.push_back({.file = "", .block = "", .tensor = NameOf(slot), .what = what});
        }
        stored_.erase(slot);
      }
    }
    Append(std::move(gaps), "", "ranges that are missing, twice or beyond the end");
    std::vector<VerifyProblem> unlisted;
    for (const auto& [slot, spans] : stored_) {
      unlisted.push_back({.file = "",
                          .block = "",
                          .tensor = NameOf(slot),
                          .what = "is stored, but the record has no such class"});
    }
    Append(std::move(unlisted), "", "tensors that the record does not have");
  }

  const CheckpointRecord& record_;
  const std::string folder_;
  std::map<uint32_t, const TensorInfo*> tensors_;
  std::map<Slot, std::vector<ElementSpan>> stored_;
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
