#include "checkpoint/tensor_io/load.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <map>
#include <memory>
#include <set>
#include <utility>

#include "checkpoint/catalog/tensors.h"
#include "checkpoint/format/shard_reader.h"

namespace heddle::checkpoint {

namespace {

using heddle::v1::CheckpointRecord;
using heddle::v1::ElementRange;
using heddle::v1::ElementType;
using heddle::v1::ShardFile;
using heddle::v1::TensorInfo;

using Slot = std::pair<uint32_t, int>;  // (tensor id, class)

std::string ShapeText(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); ++i) {
    text += Str(i == 0 ? "" : ", ", shape[i]);
  }
  return text + "]";
}

std::vector<int64_t> ShapeOf(const TensorInfo& tensor) {
  return {tensor.shape().begin(), tensor.shape().end()};
}

bool HasClass(const TensorInfo& tensor, heddle::v1::TensorClass tensor_class) {
  return std::find(tensor.classes().begin(), tensor.classes().end(), tensor_class) !=
         tensor.classes().end();
}

// What does not fit, one line a tensor: its classes are told together, and of many tensors the
// first few with the numbers of the others.
class Misfits {
 public:
  enum Kind { kMissing, kMisshapen, kOfOtherType, kUnexpected, kKinds };

  void Add(Kind kind, const std::string& name, heddle::v1::TensorClass tensor_class,
           const std::string& what) {
    const auto [at, added] = place_.insert({{name, what}, misfits_.size()});
    if (added) {
      misfits_.push_back({.kind = kind, .name = name, .classes = {}, .what = what});
    }
    misfits_[at->second].classes.insert(tensor_class);  // once, of however many ranges
  }

  Status ToStatus() const {
    if (misfits_.empty()) {
      return OkStatus();
    }
    std::string text = "the checkpoint does not fit the model";
    for (size_t i = 0; i < std::min(misfits_.size(), kListedMax); ++i) {
      text += Str("; ", misfits_[i].name, " (", ClassesOf(misfits_[i]), ") ", misfits_[i].what);
    }
    if (misfits_.size() > kListedMax) {
      text += Str("; and ", misfits_.size() - kListedMax, " more: in all ", Counts());
    }
    return FailedPrecondition(text);
  }

 private:
  struct Misfit {
    Kind kind;
    std::string name;
    std::set<heddle::v1::TensorClass> classes;
    std::string what;
  };

  static std::string ClassesOf(const Misfit& misfit) {
    std::string text;
    for (const heddle::v1::TensorClass tensor_class : misfit.classes) {
      text += Str(text.empty() ? "" : ", ", ToText(tensor_class));
    }
    return text;
  }

  std::string Counts() const {
    static constexpr const char* kWords[kKinds] = {"missing", "of another shape",
                                                   "of another element type", "unexpected"};
    std::string text;
    for (int kind = 0; kind < kKinds; ++kind) {
      const auto count =
          std::count_if(misfits_.begin(), misfits_.end(),
                        [kind](const Misfit& misfit) { return misfit.kind == kind; });
      if (count > 0) {
        text += Str(text.empty() ? "" : ", ", count, " ", kWords[kind]);
      }
    }
    return text;
  }

  std::vector<Misfit> misfits_;
  std::map<std::pair<std::string, std::string>, size_t> place_;  // (name, what) -> index
};

class Loader {
 public:
  Loader(const CheckpointRecord& record, const std::string& root, const LoadOptions& options)
      : record_(record), folder_(Str(root, "/", record.dir())), options_(options) {}

  Status Run(const std::vector<WantedRange>& wanted) {
    RETURN_IF_ERROR(Match(wanted));
    for (const heddle::v1::RankSeal& seal : record_.seals()) {
      for (const ShardFile& file : seal.files()) {
        if (Overlaps(file)) {
          RETURN_IF_ERROR(ReadFile(seal.rank(), file));
        }
      }
    }
    return CheckCover();
  }

 private:
  struct Want {
    const WantedRange* range;
    std::vector<ElementSpan> got;  // relative to range->first
  };

  // Names of both sides must agree before a byte is read.
  Status Match(const std::vector<WantedRange>& wanted) {
    std::map<std::string, const TensorInfo*> by_name;
    for (const TensorInfo& tensor : record_.tensors()) {
      by_name[tensor.name()] = &tensor;
    }
    Misfits misfits;
    std::set<Slot> asked;
    for (const WantedRange& range : wanted) {
      const auto found = by_name.find(range.name);
      if (found == by_name.end() || !HasClass(*found->second, range.tensor_class)) {
        misfits.Add(Misfits::kMissing, range.name, range.tensor_class, "is missing");
        continue;
      }
      const TensorInfo& info = *found->second;
      asked.insert({info.id(), range.tensor_class});
      if (ShapeOf(info) != range.shape) {
        misfits.Add(
            Misfits::kMisshapen, range.name, range.tensor_class,
            Str("has the shape ", ShapeText(ShapeOf(info)), ", expected ", ShapeText(range.shape)));
      } else if (TypeOf(info, range.tensor_class) != range.type) {
        misfits.Add(Misfits::kOfOtherType, range.name, range.tensor_class,
                    "is stored as another element type");
      } else if (range.count > 0) {
        wants_[{info.id(), range.tensor_class}].push_back({.range = &range, .got = {}});
      }
    }
    if (options_.refuse_unexpected) {
      AddUnexpected(asked, &misfits);
    }
    return misfits.ToStatus();
  }

  void AddUnexpected(const std::set<Slot>& asked, Misfits* misfits) const {
    for (const TensorInfo& tensor : record_.tensors()) {
      for (const int tensor_class : tensor.classes()) {
        if (!asked.contains({tensor.id(), tensor_class})) {
          misfits->Add(Misfits::kUnexpected, tensor.name(),
                       static_cast<heddle::v1::TensorClass>(tensor_class), "is unexpected");
        }
      }
    }
  }

  bool Overlaps(const ShardFile& file) const {
    for (const ElementRange& range : file.ranges()) {
      const auto found = wants_.find({range.tensor(), range.tensor_class()});
      if (found == wants_.end()) {
        continue;
      }
      for (const Want& want : found->second) {
        if (range.first() < want.range->first + want.range->count &&
            want.range->first < range.first() + range.count()) {
          return true;
        }
      }
    }
    return false;
  }

  Status ReadFile(uint32_t rank, const ShardFile& file) {
    const std::string path = Str(folder_, "/", file.name());
    StatusOr<std::unique_ptr<ShardReader>> reader = ShardReader::Open(
        path, file, options_.check_digests ? DigestCheck::kWholeFile : DigestCheck::kNone);
    if (!reader.ok()) {
      // To the caller a missing file is damage too: the record says that it is there.
      return DataLoss(Message(reader.status()));
    }
    const heddle::v1::ShardHeader& header = (*reader)->header();
    if (header.job() != record_.job() || header.fence() != record_.fence() ||
        header.step() != record_.step() || header.rank() != rank) {
      return DataLoss(Str(path, ": belongs to another checkpoint"));
    }
    // One pass per run of wanted tensors would save little: files hold neighbouring tensors.
    const Status scanned = (*reader)->ScanAll(
        [&](const EntryKey& key, std::string_view value) { return Take(path, key, value); });
    return scanned.ok() ? scanned : DataLoss(Message(scanned));
  }

  Status Take(const std::string& path, const EntryKey& key, std::string_view value) {
    const auto found = wants_.find({key.tensor, key.tensor_class});
    if (found == wants_.end()) {
      return OkStatus();
    }
    const ElementType type = found->second.front().range->type;
    const uint64_t element = ElementBytes(type);
    const uint64_t count = value.size() / element;
    if (value.size() % element != 0 || key.first + count > ChunkElements(type)) {
      return DataLoss(Str(path, ": chunk ", key.chunk, " of ", found->second.front().range->name,
                          " has ", value.size(), " bytes"));
    }
    const uint64_t first = key.chunk * ChunkElements(type) + key.first;
    for (Want& want : found->second) {
      const uint64_t begin = std::max(first, want.range->first);
      const uint64_t end = std::min(first + count, want.range->first + want.range->count);
      if (begin < end) {
        const std::span<const char> bytes(value.data() + (begin - first) * element,
                                          (end - begin) * element);
        const uint64_t at = begin - want.range->first;
        if (want.range->take) {
          RETURN_IF_ERROR(want.range->take(at, std::as_bytes(bytes)));
        } else {
          std::memcpy(static_cast<char*>(want.range->data) + at * element, bytes.data(),
                      bytes.size());
        }
        want.got.push_back({.first = begin - want.range->first, .count = end - begin});
      }
    }
    return OkStatus();
  }

  Status CheckCover() const {
    for (const auto& [slot, wants] : wants_) {
      for (const Want& want : wants) {
        const std::vector<std::string> problems = CoverProblems(want.got, want.range->count);
        if (!problems.empty()) {
          return DataLoss(Str(folder_, ": ", want.range->name, " (",
                              ToText(want.range->tensor_class), "): ", problems.front()));
        }
      }
    }
    return OkStatus();
  }

  const CheckpointRecord& record_;
  const std::string folder_;
  const LoadOptions options_;
  std::map<Slot, std::vector<Want>> wants_;
};

std::vector<float> ToFloats(ElementType type, const std::vector<char>& bytes, uint64_t count) {
  std::vector<float> values(count);
  for (uint64_t i = 0; i < count; ++i) {
    if (type == heddle::v1::ELEMENT_TYPE_F32) {
      std::memcpy(&values[i], bytes.data() + i * 4, 4);
    } else if (type == heddle::v1::ELEMENT_TYPE_BF16) {
      uint16_t bits;
      std::memcpy(&bits, bytes.data() + i * 2, 2);
      values[i] = std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
    } else if (type == heddle::v1::ELEMENT_TYPE_F64) {
      double value;
      std::memcpy(&value, bytes.data() + i * 8, 8);
      values[i] = static_cast<float>(value);
    } else {
      int64_t value;
      std::memcpy(&value, bytes.data() + i * 8, 8);
      values[i] = static_cast<float>(value);
    }
  }
  return values;
}

}  // namespace

Status LoadRanges(const CheckpointRecord& record, const std::string& root,
                  const std::vector<WantedRange>& wanted, const LoadOptions& options) {
  return Loader(record, root, options).Run(wanted);
}

StatusOr<std::vector<Weight>> ReadModelWeights(const CheckpointRecord& record,
                                               const std::string& root) {
  std::vector<WantedRange> wanted;
  std::vector<std::vector<char>> buffers;
  buffers.reserve(static_cast<size_t>(record.tensors_size()) * 2);
  for (const TensorInfo& tensor : record.tensors()) {
    for (const auto tensor_class :
         {heddle::v1::TENSOR_CLASS_MASTER, heddle::v1::TENSOR_CLASS_BUFFER}) {
      if (!HasClass(tensor, tensor_class)) {
        continue;
      }
      const ElementType type = TypeOf(tensor, tensor_class);
      buffers.emplace_back(Elements(tensor) * ElementBytes(type));
      wanted.push_back({.name = tensor.name(),
                        .shape = ShapeOf(tensor),
                        .tensor_class = tensor_class,
                        .type = type,
                        .first = 0,
                        .count = Elements(tensor),
                        .data = buffers.back().data()});
    }
  }
  RETURN_IF_ERROR(LoadRanges(record, root, wanted, {.refuse_unexpected = false}));
  std::vector<Weight> weights;
  for (size_t i = 0; i < wanted.size(); ++i) {
    weights.push_back({.name = wanted[i].name,
                       .shape = wanted[i].shape,
                       .values = ToFloats(wanted[i].type, buffers[i], wanted[i].count)});
    buffers[i] = {};
  }
  return weights;
}

}  // namespace heddle::checkpoint
