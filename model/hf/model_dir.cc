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
#include "model/hf/safetensors.h"
#include "model/model_plan.h"
#include "model/parameter_store.h"

namespace heddle::hf {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr uintmax_t kJsonBytesMax = 64 << 20;
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

// Names of the weight files, from the index if there is one.
StatusOr<std::vector<std::string>> WeightFiles(const std::string& dir) {
  const std::string index = dir + "/" + kIndexName;
  if (!fs::exists(index)) return std::vector<std::string>{"model.safetensors"};
  ASSIGN_OR_RETURN(const std::string text, ReadText(index));
  const json object = json::parse(text, nullptr, /*allow_exceptions=*/false);
  if (!object.is_object() || !object.contains("weight_map") || !object["weight_map"].is_object()) {
    return InvalidArgument(Str(index, ": no weight_map"));
  }
  std::set<std::string> names;
  for (const auto& [tensor, file] : object["weight_map"].items()) {
    const std::string name = file.is_string() ? file.get<std::string>() : "";
    if (name.empty() || name.find('/') != std::string::npos || name.front() == '.') {
      return InvalidArgument(Str(index, ": bad file name of tensor '", tensor, "'"));
    }
    names.insert(name);
  }
  return std::vector<std::string>(names.begin(), names.end());
}

std::string Shape(const std::vector<int64_t>& shape) { return json(shape).dump(); }

Status CheckFinite(const std::string& name, std::span<const float> values) {
  for (size_t i = 0; i < values.size(); ++i) {
    if (!std::isfinite(values[i])) {
      return InvalidArgument(Str("tensor '", name, "': element ", i, " is not finite"));
    }
  }
  return OkStatus();
}

struct Located {
  const SafetensorsFile* file;
  const TensorEntry* entry;
};

// Every difference between what the plan wants and what the files hold.
std::string Differences(const model::ModelPlan& plan,
                        const std::map<std::string, Located>& present) {
  std::string problems;
  for (const model::TensorSpec& tensor : plan.tensors) {
    const auto found = present.find(tensor.name);
    if (found == present.end()) {
      problems += Str("\n  missing ", tensor.name);
    } else if (found->second.entry->shape != tensor.shape) {
      problems += Str("\n  ", tensor.name, " is ", Shape(found->second.entry->shape), ", not ",
                      Shape(tensor.shape));
    }
  }
  for (const auto& [name, located] : present) {
    // A tied head may be stored twice.
    if (plan.Find(name) == nullptr && name != "lm_head.weight") {
      problems += Str("\n  unexpected ", name);
    }
  }
  return problems;
}

}  // namespace

StatusOr<heddle::v1::ModelConfig> ReadModelConfig(const std::string& dir) {
  const std::string path = dir + "/config.json";
  ASSIGN_OR_RETURN(const std::string text, ReadText(path));
  StatusOr<heddle::v1::ModelConfig> config = ReadConfigJson(text);
  if (!config.ok()) return Annotate(config.status(), path);
  return config;
}

Status ReadWeights(const std::string& dir, model::ParameterStore* store) {
  ASSIGN_OR_RETURN(const std::vector<std::string> names, WeightFiles(dir));
  std::vector<std::unique_ptr<SafetensorsFile>> files;
  std::map<std::string, Located> present;
  for (const std::string& name : names) {
    ASSIGN_OR_RETURN(std::unique_ptr<SafetensorsFile> file,
                     SafetensorsFile::Open(dir + "/" + name));
    for (const auto& [tensor, entry] : file->header().tensors) {
      if (!present.emplace(tensor, Located{file.get(), &entry}).second) {
        return InvalidArgument(Str(dir, ": tensor '", tensor, "' is in two files"));
      }
    }
    files.push_back(std::move(file));
  }
  const std::string problems = Differences(store->plan(), present);
  if (!problems.empty())
    return InvalidArgument(Str(dir, ": tensors differ from config.json:", problems));
  for (const model::TensorSpec& tensor : store->plan().tensors) {
    const std::span<float> to = store->master(tensor);
    RETURN_IF_ERROR(present.at(tensor.name).file->ReadFloats(tensor.name, to));
    RETURN_IF_ERROR(CheckFinite(tensor.name, to));
  }
  store->RefreshComputeWeights();
  return OkStatus();
}

namespace {

Status CheckWeights(const heddle::v1::ModelConfig& config,
                    const std::vector<NamedWeight>& weights) {
  ASSIGN_OR_RETURN(const model::ModelPlan plan, model::PlanModel(config));
  std::string problems;
  std::set<std::string> seen;
  for (const NamedWeight& weight : weights) {
    const model::TensorSpec* spec = plan.Find(weight.name);
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
    RETURN_IF_ERROR(CheckFinite(weight.name, weight.values));
  }
  std::error_code error;
  fs::create_directories(dir, error);
  if (error) return FromErrno("create", dir, error.value());
  // The old description must not stand beside new weights.
  for (const char* name : {"config.json", kIndexName, "model.safetensors"}) {
    fs::remove(dir + "/" + name, error);
  }
  RETURN_IF_ERROR(WriteWeights(dir, weights, options.shard_bytes_max));
  if (!options.tokenizer_path.empty()) {
    ASSIGN_OR_RETURN(const std::string tokenizer, ReadText(options.tokenizer_path));
    RETURN_IF_ERROR(WriteFileSafely(dir + "/tokenizer.json", tokenizer));
  }
  return WriteFileSafely(dir + "/config.json", WriteConfigJson(config));
}

}  // namespace heddle::hf
