// What makes a model impossible. base/settings repeats the rules between keys with the place in the
// file; here they hold for every way in: model folders, checkpoints, tests.
#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <algorithm>

#include "heddle/v1/options.pb.h"
#include "model/model_plan_internal.h"

namespace heddle::model {
namespace {

using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;
using heddle::v1::ModelConfig;

// A number as text and as double; false for other types.
bool NumberOf(const Message& message, const FieldDescriptor& field, int i, double* value) {
  const Reflection& r = *message.GetReflection();
  const bool one = i < 0;
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      *value = one ? r.GetInt32(message, &field) : r.GetRepeatedInt32(message, &field, i);
      return true;
    case FieldDescriptor::CPPTYPE_INT64:
      *value = static_cast<double>(one ? r.GetInt64(message, &field)
                                       : r.GetRepeatedInt64(message, &field, i));
      return true;
    case FieldDescriptor::CPPTYPE_DOUBLE:
      *value = one ? r.GetDouble(message, &field) : r.GetRepeatedDouble(message, &field, i);
      return true;
    default:
      return false;
  }
}

void CheckRange(double value, const heddle::v1::KeyOptions& key, const std::string& path,
                std::vector<std::string>* problems) {
  const bool low =
      key.has_min() && (key.above_min() ? !(value > key.min()) : !(value >= key.min()));
  const bool high = key.has_max() && !(value <= key.max());
  if (low) {
    problems->push_back(
        Str(path, ": must be ", key.above_min() ? "> " : ">= ", key.min(), " (is ", value, ")"));
  } else if (high) {
    problems->push_back(Str(path, ": must be <= ", key.max(), " (is ", value, ")"));
  }
}

// Ranges of config.proto for every field that is set.
void CheckRanges(const Message& message, const std::string& prefix,
                 std::vector<std::string>* problems) {
  std::vector<const FieldDescriptor*> fields;
  const Reflection& reflection = *message.GetReflection();
  reflection.ListFields(message, &fields);
  for (const FieldDescriptor* field : fields) {
    const std::string path = Str(prefix, ".", field->name());
    const heddle::v1::KeyOptions& key = field->options().GetExtension(heddle::v1::key);
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE && !field->is_repeated()) {
      CheckRanges(reflection.GetMessage(message, field), path, problems);
      continue;
    }
    const int count = field->is_repeated() ? reflection.FieldSize(message, field) : 1;
    for (int i = 0; i < count; ++i) {
      double value = 0;
      if (!NumberOf(message, *field, field->is_repeated() ? i : -1, &value)) break;
      CheckRange(value, key, field->is_repeated() ? Str(path, "[", i, "]") : path, problems);
    }
  }
}

class RuleChecker {
 public:
  explicit RuleChecker(const ModelConfig& config)
      : config_(config), attention_(config.attention()) {}

  std::vector<std::string> Run() {
    CheckRanges(config_, "model", &problems_);
    // Each rule holds its peace about numbers that are out of range already.
    Heads();
    Rope();
    Nsa();
    Dsa();
    Gsa();
    Moe();
    NotComputed();
    return std::move(problems_);
  }

 private:
  void Refuse(bool wrong, const std::string& text) {
    if (wrong) problems_.push_back("model." + text);
  }
  bool Uses(heddle::v1::AttentionKind kind) const { return UsesKind(config_, kind); }

  // Whether a layer has heads of head_dim, and whether one projects to a latent.
  bool AnyLatent(bool latent) const {
    const int layers = std::min(config_.n_layers(), std::max(1, attention_.pattern_size()));
    for (int layer = 0; layer < layers; ++layer) {
      if (LayerUsesLatent(config_, layer) == latent) return true;
    }
    return false;
  }

  void Heads() {
    const bool counted =
        config_.n_heads() >= 1 && config_.n_kv_heads() >= 0 && config_.head_dim() >= 0;
    if (counted && AnyLatent(false)) {
      const model::Heads heads = HeadsOf(config_);
      Refuse(heads.query % heads.kv != 0,
             Str("n_kv_heads: must divide n_heads (", heads.query, " by ", heads.kv, ")"));
      Refuse(config_.head_dim() == 0 && config_.d_model() % config_.n_heads() != 0,
             "head_dim: give it, n_heads does not divide d_model");
      Refuse(heads.dim % 2 != 0 || heads.dim < 2,
             Str("head_dim: rotary width must be even (is ", heads.dim, ")"));
    }
    const heddle::v1::MlaConfig& mla = attention_.mla();
    Refuse((AnyLatent(true) || attention_.has_mla()) && mla.qk_rope_head_dim() % 2 != 0,
           Str("attention.mla.qk_rope_head_dim: rotary width must be even (is ",
               mla.qk_rope_head_dim(), ")"));
  }

  void Rope() {
    const heddle::v1::RopeScalingConfig& scaling = config_.rope().scaling();
    Refuse(scaling.low_freq_factor() >= scaling.high_freq_factor(),
           "rope.scaling.low_freq_factor: must be below high_freq_factor");
  }

  void Nsa() {
    const heddle::v1::NsaConfig& nsa = attention_.nsa();
    if (nsa.kernel_stride() < 1) return;
    const int64_t forced = int64_t{nsa.init_blocks()} + nsa.local_blocks();
    Refuse(nsa.topk() < forced,
           Str("attention.nsa.topk: must be at least init_blocks + local_blocks (", nsa.topk(),
               " < ", forced, ")"));
    Refuse(nsa.kernel_size() % nsa.kernel_stride() != 0,
           "attention.nsa.kernel_stride: must divide kernel_size");
    Refuse(nsa.block_size() % nsa.kernel_stride() != 0,
           "attention.nsa.kernel_stride: must divide block_size");
    Refuse(nsa.kernel_size() > nsa.block_size(),
           "attention.nsa.kernel_size: must be at most block_size");
  }

  void Dsa() {
    const heddle::v1::DsaConfig& dsa = attention_.dsa();
    const bool latent = DsaOnLatent(config_);
    Refuse(latent && !attention_.has_mla(),
           "attention.dsa.core: mla needs the sizes of attention.mla");
    if (Uses(heddle::v1::ATTENTION_KIND_DSA) &&
        dsa.profile() == heddle::v1::DsaConfig::PROFILE_V32) {
      const int rotated = attention_.mla().qk_rope_head_dim();
      Refuse(!latent && dsa.d_indexer() % 4 != 0,
             Str("attention.dsa.d_indexer: profile v32 rotates half of it, and the rotary width "
                 "must be even (is ",
                 dsa.d_indexer(), ")"));
      Refuse(latent && rotated > dsa.d_indexer(),
             Str("attention.dsa.d_indexer: must be at least the rotated qk_rope_head_dim (",
                 dsa.d_indexer(), " < ", rotated, ")"));
    }
  }

  void Gsa() {
    const heddle::v1::GsaConfig& gsa = attention_.gsa();
    if (!gsa.use_adaptive_k()) return;  // k_base alone counts
    Refuse(gsa.k_min() > gsa.k_base(), Str("attention.gsa.k_min: must be at most k_base (",
                                           gsa.k_min(), " > ", gsa.k_base(), ")"));
    Refuse(gsa.k_base() > gsa.k_max(), Str("attention.gsa.k_base: must be at most k_max (",
                                           gsa.k_base(), " > ", gsa.k_max(), ")"));
  }

  void Moe() {
    const heddle::v1::MoeConfig& moe = config_.moe();
    const int64_t experts = moe.n_experts();
    if (experts < 1 || moe.n_groups() < 1) return;
    Refuse(moe.top_k() > experts,
           Str("moe.top_k: must be at most n_experts (", moe.top_k(), " > ", experts, ")"));
    Refuse(moe.topk_groups() > moe.n_groups(), "moe.topk_groups: must be at most n_groups");
    Refuse(experts % moe.n_groups() != 0, "moe.n_groups: must divide n_experts");
    if (experts % moe.n_groups() == 0 && moe.topk_groups() <= moe.n_groups()) {
      const int64_t reachable = experts / moe.n_groups() * moe.topk_groups();
      Refuse(moe.top_k() > reachable && moe.top_k() <= experts,
             Str("moe.top_k: topk_groups hold ", reachable, " experts, fewer than top_k (",
                 moe.top_k(), ")"));
    }
    for (int i = 0; i < moe.layers_size(); ++i) {
      Refuse(moe.layers(i) >= config_.n_layers(),
             Str("moe.layers[", i, "]: must be below n_layers (is ", moe.layers(i), ")"));
    }
    Refuse(static_cast<double>(config_.n_layers()) * static_cast<double>(3 * experts + 16) >
               static_cast<double>(kTensorsMax),
           Str("moe.n_experts: ", experts, " experts in each of ", config_.n_layers(),
               " layers are more than ", kTensorsMax, " tensors"));
  }

  void NotComputed() {
    Refuse(config_.dropout() != 0.0, "dropout: no layer of this version has dropout");
    Refuse(attention_.has_logit_scale(),
           "attention.logit_scale: no layer of this version has a query temperature");
    const int layers = std::min(config_.n_layers(), std::max(1, attention_.pattern_size()));
    for (int layer = 0; attention_.qkv_bias() && layer < layers; ++layer) {
      const heddle::v1::AttentionKind kind = LayerKind(config_, layer);
      if (kind == heddle::v1::ATTENTION_KIND_DENSE || kind == heddle::v1::ATTENTION_KIND_SWA) {
        continue;
      }
      Refuse(true, "attention.qkv_bias: only dense and swa layers add biases");
      break;
    }
  }

  const ModelConfig& config_;
  const heddle::v1::AttentionConfig& attention_;
  std::vector<std::string> problems_;
};

}  // namespace

std::vector<std::string> ModelProblems(const ModelConfig& config) {
  return RuleChecker(config).Run();
}

}  // namespace heddle::model
