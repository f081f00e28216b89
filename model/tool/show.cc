// heddle-model show: what a model consists of and what it costs, against its dense twin
// (attention-and-moe.md section 12).
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>

#include "base/settings/settings.h"
#include "model/hf/message_json.h"
#include "model/model_costs.h"
#include "model/model_plan.h"
#include "model/tool/model_source.h"
#include "model/tool/verbs.h"

namespace heddle::tool {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int64_t kLengthMax = 16'777'216;
constexpr double kMiB = 1 << 20;

// The preset `configs/model/NAME.yaml`; NOT_FOUND if there is none.
StatusOr<heddle::v1::ModelConfig> ReadPreset(const std::string& name) {
  for (const std::string& folder : settings::DefaultSearchPath()) {
    const std::string path = Str(folder, "/model/", name, ".yaml");
    std::ifstream in(path, std::ios::binary);
    if (name.find('/') != std::string::npos || !in) continue;
    const std::string text(std::istreambuf_iterator<char>(in), {});
    heddle::v1::ModelConfig config;
    RETURN_IF_ERROR(settings::MergeText(text, path, &config));
    settings::FillDefaults(&config);
    return config;
  }
  return NotFound(Str(name, ": no such model folder or preset"));
}

StatusOr<ModelSource> OpenShown(const SourceOptions& options) {
  if (options.dir.empty() || fs::exists(options.dir)) {
    return OpenSource(options, /*with_weights=*/false);
  }
  ModelSource source;
  source.name = options.dir;
  ASSIGN_OR_RETURN(source.config, ReadPreset(options.dir));
  return source;
}

StatusOr<std::vector<int64_t>> LengthsOf(const std::vector<int64_t>& asked,
                                         const heddle::v1::ModelConfig& config) {
  std::vector<int64_t> lengths = asked;
  if (lengths.empty()) {
    for (const int64_t length : {2048, 16384}) {
      lengths.push_back(std::min<int64_t>(length, config.max_position_embeddings()));
    }
  }
  for (const int64_t length : lengths) {
    if (length < 1 || length > kLengthMax) {
      return InvalidArgument(Str("--lengths: ", length, " is not between 1 and ", kLengthMax));
    }
  }
  std::sort(lengths.begin(), lengths.end());
  lengths.erase(std::unique(lengths.begin(), lengths.end()), lengths.end());
  return lengths;
}

json CostsAt(const heddle::v1::ModelConfig& config, int64_t length) {
  const model::TokenFlops flops = model::FlopsPerToken(config, length);
  return {{"sequence_length", length},
          {"forward_weights", flops.forward_weights},
          {"forward_attention", flops.forward_core},
          {"training", flops.training},
          {"kv_cache_bytes_bf16", model::KvCacheBytes(config, length, 2)}};
}

json SpeedAt(const heddle::v1::ModelConfig& config, int64_t length) {
  const model::SpeedUp speed = model::SpeedUpOverDense(config, length);
  return {{"sequence_length", length},
          {"core_forward", speed.core_forward},
          {"core_training", speed.core_training},
          {"step_forward", speed.step_forward},
          {"step_training", speed.step_training},
          {"decode_bytes_read", speed.decode_bytes},
          {"dense_core_share", speed.dense_core_share},
          {"added_projections_share", speed.added_share}};
}

// One sentence on whether a training step can be faster than the dense twin's; empty for a model
// that has no sparse layer.
std::string Verdict(const heddle::v1::ModelConfig& config, int64_t break_even) {
  const int64_t limit = config.max_position_embeddings();
  const model::SpeedUp speed = model::SpeedUpOverDense(config, limit);
  if (speed.core_forward == 1.0 && speed.added_share == 0.0) return "";
  if (break_even > 0) {
    return Str("a training step is faster than the dense one from ", break_even, " tokens on");
  }
  char text[320];
  std::snprintf(
      text, sizeof(text),
      "no step speed-up is possible: up to max_position_embeddings = %lld tokens a training "
      "step costs more than the dense one; there the dense attention core is %.1f %% of a "
      "step and the projections that sparsity adds are %.1f %%",
      static_cast<long long>(limit), 100 * speed.dense_core_share, 100 * speed.added_share);
  return text;
}

json TensorJson(const model::TensorSpec& tensor, const model::ModelPlan& plan) {
  return {{"name", tensor.name},
          {"shape", tensor.shape},
          {"elements", tensor.elements},
          {"unit", plan.units[static_cast<size_t>(tensor.unit)].name}};
}

json Describe(const ModelSource& source, const model::ModelPlan& plan,
              const std::vector<int64_t>& lengths) {
  const heddle::v1::ModelConfig& config = source.config;
  json object;
  object["name"] = source.name;
  object["parameters"] = plan.parameters;
  object["active_parameters"] = model::ActiveParameters(config, plan.parameters);
  object["kv_cache_bytes_per_token"] = {
      {"bf16", model::CacheBytesPerToken(config, {})},
      {"fp8", model::CacheBytesPerToken(config, {.quantized = true})},
      {"int8", model::CacheBytesPerToken(config, {.quantized = true})}};
  object["flops_per_token"] = json::array();
  object["speed_up_over_dense"] = json::array();
  for (const int64_t length : lengths) {
    object["flops_per_token"].push_back(CostsAt(config, length));
    object["speed_up_over_dense"].push_back(SpeedAt(config, length));
  }
  const int64_t break_even = model::BreakEvenLength(config, config.max_position_embeddings());
  object["break_even_length"] = break_even > 0 ? json(break_even) : json(nullptr);
  object["verdict"] = Verdict(config, break_even);
  object["tensors"] = json::array();
  for (const model::TensorSpec& tensor : plan.tensors) {
    object["tensors"].push_back(TensorJson(tensor, plan));
  }
  object["buffers"] = json::array();
  for (const model::TensorSpec& buffer : plan.buffers) {
    object["buffers"].push_back(TensorJson(buffer, plan));
  }
  object["config"] = hf::ToJson(config);
  return object;
}

void PrintCosts(const json& object) {
  const json& cache = object["kv_cache_bytes_per_token"];
  std::printf("KV cache    %.6g bytes per token (bf16), %.6g (fp8, int8)\n",
              cache["bf16"].get<double>(), cache["fp8"].get<double>());
  std::printf("\n%10s %18s %18s %14s\n", "tokens", "training FLOPs", "attention fwd",
              "KV cache MiB");
  for (const json& row : object["flops_per_token"]) {
    std::printf("%10lld %18.4g %18.4g %14.4g\n", row["sequence_length"].get<long long>(),
                row["training"].get<double>(), row["forward_attention"].get<double>(),
                row["kv_cache_bytes_bf16"].get<double>() / kMiB);
  }
  const std::string verdict = object["verdict"];
  if (verdict.empty()) return;
  std::printf("\ndense / this model, counted FLOPs and bytes:\n%10s %10s %10s %10s %10s %10s\n",
              "tokens", "core fwd", "core train", "step fwd", "step train", "decode");
  for (const json& row : object["speed_up_over_dense"]) {
    std::printf("%10lld %10.3g %10.3g %10.3g %10.3g %10.3g\n",
                row["sequence_length"].get<long long>(), row["core_forward"].get<double>(),
                row["core_training"].get<double>(), row["step_forward"].get<double>(),
                row["step_training"].get<double>(), row["decode_bytes_read"].get<double>());
  }
  std::printf("%s\n", verdict.c_str());
}

// Blocks alike follow each other as one line; `wide` lists every tensor instead.
void PrintTensors(const json& object, const model::ModelPlan& plan, bool wide) {
  std::printf("\n");
  if (wide) {
    for (const char* part : {"tensors", "buffers"}) {
      for (const json& tensor : object[part]) {
        std::printf("%-60s %-16s %lld\n", tensor["name"].get<std::string>().c_str(),
                    tensor["shape"].dump().c_str(), tensor["elements"].get<long long>());
      }
    }
    return;
  }
  const auto parameters = [&](const model::UnitSpec& unit) {
    int64_t sum = 0;
    for (int i = 0; i < unit.tensor_count; ++i) {
      sum += plan.tensors[static_cast<size_t>(unit.first_tensor + i)].elements;
    }
    return sum;
  };
  for (size_t first = 0; first < plan.units.size();) {
    const model::UnitSpec& unit = plan.units[first];
    size_t last = first;
    while (last + 1 < plan.units.size() && plan.units[last + 1].tensor_count == unit.tensor_count &&
           parameters(plan.units[last + 1]) == parameters(unit)) {
      ++last;
    }
    const std::string name =
        first == last ? unit.name : Str(unit.name, " to ", plan.units[last].name);
    std::printf("%-28s %6d tensors %16lld parameters%s\n", name.c_str(), unit.tensor_count,
                static_cast<long long>(parameters(unit)), first == last ? "" : " each");
    first = last + 1;
  }
}

}  // namespace

Status RunShow(const ShowOptions& options) {
  ASSIGN_OR_RETURN(const ModelSource source, OpenShown(options.source));
  ASSIGN_OR_RETURN(const model::ModelPlan plan, model::PlanModel(source.config));
  ASSIGN_OR_RETURN(const std::vector<int64_t> lengths, LengthsOf(options.lengths, source.config));
  const json object = Describe(source, plan, lengths);
  if (options.json) {
    std::printf("%s\n", object.dump().c_str());
    return OkStatus();
  }
  std::printf("model       %s\n", source.name.c_str());
  const int64_t active = object["active_parameters"];
  std::printf("parameters  %lld\n", static_cast<long long>(plan.parameters));
  if (active != plan.parameters) {
    std::printf("active      %lld per token\n", static_cast<long long>(active));
  }
  PrintCosts(object);
  PrintTensors(object, plan, options.wide);
  return OkStatus();
}

}  // namespace heddle::tool
