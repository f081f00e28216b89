#include "model/hf/model_dir.h"

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <utility>

#include "heddle/v1/config.pb.h"
#include "model/hf/config_json.h"
#include "model/hf/json_values.h"
#include "model/hf/name_map.h"
#include "model/hf/safetensors.h"
#include "model/model_plan.h"
#include "model/parameter_store.h"

namespace heddle::hf {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr uintmax_t kJsonBytesMax = 64 << 20;
constexpr int kIndexDepthMax = 8;
constexpr int kConfigDepthMax = 32;
constexpr int64_t kPieceElements = 1 << 20;  // of a tensor, read at a time
constexpr char kIndexName[] = "model.safetensors.index.json";

StatusOr<std::string> ReadText(const std::string& path) {
  std::error_code error;
  const uintmax_t bytes = fs::file_size(path, error);
  if (error) return FromErrno("read", path, error.value());
  if (bytes > kJsonBytesMax) return InvalidArgument(Str(path, ": larger than ", kJsonBytesMax));
  std::ifstream in(path, std::ios::binary);
  std::string text(static_cast<size_t>(bytes), '\0');
  if (!in.read(text.data(), static_cast<std::streamsize>(bytes))) return FromErrno("read", path);
  return text;
}

// Weight files, and which tensor the index sees in which; without an index one file.
struct WeightFiles {
  std::set<std::string> names;
  std::map<std::string, std::string> file_of;  // by the files' tensor names; empty without an index
};

StatusOr<WeightFiles> FindFiles(const std::string& dir) {
  const std::string index = dir + "/" + kIndexName;
  if (!fs::exists(index)) return WeightFiles{{"model.safetensors"}, {}};
  ASSIGN_OR_RETURN(const std::string text, ReadText(index));
  StatusOr<json> object = ParseJsonObject(text, kIndexDepthMax);
  if (!object.ok()) return Annotate(object.status(), index);
  if (!object->contains("weight_map") || !(*object)["weight_map"].is_object()) {
    return InvalidArgument(Str(index, ": no weight_map"));
  }
  WeightFiles files;
  for (const auto& [tensor, file] : (*object)["weight_map"].items()) {
    const std::string name = file.is_string() ? file.get<std::string>() : "";
    if (name.empty() || name.find('/') != std::string::npos || name.front() == '.' ||
        name.find('\0') != std::string::npos) {
      return InvalidArgument(Str(index, ": bad file name of tensor '", tensor, "'"));
    }
    files.names.insert(name);
    files.file_of.emplace(tensor, name);
  }
  return files;
}

std::string Shape(const std::vector<int64_t>& shape) { return json(shape).dump(); }

// Of a tensor's values those from element `first` on.
Status CheckFinite(const std::string& name, int64_t first, std::span<const float> values) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) {
      return InvalidArgument(
          Str("tensor '", name, "': element ", first + static_cast<int64_t>(i), " is not finite"));
    }
  }
  return OkStatus();
}

struct Located {
  const SafetensorsFile* file;
  std::string name;  // in the file
  const TensorEntry* entry;
};

// What a folder's weight files hold, by our names.
struct Folder {
  std::vector<std::unique_ptr<SafetensorsFile>> files;
  std::map<std::string, Located> tensors;
  std::string problems;  // one a line
};

StatusOr<Folder> OpenWeights(const std::string& dir, Architecture architecture) {
  ASSIGN_OR_RETURN(const WeightFiles found, FindFiles(dir));
  Folder folder;
  std::set<std::string> seen;
  for (const std::string& name : found.names) {
    ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> file,
                     SafetensorsFile::Open(dir + "/" + name));
    for (const auto& [tensor, entry] : file->header().tensors) {
      seen.insert(tensor);
      if (CarriesNothing(tensor)) continue;
      const auto listed = found.file_of.find(tensor);
      if (!found.file_of.empty() && (listed == found.file_of.end() || listed->second != name)) {
        folder.problems += Str("\n  ", tensor, " is in ", name, ", the index says ",
                               listed == found.file_of.end() ? "nothing" : listed->second);
      }
      const std::string ours = OurName(tensor, architecture);
      if (!folder.tensors.emplace(ours, Located{file.get(), tensor, &entry}).second) {
        folder.problems += Str("\n  ", tensor, " is there twice");
      }
    }
    folder.files.push_back(std::move(file));
  }
  for (const auto& [tensor, name] : found.file_of) {
    if (!seen.contains(tensor)) folder.problems += Str("\n  ", tensor, " is not in ", name);
  }
  return folder;
}

void CompareTensor(const model::TensorSpec& wanted, bool needed, Architecture architecture,
                   const Folder& folder, std::string* problems) {
  const auto found = folder.tensors.find(wanted.name);
  if (found == folder.tensors.end()) {
    if (needed) *problems += Str("\n  missing ", FileName(wanted.name, architecture));
  } else if (found->second.entry->shape != wanted.shape) {
    *problems += Str("\n  ", found->second.name, " is ", Shape(found->second.entry->shape),
                     ", not ", Shape(wanted.shape));
  }
}

// Every difference between what the plan wants and what the files hold.
std::string Differences(const model::ModelPlan& plan, Architecture architecture,
                        const Folder& folder) {
  std::string problems = folder.problems;
  for (const model::TensorSpec& tensor : plan.tensors) {
    CompareTensor(tensor, /*needed=*/true, architecture, folder, &problems);
  }
  for (const model::TensorSpec& buffer : plan.buffers) {
    CompareTensor(buffer, /*needed=*/false, architecture, folder, &problems);
  }
  for (const auto& [name, located] : folder.tensors) {
    const bool known = plan.Find(name) != nullptr || plan.FindBuffer(name) != nullptr;
    // A tied head may be stored twice.
    if (!known && name != "lm_head.weight") problems += Str("\n  unexpected ", located.name);
  }
  return problems;
}

// The weight files of `dir`, after a comparison with the plan.
StatusOr<Folder> OpenCompared(const std::string& dir, Architecture architecture,
                              const model::ModelPlan& plan) {
  ASSIGN_OR_RETURN(Folder folder, OpenWeights(dir, architecture));
  const std::string problems = Differences(plan, architecture, folder);
  if (!problems.empty()) {
    return InvalidArgument(Str(dir, ": tensors differ from config.json:", problems));
  }
  // One more than the plan's is a tied head, of which nothing is read.
  for (const auto& [name, located] : folder.tensors) {
    if (plan.Find(name) == nullptr && plan.FindBuffer(name) == nullptr) continue;
    RETURN_IF_ERROR(located.file->CheckFloats(located.name));
  }
  return folder;
}

// Elements [first, first + to.size()) of a tensor; a buffer that the folder lacks is 0.
Status ReadPiece(const Folder& folder, const std::string& name, int64_t first,
                 const ReadOptions& options, std::span<float> to) {
  const auto found = folder.tensors.find(name);
  if (found == folder.tensors.end()) {
    std::fill(to.begin(), to.end(), 0.0f);
    return OkStatus();
  }
  const Located& from = found->second;
  RETURN_IF_ERROR(from.file->ReadFloats(from.name, first, to));
  from.file->Forget(from.name, first, static_cast<int64_t>(to.size()));
  return options.allow_nonfinite ? OkStatus() : CheckFinite(from.name, first, to);
}

// `scratch` is for ranges that are taken; it grows to a piece.
Status ReadRange(const Folder& folder, const WeightRange& range, const ReadOptions& options,
                 std::vector<float>* scratch) {
  for (int64_t done = 0; done < range.count; done += kPieceElements) {
    const auto count = static_cast<size_t>(std::min(kPieceElements, range.count - done));
    if (range.data == nullptr && scratch->size() < count) scratch->resize(count);
    const std::span<float> piece(range.data != nullptr ? range.data + done : scratch->data(),
                                 count);
    RETURN_IF_ERROR(ReadPiece(folder, range.name, range.first + done, options, piece));
    if (range.data == nullptr) RETURN_IF_ERROR(range.take(range.first + done, piece));
  }
  return OkStatus();
}

StatusOr<std::string> ReadConfigText(const std::string& dir) {
  return ReadText(dir + "/config.json");
}

StatusOr<std::vector<int64_t>> EosIdsIn(const std::string& text, int64_t vocabulary) {
  ASSIGN_OR_RETURN(const json object, ParseJsonObject(text, kConfigDepthMax));
  std::vector<int64_t> ids;
  const auto found = object.find("eos_token_id");
  if (found == object.end() || found->is_null()) return ids;
  const json list = found->is_array() ? *found : json::array({*found});
  for (const json& id : list) {
    if (!id.is_number_integer()) {
      return InvalidArgument("eos_token_id: neither an integer nor a list of integers");
    }
    const bool large = id.is_number_unsigned() && id.get<uint64_t>() > INT64_MAX;
    if (large || id.get<int64_t>() < 0 || id.get<int64_t>() >= vocabulary) {
      return InvalidArgument(
          Str("eos_token_id: ", id.dump(), " is outside the vocabulary of ", vocabulary));
    }
    ids.push_back(id.get<int64_t>());
  }
  return ids;
}

}  // namespace

StatusOr<heddle::v1::ModelConfig> ReadModelConfig(const std::string& dir) {
  ASSIGN_OR_RETURN(const std::string text, ReadConfigText(dir));
  StatusOr<heddle::v1::ModelConfig> config = ReadConfigJson(text);
  if (!config.ok()) return Annotate(config.status(), dir + "/config.json");
  return config;
}

StatusOr<std::vector<int64_t>> ReadEosIds(const std::string& dir, int64_t vocabulary) {
  for (const char* name : {"/generation_config.json", "/config.json"}) {
    if (!fs::exists(dir + name)) continue;
    ASSIGN_OR_RETURN(const std::string text, ReadText(dir + name));
    StatusOr<std::vector<int64_t>> ids = EosIdsIn(text, vocabulary);
    if (!ids.ok()) return Annotate(ids.status(), dir + name);
    if (!ids->empty()) return ids;
  }
  return std::vector<int64_t>();
}

Status ReadWeightRanges(const std::string& dir, const model::ModelPlan& plan,
                        const std::vector<WeightRange>& ranges, const ReadOptions& options) {
  ASSIGN_OR_RETURN(const std::string text, ReadConfigText(dir));
  ASSIGN_OR_RETURN(const Architecture architecture, ReadArchitecture(text));
  ASSIGN_OR_RETURN(const Folder folder, OpenCompared(dir, architecture, plan));
  std::vector<float> scratch;
  for (const WeightRange& range : ranges) {
    const model::TensorSpec* spec = plan.Find(range.name);
    if (spec == nullptr) spec = plan.FindBuffer(range.name);
    HEDDLE_CHECK(spec != nullptr && range.first >= 0 && range.count >= 0 &&
                     range.count <= spec->elements - range.first,
                 range.name);
    RETURN_IF_ERROR(ReadRange(folder, range, options, &scratch));
  }
  return OkStatus();
}

Status ReadWeights(const std::string& dir, model::ParameterStore* store,
                   const ReadOptions& options) {
  std::vector<WeightRange> ranges;
  for (const model::TensorSpec& tensor : store->plan().tensors) {
    ranges.push_back({tensor.name, 0, tensor.elements, store->master(tensor).data(), {}});
  }
  for (const model::TensorSpec& buffer : store->plan().buffers) {
    ranges.push_back({buffer.name, 0, buffer.elements, store->buffer(buffer).data(), {}});
  }
  RETURN_IF_ERROR(ReadWeightRanges(dir, store->plan(), ranges, options));
  store->RefreshComputeWeights();
  return OkStatus();
}

std::vector<NamedWeight> WeightsOf(model::ParameterStore* store) {
  std::vector<NamedWeight> weights;
  for (const model::TensorSpec& tensor : store->plan().tensors) {
    weights.push_back({tensor.name, tensor.shape, store->master(tensor)});
  }
  for (const model::TensorSpec& buffer : store->plan().buffers) {
    weights.push_back({buffer.name, buffer.shape, store->buffer(buffer)});
  }
  return weights;
}

namespace {

Status CheckWeights(const heddle::v1::ModelConfig& config,
                    const std::vector<NamedWeight>& weights) {
  ASSIGN_OR_RETURN(const model::ModelPlan plan, model::PlanModel(config));
  std::string problems;
  std::set<std::string> seen;
  for (const NamedWeight& weight : weights) {
    const model::TensorSpec* spec = plan.Find(weight.name);
    if (spec == nullptr) spec = plan.FindBuffer(weight.name);
    if (spec == nullptr || spec->shape != weight.shape ||
        spec->elements != static_cast<int64_t>(weight.values.size())) {
      problems += Str("\n  unexpected ", weight.name, " ", Shape(weight.shape));
    }
    seen.insert(weight.name);
  }
  for (const model::TensorSpec& tensor : plan.tensors) {
    if (!seen.contains(tensor.name)) problems += Str("\n  missing ", tensor.name);
  }
  if (!problems.empty()) return InvalidArgument(Str("weights differ from the model:", problems));
  return OkStatus();
}

// Greedy in key order; a tensor above the limit stands alone.
std::vector<std::vector<const NamedWeight*>> Split(const std::vector<NamedWeight>& weights,
                                                   int64_t bytes_max) {
  std::vector<const NamedWeight*> sorted;
  for (const NamedWeight& weight : weights) sorted.push_back(&weight);
  std::sort(sorted.begin(), sorted.end(),
            [](const NamedWeight* a, const NamedWeight* b) { return a->name < b->name; });
  std::vector<std::vector<const NamedWeight*>> shards;
  int64_t used = 0;
  for (const NamedWeight* weight : sorted) {
    const int64_t bytes = static_cast<int64_t>(weight->values.size_bytes());
    if (shards.empty() || used + bytes > bytes_max) {
      shards.emplace_back();
      used = 0;
    }
    shards.back().push_back(weight);
    used += bytes;
  }
  return shards;
}

std::string ShardName(size_t index, size_t count) {
  char name[64];
  std::snprintf(name, sizeof(name), "model-%05zu-of-%05zu.safetensors", index + 1, count);
  return count == 1 ? "model.safetensors" : name;
}

// The architecture whose model gives the same logits with these weights, and the weights that its
// files hold, under its names.
Architecture ArchitectureFor(const heddle::v1::ModelConfig& config,
                             std::vector<NamedWeight>* weights) {
  const Architecture architecture = ArchitectureOf(config);
  if (architecture != Architecture::kMixtral) return architecture;
  const auto is_bias = [](const NamedWeight& weight) {
    return weight.name.find(".e_score_correction_bias") != std::string::npos;
  };
  // Mixtral's router has no bias: one that does something needs our own type.
  for (const NamedWeight& weight : *weights) {
    if (is_bias(weight) && std::any_of(weight.values.begin(), weight.values.end(),
                                       [](float value) { return value != 0.0f; })) {
      return Architecture::kHeddle;
    }
  }
  std::erase_if(*weights, is_bias);
  for (NamedWeight& weight : *weights) weight.name = FileName(weight.name, architecture);
  return architecture;
}

// Weight files of an earlier write, which an index or a reader of "*.safetensors" would still see.
void RemoveOldWeights(const std::string& dir) {
  std::error_code error;
  for (const auto& entry : fs::directory_iterator(dir, error)) {
    const std::string name = entry.path().filename();
    const bool weights =
        name == "model.safetensors" || name == kIndexName ||
        (name.rfind("model-", 0) == 0 && entry.path().extension() == ".safetensors");
    std::error_code ignored;
    if (weights) fs::remove(entry.path(), ignored);
  }
}

Status WriteWeights(const std::string& dir, const std::vector<NamedWeight>& weights,
                    int64_t shard_bytes_max) {
  const auto shards = Split(weights, shard_bytes_max);
  json map = json::object();
  int64_t total = 0;
  for (size_t i = 0; i < shards.size(); ++i) {
    std::vector<WriteTensor> tensors;
    for (const NamedWeight* weight : shards[i]) {
      tensors.push_back({weight->name, DType::kF32, weight->shape, weight->values.data()});
      map[weight->name] = ShardName(i, shards.size());
      total += static_cast<int64_t>(weight->values.size_bytes());
    }
    RETURN_IF_ERROR(WriteSafetensors(dir + "/" + ShardName(i, shards.size()), tensors));
  }
  if (shards.size() <= 1) return OkStatus();
  const json index = {{"metadata", {{"total_size", total}}}, {"weight_map", map}};
  return WriteFileSafely(dir + "/" + kIndexName, index.dump(2) + "\n");
}

}  // namespace

Status WriteModelDir(const std::string& dir, const heddle::v1::ModelConfig& config,
                     const std::vector<NamedWeight>& weights, const ExportOptions& options) {
  RETURN_IF_ERROR(CheckWeights(config, weights));
  for (const NamedWeight& weight : weights) {
    if (!options.allow_nonfinite) RETURN_IF_ERROR(CheckFinite(weight.name, 0, weight.values));
  }
  std::error_code error;
  fs::create_directories(dir, error);
  if (error) return FromErrno("create", dir, error.value());
  // The old description must not stand beside new weights.
  fs::remove(dir + "/config.json", error);
  RemoveOldWeights(dir);
  std::vector<NamedWeight> written = weights;
  const Architecture architecture = ArchitectureFor(config, &written);
  RETURN_IF_ERROR(WriteWeights(dir, written, options.shard_bytes_max));
  if (!options.tokenizer_path.empty()) {
    ASSIGN_OR_RETURN(const std::string tokenizer, ReadText(options.tokenizer_path));
    RETURN_IF_ERROR(WriteFileSafely(dir + "/tokenizer.json", tokenizer));
  }
  return WriteFileSafely(dir + "/config.json", WriteConfigJson(config, architecture, options.eos));
}

}  // namespace heddle::hf
