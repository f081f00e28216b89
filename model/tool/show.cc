// heddle-model show: what a model consists of.
#include <cstdio>
#include <nlohmann/json.hpp>

#include "model/hf/message_json.h"
#include "model/model_plan.h"
#include "model/tool/model_source.h"
#include "model/tool/verbs.h"

namespace heddle::tool {
namespace {

using nlohmann::json;

json Describe(const ModelSource& source, const model::ModelPlan& plan) {
  const heddle::v1::ModelConfig& config = source.config;
  json object;
  object["name"] = source.name;
  object["parameters"] = plan.parameters;
  json flops = json::array();
  for (const int64_t length : {1024, 2048, 16384}) {
    const model::TokenFlops per_token = model::FlopsPerToken(config, length);
    flops.push_back({{"sequence_length", length},
                     {"forward_weights", per_token.forward_weights},
                     {"forward_attention", per_token.forward_core},
                     {"training", per_token.training},
                     {"kv_cache_bytes_bf16", model::KvCacheBytes(config, length, 2)}});
  }
  object["flops_per_token"] = flops;
  json tensors = json::array();
  for (const model::TensorSpec& tensor : plan.tensors) {
    tensors.push_back({{"name", tensor.name},
                       {"shape", tensor.shape},
                       {"elements", tensor.elements},
                       {"unit", plan.units[static_cast<size_t>(tensor.unit)].name}});
  }
  object["tensors"] = tensors;
  object["config"] = hf::ToJson(config);
  return object;
}

void PrintTable(const json& object) {
  std::printf("model       %s\n", object["name"].get<std::string>().c_str());
  std::printf("parameters  %lld\n", object["parameters"].get<long long>());
  for (const json& row : object["flops_per_token"]) {
    std::printf(
        "at %6lld tokens: %.3g training FLOPs per token, attention forward %.3g, "
        "KV cache %.3g MiB (bf16)\n",
        row["sequence_length"].get<long long>(), row["training"].get<double>(),
        row["forward_attention"].get<double>(),
        row["kv_cache_bytes_bf16"].get<double>() / (1 << 20));
  }
  for (const json& tensor : object["tensors"]) {
    std::printf("%-52s %-16s %lld\n", tensor["name"].get<std::string>().c_str(),
                tensor["shape"].dump().c_str(), tensor["elements"].get<long long>());
  }
}

}  // namespace

Status RunShow(const ShowOptions& options) {
  ASSIGN_OR_RETURN(const ModelSource source, OpenSource(options.source, /*with_weights=*/false));
  ASSIGN_OR_RETURN(const model::ModelPlan plan, model::PlanModel(source.config));
  const json object = Describe(source, plan);
  if (options.json) {
    std::printf("%s\n", object.dump().c_str());
  } else {
    PrintTable(object);
  }
  return OkStatus();
}

}  // namespace heddle::tool
