#include "model/hf/convert.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "heddle/v1/config.pb.h"
#include "model/model_plan.h"
#include "model/parameter_store.h"

namespace heddle::hf {
namespace {

using heddle::v1::AttentionKind;
using heddle::v1::GsaConfig;
using heddle::v1::ModelConfig;
using heddle::v1::NsaConfig;
using model::LayerKind;
using model::LayerUsesLatent;
using model::ParameterStore;
using model::TensorSpec;

bool IsPlain(AttentionKind kind) {
  return kind == heddle::v1::ATTENTION_KIND_DENSE || kind == heddle::v1::ATTENTION_KIND_SWA;
}

const char* Word(AttentionKind kind) {
  static constexpr const char* kWords[] = {"dense", "swa", "nsa", "dsa", "gsa", "mla"};
  return kWords[static_cast<size_t>(kind)];
}

// Value of a gate whose weights are 0.
double GateAt(GsaConfig::GateActivation activation, double bias) {
  switch (activation) {
    case GsaConfig::GATE_ACTIVATION_TANH:
      return (std::tanh(bias) + 1) / 2;
    case GsaConfig::GATE_ACTIVATION_SILU:
      return bias / (1 + std::exp(-bias));
    default:
      return 1 / (1 + std::exp(-bias));
  }
}

class Converter {
 public:
  Converter(const ModelConfig& from, ParameterStore* source, const ModelConfig& to,
            const ConvertOptions& options)
      : from_(from), source_(source), to_(to), options_(options) {}

  StatusOr<Converted> Run() {
    CheckKinds();
    ASSIGN_OR_RETURN(model::ModelPlan plan, model::PlanModel(to_));
    ASSIGN_OR_RETURN(result_.store,
                     ParameterStore::Create(std::move(plan), model::Precision::kFp32));
    for (const TensorSpec& tensor : result_.store->plan().tensors) Fill(tensor);
    for (const TensorSpec& buffer : result_.store->plan().buffers) FillBuffer(buffer);
    for (const TensorSpec& tensor : source_->plan().tensors) NoteDropped(tensor);
    if (!problems_.empty()) {
      return InvalidArgument(Str("the overrides do more than change the attention:", problems_));
    }
    if (from_.rope().layout() != to_.rope().layout()) RETURN_IF_ERROR(PermuteRotated());
    for (int layer = 0; layer < to_.n_layers(); ++layer) RETURN_IF_ERROR(Neutralize(layer));
    return std::move(result_);
  }

 private:
  void Refuse(const std::string& text) { problems_ += "\n  " + text; }

  bool Changes(int layer) const { return LayerKind(from_, layer) != LayerKind(to_, layer); }

  void CheckKinds() {
    for (int layer = 0; layer < std::min(from_.n_layers(), to_.n_layers()); ++layer) {
      const AttentionKind before = LayerKind(from_, layer);
      const AttentionKind after = LayerKind(to_, layer);
      if (LayerUsesLatent(from_, layer) != LayerUsesLatent(to_, layer)) {
        Refuse(Str("layer ", layer, " cannot go from ", Word(before), " to ", Word(after),
                   ": an MLA latent shares its rotated part among all heads"));
      } else if (Changes(layer) && !IsPlain(before) && before != heddle::v1::ATTENTION_KIND_MLA &&
                 !options_.drop_sparse) {
        Refuse(Str("layer ", layer, " is ", Word(before), ": --dense drops what ", Word(after),
                   " does not have"));
      }
    }
  }

  // Layer of a tensor; -1 for embedding, head and experts. Blocks are the units between the first
  // two.
  static int LayerOf(const model::ModelPlan& plan, const TensorSpec& tensor) {
    const bool block = tensor.unit > 0 && tensor.unit + 1 < plan.dense_units;
    return block ? tensor.unit - 1 : -1;
  }

  void Fill(const TensorSpec& tensor) {
    const TensorSpec* same = source_->plan().Find(tensor.name);
    const std::span<float> to = result_.store->master(tensor);
    if (same != nullptr && same->shape == tensor.shape) {
      const std::span<float> values = source_->master(*same);
      std::copy(values.begin(), values.end(), to.begin());
      return;
    }
    const int layer = LayerOf(result_.store->plan(), tensor);
    const bool attention = tensor.name.find(".self_attn.") != std::string::npos;
    if (same != nullptr || layer < 0 || layer >= from_.n_layers() || !attention ||
        !Changes(layer)) {
      Refuse(tensor.name + (same == nullptr ? " would be new" : " has another shape"));
      return;
    }
    result_.added.push_back(tensor.name);
    model::InitTensor(options_.seed, tensor, result_.store.get());
  }

  void FillBuffer(const TensorSpec& buffer) {
    const TensorSpec* same = source_->plan().FindBuffer(buffer.name);
    const std::span<float> to = result_.store->buffer(buffer);
    if (same == nullptr || same->shape != buffer.shape) {
      std::fill(to.begin(), to.end(), 0.0f);
      result_.added.push_back(buffer.name);
      return;
    }
    const std::span<float> values = source_->buffer(*same);
    std::copy(values.begin(), values.end(), to.begin());
  }

  void NoteDropped(const TensorSpec& tensor) {
    if (result_.store->plan().Find(tensor.name) != nullptr) return;
    const int layer = LayerOf(source_->plan(), tensor);
    const bool attention = tensor.name.find(".self_attn.") != std::string::npos;
    if (options_.drop_sparse && attention && layer >= 0 && layer < to_.n_layers() &&
        Changes(layer)) {
      result_.dropped.push_back(tensor.name);
    } else {
      Refuse(tensor.name + " would be lost");
    }
  }

  std::span<float> Values(int layer, const std::string& name) {
    const TensorSpec* spec =
        result_.store->plan().Find(Str("model.layers.", layer, ".self_attn.", name));
    HEDDLE_CHECK(spec != nullptr, name);
    return result_.store->master(*spec);
  }
  void Zero(int layer, const std::string& name) {
    const std::span<float> values = Values(layer, name);
    std::fill(values.begin(), values.end(), 0.0f);
  }
  void ScaleOutput(int layer, double factor) {
    if (factor == 1.0) return;
    for (float& value : Values(layer, "o_proj.weight")) {
      value = static_cast<float>(double{value} * factor);
    }
    result_.rescaled.push_back(Str("model.layers.", layer, ".self_attn.o_proj.weight"));
  }

  // The values of a new kind with which it computes what the old one did, in its dense limit.
  Status Neutralize(int layer) {
    if (!Changes(layer)) return OkStatus();
    if (LayerKind(to_, layer) == heddle::v1::ATTENTION_KIND_NSA) NeutralizeNsa(layer);
    if (LayerKind(to_, layer) == heddle::v1::ATTENTION_KIND_GSA) return NeutralizeGsa(layer);
    return OkStatus();
  }

  void NeutralizeNsa(int layer) {
    const NsaConfig& nsa = to_.attention().nsa();
    Zero(layer, "gate_proj.weight");
    Zero(layer, "compress.k_pe");
    if (nsa.kv() == NsaConfig::KV_SEPARATE) {
      for (const char* name : {"k_proj", "v_proj"}) {
        const std::span<float> values = Values(layer, Str(name, ".weight"));
        for (const char* branch : {"_slc.weight", "_win.weight"}) {
          std::copy(values.begin(), values.end(), Values(layer, Str(name, branch)).begin());
        }
      }
    }
    if (nsa.compress_type() == NsaConfig::COMPRESS_TYPE_AVGPOOL) {
      ScaleOutput(layer, 2.0 / 3.0);
      return;
    }
    Zero(layer, "compress.v_weight");
    if (nsa.compress_init() != NsaConfig::COMPRESS_INIT_XAVIER) return;  // the mean already
    Mean(nsa, Values(layer, "compress.k_weight"));
  }

  // Every window's key as the mean of its keys.
  void Mean(const NsaConfig& nsa, std::span<float> weight) const {
    const float mean = static_cast<float>(1.0 / nsa.kernel_size());
    if (nsa.compress_type() == NsaConfig::COMPRESS_TYPE_WEIGHTEDPOOL) {
      std::fill(weight.begin(), weight.end(), mean);
      return;
    }
    const size_t width = static_cast<size_t>(model::HeadsOf(to_).dim);
    for (size_t i = 0; i < weight.size(); ++i) {
      weight[i] = i / width % width == i % width ? mean : 0.0f;
    }
  }

  Status NeutralizeGsa(int layer) {
    const GsaConfig& gsa = to_.attention().gsa();
    const double gate = GateAt(gsa.gate_activation(), gsa.gate_bias_init());
    double product = 1;
    const std::pair<bool, const char*> gates[] = {{gsa.use_value_gate(), "value_gate"},
                                                  {gsa.use_output_gate(), "output_gate"}};
    for (const auto& [used, name] : gates) {
      if (!used) continue;
      Zero(layer, Str(name, ".weight"));
      product *= gate;
    }
    if (!(std::abs(product) > 1e-6)) {
      return InvalidArgument(Str("model.attention.gsa.gate_bias_init: a gate of ", gate,
                                 " lets nothing through that could be made up for"));
    }
    ScaleOutput(layer, 1 / product);
    return OkStatus();
  }

  // Rows of one head's rotated part, `width` rows of `columns` values, into the other layout.
  void PermuteRows(float* rows, int64_t width, int64_t columns) const {
    std::vector<float> before(rows, rows + width * columns);
    const bool to_half = to_.rope().layout() == heddle::v1::RopeConfig::LAYOUT_HALF;
    for (int64_t i = 0; i < width / 2; ++i) {
      const std::pair<int64_t, int64_t> pairs[] = {{i, 2 * i}, {i + width / 2, 2 * i + 1}};
      for (const auto& [half, interleaved] : pairs) {
        const int64_t source = to_half ? interleaved : half;
        const int64_t target = to_half ? half : interleaved;
        std::copy_n(before.begin() + source * columns, columns, rows + target * columns);
      }
    }
  }

  // `first`: rows before the rotated part of each of `heads` heads of `rows` rows.
  void PermuteHeads(int layer, const std::string& name, int64_t heads, int64_t first,
                    int64_t width) {
    const TensorSpec* spec =
        result_.store->plan().Find(Str("model.layers.", layer, ".self_attn.", name));
    if (spec == nullptr) return;
    const int64_t columns = spec->shape.size() == 2 ? spec->shape[1] : 1;
    const int64_t head_rows = spec->shape[0] / heads;
    float* values = result_.store->master(*spec).data();
    for (int64_t head = 0; head < heads; ++head) {
      PermuteRows(values + (head * head_rows + first) * columns, width, columns);
    }
  }

  Status PermuteRotated() {
    const model::Heads heads = model::HeadsOf(to_);
    const heddle::v1::MlaConfig& mla = to_.attention().mla();
    for (int layer = 0; layer < to_.n_layers(); ++layer) {
      if (LayerKind(from_, layer) == heddle::v1::ATTENTION_KIND_NSA) {
        return InvalidArgument("model.rope.layout: NSA's compression mixes the rotated dimensions");
      }
      if (LayerUsesLatent(to_, layer)) {
        const int64_t nope = mla.qk_nope_head_dim();
        const int64_t rope = mla.qk_rope_head_dim();
        PermuteHeads(layer, "q_proj.weight", heads.query, nope, rope);
        PermuteHeads(layer, "q_b_proj.weight", heads.query, nope, rope);
        PermuteHeads(layer, "kv_a_proj_with_mqa.weight", 1, mla.kv_lora_rank(), rope);
        continue;
      }
      for (const char* part : {".weight", ".bias"}) {
        PermuteHeads(layer, Str("q_proj", part), heads.query, 0, heads.dim);
        PermuteHeads(layer, Str("k_proj", part), heads.kv, 0, heads.dim);
      }
    }
    return OkStatus();
  }

  const ModelConfig& from_;
  ParameterStore* source_;
  const ModelConfig& to_;
  const ConvertOptions options_;
  std::string problems_;
  Converted result_;
};

}  // namespace

StatusOr<Converted> ConvertModel(const ModelConfig& from, ParameterStore* source,
                                 const ModelConfig& to, const ConvertOptions& options) {
  return Converter(from, source, to, options).Run();
}

}  // namespace heddle::hf
