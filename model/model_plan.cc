#include "model/model_plan.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "heddle/v1/config.pb.h"
#include "model/model_plan_internal.h"

namespace heddle::model {
namespace {

using heddle::v1::AttentionKind;
using heddle::v1::ModelConfig;

constexpr double kInitStddev = 0.02;

int64_t RoundUp(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

int64_t Product(const std::vector<int64_t>& shape) {
  int64_t product = 1;
  for (const int64_t extent : shape) product *= extent;
  return product;
}

const TensorSpec* FindByName(const std::vector<TensorSpec>& specs, const std::string& name) {
  for (const TensorSpec& spec : specs) {
    if (spec.name == name) return &spec;
  }
  return nullptr;
}

}  // namespace

Init Constant(double value) { return {InitKind::kConstant, value}; }

Init Xavier(const std::vector<int64_t>& shape, double gain) {
  double receptive = 1;
  for (size_t i = 2; i < shape.size(); ++i) receptive *= static_cast<double>(shape[i]);
  const double fans = static_cast<double>(shape[0] + shape[1]) * receptive;
  return {InitKind::kUniform, gain * std::sqrt(6.0 / fans)};
}

Init TorchLinear(int64_t inputs) {
  return {InitKind::kUniform, 1.0 / std::sqrt(static_cast<double>(inputs))};
}

void PlanBuilder::Align() { plan_.flat_elements = RoundUp(plan_.flat_elements, kFlatAlignment); }

void PlanBuilder::BeginUnit(const std::string& name) {
  Align();
  UnitSpec unit;
  unit.name = name;
  unit.first_tensor = static_cast<int>(plan_.tensors.size());
  unit.offset = plan_.flat_elements;
  plan_.units.push_back(unit);
}

void PlanBuilder::Add(const std::string& name, std::vector<int64_t> shape, Init init,
                      Placement placement) {
  double elements = 1;
  for (const int64_t extent : shape) elements *= static_cast<double>(extent);
  total_ += elements;
  if (total_ > kParametersMax) return;  // reported by Finish
  if (!placement.joined) Align();
  TensorSpec tensor;
  tensor.name = name;
  tensor.shape = std::move(shape);
  tensor.elements = Product(tensor.shape);
  tensor.offset = plan_.flat_elements;
  tensor.unit = static_cast<int>(plan_.units.size()) - 1;
  tensor.init = init.kind;
  tensor.init_value = init.value;
  if (init.kind == InitKind::kNormal) tensor.init_stddev = kInitStddev;
  if (init.kind == InitKind::kResidualOut) {
    tensor.init_stddev = kInitStddev / std::sqrt(2.0 * config_.n_layers());
  }
  tensor.decays = placement.trained && name.find("norm") == std::string::npos &&
                  name.find("bias") == std::string::npos;
  tensor.indexer = placement.indexer;
  plan_.parameters += tensor.elements;
  plan_.flat_elements += tensor.elements;
  plan_.index.emplace(name, static_cast<int>(plan_.tensors.size()));
  plan_.tensors.push_back(std::move(tensor));
  ++plan_.units.back().tensor_count;
}

void PlanBuilder::AddBuffer(const std::string& name, std::vector<int64_t> shape) {
  TensorSpec buffer;
  buffer.name = name;
  buffer.shape = std::move(shape);
  buffer.elements = Product(buffer.shape);
  buffer.offset = plan_.buffer_elements;
  buffer.unit = static_cast<int>(plan_.units.size()) - 1;
  buffer.init = InitKind::kConstant;
  buffer.decays = false;
  plan_.buffer_elements += RoundUp(buffer.elements, kFlatAlignment);
  plan_.buffers.push_back(std::move(buffer));
}

StatusOr<ModelPlan> PlanBuilder::Finish() {
  if (total_ > kParametersMax) {
    return InvalidArgument(
        Str("model: ", total_, " parameters, at most ", kParametersMax, " can be counted"));
  }
  Align();
  for (size_t i = 0; i < plan_.units.size(); ++i) {
    const int64_t end =
        i + 1 < plan_.units.size() ? plan_.units[i + 1].offset : plan_.flat_elements;
    plan_.units[i].elements = end - plan_.units[i].offset;
  }
  return std::move(plan_);
}

ExpertRange ExpertsOfRank(const ModelConfig& config, int rank, int degree) {
  const int64_t count = config.moe().n_experts() / degree;
  return {count * (rank % degree), count};
}

namespace {

// Units [first, last) with their tensors, offsets from 0; without buffers.
ModelPlan Part(const ModelPlan& plan, size_t first, size_t last) {
  ModelPlan part;
  part.units.assign(plan.units.begin() + static_cast<std::ptrdiff_t>(first),
                    plan.units.begin() + static_cast<std::ptrdiff_t>(last));
  if (part.units.empty()) return part;
  const int64_t offset = part.units.front().offset;
  const int first_tensor = part.units.front().first_tensor;
  for (UnitSpec& unit : part.units) {
    for (int i = 0; i < unit.tensor_count; ++i) {
      TensorSpec tensor =
          plan.tensors[static_cast<size_t>(unit.first_tensor) + static_cast<size_t>(i)];
      tensor.offset -= offset;
      tensor.unit -= static_cast<int>(first);
      part.parameters += tensor.elements;
      part.index.emplace(tensor.name, static_cast<int>(part.tensors.size()));
      part.tensors.push_back(std::move(tensor));
    }
    unit.offset -= offset;
    unit.first_tensor -= first_tensor;
    part.flat_elements += unit.elements;
  }
  return part;
}

}  // namespace

ModelPlan DensePart(const ModelPlan& plan) {
  ModelPlan part = Part(plan, 0, static_cast<size_t>(plan.dense_units));
  part.dense_units = plan.dense_units;
  part.buffers = plan.buffers;
  part.buffer_elements = plan.buffer_elements;
  return part;
}

ModelPlan ExpertPart(const ModelPlan& plan) {
  ModelPlan part = Part(plan, static_cast<size_t>(plan.dense_units), plan.units.size());
  part.experts = plan.experts;
  part.expert_layers = plan.expert_layers;
  std::vector<UnitSpec> layers;
  for (size_t u = 0; u < part.units.size(); ++u) {
    const UnitSpec& expert = part.units[u];
    const size_t layer = u / static_cast<size_t>(plan.experts.count);
    if (layer == layers.size()) {
      layers.push_back(expert);
      layers.back().name = Str("block.", plan.expert_layers[layer], ".experts");
    } else {
      layers.back().tensor_count += expert.tensor_count;
      layers.back().elements += expert.elements;
    }
  }
  part.units = std::move(layers);
  for (size_t u = 0; u < part.units.size(); ++u) {
    for (int i = 0; i < part.units[u].tensor_count; ++i) {
      part.tensors[static_cast<size_t>(part.units[u].first_tensor) + static_cast<size_t>(i)].unit =
          static_cast<int>(u);
    }
  }
  return part;
}

const TensorSpec* ModelPlan::Find(const std::string& name) const {
  if (index.empty()) return FindByName(tensors, name);
  const auto found = index.find(name);
  return found == index.end() ? nullptr : &tensors[static_cast<size_t>(found->second)];
}
const TensorSpec* ModelPlan::FindBuffer(const std::string& name) const {
  return FindByName(buffers, name);
}

Heads HeadsOf(const ModelConfig& config) {
  Heads heads;
  heads.query = config.n_heads();
  heads.kv = config.n_kv_heads() > 0 ? config.n_kv_heads() : config.n_heads();
  heads.dim = config.head_dim() > 0 ? config.head_dim() : config.d_model() / config.n_heads();
  return heads;
}

AttentionKind LayerKind(const ModelConfig& config, int layer) {
  const heddle::v1::AttentionConfig& attention = config.attention();
  if (attention.pattern_size() == 0) return attention.kind();
  return attention.pattern(layer % attention.pattern_size());
}

bool UsesKind(const ModelConfig& config, AttentionKind kind) {
  const int layers = std::min(config.n_layers(), std::max(1, config.attention().pattern_size()));
  for (int layer = 0; layer < layers; ++layer) {
    if (LayerKind(config, layer) == kind) return true;
  }
  return false;
}

bool DsaOnLatent(const ModelConfig& config) {
  return config.attention().dsa().core() == heddle::v1::DsaConfig::CORE_MLA;
}

bool LayerUsesLatent(const ModelConfig& config, int layer) {
  const AttentionKind kind = LayerKind(config, layer);
  return kind == heddle::v1::ATTENTION_KIND_MLA ||
         (kind == heddle::v1::ATTENTION_KIND_DSA && DsaOnLatent(config));
}

bool LayerHasIndexer(const ModelConfig& config, int layer) {
  const AttentionKind kind = LayerKind(config, layer);
  if (kind != heddle::v1::ATTENTION_KIND_DSA) return kind == heddle::v1::ATTENTION_KIND_GSA;
  int before = 0;
  for (int other = 0; other < layer; ++other) {
    if (LayerKind(config, other) == heddle::v1::ATTENTION_KIND_DSA) ++before;
  }
  return before % config.attention().dsa().index_share_every() == 0;
}

bool LayerHasExperts(const ModelConfig& config, int layer) {
  const heddle::v1::MoeConfig& moe = config.moe();
  if (moe.n_experts() == 0) return false;
  if (moe.layers_size() > 0) {
    return std::find(moe.layers().begin(), moe.layers().end(), layer) != moe.layers().end();
  }
  return layer >= moe.first_dense() && layer % moe.every() == moe.every() - 1;
}

Window WindowOf(const ModelConfig& config) {
  const heddle::v1::SwaConfig& swa = config.attention().swa();
  Window window;
  window.keys = swa.window() + (swa.window_inclusive() ? 1 : 0);
  window.sinks = swa.sink_size();
  return window;
}

StatusOr<ModelPlan> PlanModel(const ModelConfig& config) {
  return PlanModel(config, {0, std::max(0, config.moe().n_experts())});
}

StatusOr<ModelPlan> PlanModel(const ModelConfig& config, ExpertRange experts) {
  const std::vector<std::string> problems = ModelProblems(config);
  if (!problems.empty()) {
    std::string text;
    for (const std::string& problem : problems) {
      if (!text.empty()) text += "\n";
      text += problem;
    }
    return InvalidArgument(text);
  }
  if (experts.first < 0 || experts.count < 0 ||
      experts.first + experts.count > config.moe().n_experts()) {
    return InvalidArgument(Str("model.moe.n_experts: experts ", experts.first, " to ",
                               experts.first + experts.count - 1, " of ", config.moe().n_experts(),
                               " were asked for"));
  }
  const int64_t d = config.d_model();
  PlanBuilder plan(config);
  plan.BeginUnit("embedding");
  plan.Add("model.embed_tokens.weight", {config.vocab_size(), d}, {});
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    plan.BeginUnit(Str("block.", layer));
    AddBlock(config, layer, &plan);
  }
  plan.BeginUnit("head");
  AddNorm(config, "model.norm", &plan);
  if (!config.tie_embeddings()) plan.Add("lm_head.weight", {config.vocab_size(), d}, {});
  plan.EndDense();
  for (int layer = 0; layer < config.n_layers(); ++layer) {
    if (!LayerHasExperts(config, layer)) continue;
    plan.BeginExperts(layer, experts);
    for (int64_t expert = experts.first; expert < experts.first + experts.count; ++expert) {
      plan.BeginUnit(Str("block.", layer, ".expert.", expert));
      AddExpert(config, layer, expert, &plan);
    }
  }
  return plan.Finish();
}

}  // namespace heddle::model
