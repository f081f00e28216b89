#include "base/settings/checks.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <google/protobuf/unknown_field_set.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "base/settings/bind.h"
#include "base/settings/json.h"
#include "base/settings/schema.h"

namespace heddle::settings {
namespace {

using google::protobuf::FieldDescriptor;
using PbMessage = google::protobuf::Message;

constexpr size_t kTextBytesMax = 4096;
constexpr size_t kNameBytesMax = 128;
constexpr int64_t kHangKillMsMin = 5'000;
// As model/model_plan: a model must not have more names than this.
constexpr double kTensorsMax = 262'144;

bool IsNameChar(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
         c == '_' || c == '.';
}

// Bounds are whole numbers more often than not: 1000000000000, not 1e+12.
std::string Bound(double value) {
  return std::abs(value) < 1e15 && value == std::floor(value) ? Str(static_cast<int64_t>(value))
                                                              : JsonNumber(value);
}

std::string RangeText(const v1::KeyOptions& options) {
  if (options.has_min() && options.above_min()) {
    return Str("must be > ", Bound(options.min()),
               options.has_max() ? " and <= " + Bound(options.max()) : "");
  }
  return Str("must be between ", Bound(options.min()), " and ", Bound(options.max()));
}

void CheckNumber(double value, const std::string& text, const std::string& key,
                 const v1::KeyOptions& options, Problems& problems) {
  const bool low = options.has_min() &&
                   (options.above_min() ? !(value > options.min()) : !(value >= options.min()));
  const bool high = options.has_max() && !(value <= options.max());
  if (low || high) {
    problems.Add("", key, Str(RangeText(options), " (is ", text, ")"));
  }
}

void CheckText(const std::string& text, const std::string& key, const v1::KeyOptions& options,
               Problems& problems) {
  if (text.find('\0') != std::string::npos || text.size() > kTextBytesMax) {
    problems.Add("", key, Str("has a NUL byte or more than ", kTextBytesMax, " bytes"));
  } else if (options.name_text() &&
             (text.empty() || text.size() > kNameBytesMax || text[0] == '.' || text[0] == '-' ||
              !std::all_of(text.begin(), text.end(), IsNameChar))) {
    problems.Add("", key,
                 Str("needs 1 to ", kNameBytesMax,
                     " letters, digits, '-', '_', '.', not starting with '-' or '.' (is '",
                     text.substr(0, 60), "')"));
  }
}

double NumberOf(const PbMessage& message, const FieldDescriptor& field, int i) {
  const google::protobuf::Reflection& r = *message.GetReflection();
  const bool one = i < 0;
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      return one ? r.GetInt32(message, &field) : r.GetRepeatedInt32(message, &field, i);
    case FieldDescriptor::CPPTYPE_INT64:
      return static_cast<double>(one ? r.GetInt64(message, &field)
                                     : r.GetRepeatedInt64(message, &field, i));
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return one ? r.GetDouble(message, &field) : r.GetRepeatedDouble(message, &field, i);
    default:
      return 0;
  }
}

bool UsesKind(const v1::AttentionConfig& attention, v1::AttentionKind kind) {
  const auto& pattern = attention.pattern();
  return pattern.empty() ? attention.kind() == kind
                         : std::find(pattern.begin(), pattern.end(), kind) != pattern.end();
}

// Whether any layer is a mixture of experts (model/model_plan.h, LayerHasExperts). `every` < 1 is
// reported as a range.
bool AnyExperts(const v1::ModelConfig& model) {
  const v1::MoeConfig& moe = model.moe();
  if (moe.layers_size() > 0 || moe.every() < 1) return true;
  for (int layer = moe.first_dense(); layer < model.n_layers(); ++layer) {
    if (layer % moe.every() == moe.every() - 1) return true;
  }
  return false;
}

void CheckMessage(const PbMessage& message, const std::string& prefix, Problems& problems);

void CheckValue(const PbMessage& message, const FieldDescriptor& field, int i,
                const std::string& key, Problems& problems) {
  const v1::KeyOptions& options = OptionsOf(field);
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_MESSAGE:
      CheckMessage(i < 0 ? message.GetReflection()->GetMessage(message, &field)
                         : message.GetReflection()->GetRepeatedMessage(message, &field, i),
                   key, problems);
      return;
    case FieldDescriptor::CPPTYPE_STRING:
      CheckText(ScalarText(message, field, i), key, options, problems);
      return;
    case FieldDescriptor::CPPTYPE_INT32:
    case FieldDescriptor::CPPTYPE_INT64:
    case FieldDescriptor::CPPTYPE_DOUBLE:
      CheckNumber(NumberOf(message, field, i), ScalarText(message, field, i), key, options,
                  problems);
      return;
    default:
      return;
  }
}

void CheckMessage(const PbMessage& message, const std::string& prefix, Problems& problems) {
  const google::protobuf::Reflection& reflection = *message.GetReflection();
  if (!reflection.GetUnknownFields(message).empty()) {
    problems.Add("", prefix, "has fields that this version does not know; update it");
  }
  std::vector<const FieldDescriptor*> fields;
  reflection.ListFields(message, &fields);
  for (const FieldDescriptor* field : fields) {
    const std::string key = prefix.empty() ? field->name() : prefix + "." + field->name();
    if (!field->is_repeated()) {
      CheckValue(message, *field, -1, key, problems);
      continue;
    }
    for (int i = 0; i < reflection.FieldSize(message, field); ++i) {
      CheckValue(message, *field, i, Str(key, "[", i, "]"), problems);
    }
  }
}

// ---- rules between fields
// ---------------------------------------------------------------------------

class FieldChecker {
 public:
  FieldChecker(const v1::RunConfig& config, Problems& problems)
      : config_(config), problems_(problems) {}

  void Run() {
    if (config_.kind() == v1::RunConfig::KIND_COMMAND) {
      Command();
    } else {
      Train();
    }
    const v1::Ranks& ranks = config_.parallel().ranks();
    Refuse(ranks.min() > ranks.max(), "parallel.ranks.min",
           Str("must be at most parallel.ranks.max (", ranks.min(), " > ", ranks.max(), ")"));
    const v1::ParallelConfig& parallel = config_.parallel();
    Refuse(parallel.backend() == v1::ParallelConfig::BACKEND_NCCL && parallel.gpus_per_rank() == 0,
           "parallel.backend", "nccl needs parallel.gpus_per_rank of at least 1");
    Schedule();
  }

 private:
  void Refuse(bool wrong, const std::string& key, const std::string& text) {
    if (wrong) {
      problems_.Add("", key, text);
    }
  }

  void Command() {
    const v1::CommandConfig& command = config_.command();
    Refuse(command.argv_size() == 0 || command.argv(0).empty(), "command.argv",
           "a job of kind command needs a program");
    for (const auto& [name, value] : command.env()) {
      const bool good = !name.empty() && !(name[0] >= '0' && name[0] <= '9') &&
                        std::all_of(name.begin(), name.end(),
                                    [](char c) { return IsNameChar(c) && c != '-' && c != '.'; });
      Refuse(!good, "command.env." + name.substr(0, 60), "is no name of an environment variable");
      Refuse(name.rfind("HEDDLE_", 0) == 0, "command.env." + name.substr(0, 60),
             "names that begin with HEDDLE_ are set by heddle itself");
      Refuse(name == "CUDA_VISIBLE_DEVICES" || name == "CUDA_DEVICE_ORDER",
             "command.env." + name.substr(0, 60),
             "is set by heddle from the GPUs of parallel.gpus_per_rank");
    }
  }

  void Train() {
    Refuse(config_.has_command(), "command", "has no effect in a job of kind train");
    const v1::DataConfig& data = config_.data();
    const bool path = data.has_path() && !data.path().empty();
    Refuse(!path && data.mixture_size() == 0, "data.path",
           "a training job needs data.path or data.mixture (`heddle data prepare` makes one)");
    Refuse(path && data.mixture_size() > 0, "data.mixture", "give data.path or data.mixture");
    for (int i = 0; i < data.mixture_size(); ++i) {
      Refuse(data.mixture(i).path().empty(), Str("data.mixture[", i, "].path"), "is needed");
    }
    Training();
    Sharding();
    Heads();
    Nsa();
    Indexers();
    Moe();
  }

  void Training() {
    const v1::TrainingConfig& training = config_.training();
    Refuse(training.min_learning_rate() > training.learning_rate(), "training.min_learning_rate",
           Str("must be at most training.learning_rate (", JsonNumber(training.min_learning_rate()),
               " > ", JsonNumber(training.learning_rate()), ")"));
    Refuse(training.eval_interval() > 0 && config_.data().eval_path().empty(),
           "training.eval_interval", "needs data.eval_path");
    const int64_t batch = training.global_batch_size();
    const int64_t per_step =
        int64_t{training.micro_batch_size()} * config_.parallel().ranks().max();
    Refuse(batch != 0 && per_step > 0 && batch % per_step != 0, "training.global_batch_size",
           Str("must be a multiple of micro_batch_size x ranks = ", per_step, " (is ", batch, ")"));
    const int64_t product = per_step * training.gradient_accumulation_steps();
    Refuse(batch != 0 && training.gradient_accumulation_steps() != 1 && batch != product,
           "training.global_batch_size",
           Str("does not fit gradient_accumulation_steps: micro_batch_size x "
               "gradient_accumulation_steps x ranks = ",
               product, " (is ", batch, ")"));
    const int32_t expert = config_.parallel().expert();
    const int32_t ranks = config_.parallel().ranks().max();
    Refuse(expert > 0 && ranks % expert != 0, "parallel.expert",
           Str("must divide parallel.ranks (", expert, " and ", ranks, ")"));
    const int32_t experts = config_.model().moe().n_experts();
    const bool offloads = config_.memory().expert_offloading().enabled();
    const std::string& spill_dir = config_.memory().expert_offloading().spill_dir();
    Refuse(offloads && !spill_dir.empty() && spill_dir.front() != '/',
           "memory.expert_offloading.spill_dir",
           Str("must be a whole path, the same on every worker (is ", spill_dir, ")"));
    Refuse(offloads && experts == 0, "memory.expert_offloading.enabled",
           "the model has no experts: set model.moe.n_experts");
    Refuse(offloads && experts > 0 && !AnyExperts(config_.model()),
           "memory.expert_offloading.enabled",
           "no layer has experts: see model.moe.first_dense, every and layers");
    Refuse(offloads && experts > 0 && expert > 0 && ranks > expert,
           "memory.expert_offloading.enabled",
           Str("needs parallel.expert = parallel.ranks, so that one rank holds an expert (are ",
               expert, " and ", ranks, ")"));
    Refuse(expert > 1 && experts == 0, "parallel.expert",
           Str(expert, " ranks share experts, and the model has none: set model.moe.n_experts"));
    Refuse(expert > 1 && experts % expert != 0, "parallel.expert",
           Str("must divide model.moe.n_experts (", expert, " and ", experts, ")"));
  }

  void Sharding() {
    const v1::ParallelConfig& parallel = config_.parallel();
    const bool whole = parallel.shard() == v1::ParallelConfig::SHARD_NONE;
    Refuse(whole && config_.training().accumulation() == v1::TrainingConfig::ACCUMULATION_SYNC_EACH,
           "training.accumulation",
           "sync_each saves nothing where every rank holds whole gradients; use sync_last, or "
           "parallel.shard=optimizer or full");
    Refuse(whole && parallel.reduce_dtype() == v1::ParallelConfig::REDUCE_DTYPE_BF16,
           "parallel.reduce_dtype", "bf16 needs parallel.shard=optimizer or full");
  }

  bool Uses(v1::AttentionKind kind) const { return UsesKind(config_.model().attention(), kind); }

  // Whether layers of this kind read an MLA latent instead of heads of head_dim.
  bool Latent(v1::AttentionKind kind) const {
    const v1::DsaConfig& dsa = config_.model().attention().dsa();
    return kind == v1::ATTENTION_KIND_MLA ||
           (kind == v1::ATTENTION_KIND_DSA && dsa.core() == v1::DsaConfig::CORE_MLA);
  }

  // Whether a layer has heads of head_dim.
  bool AnyHeads() const {
    const v1::AttentionConfig& attention = config_.model().attention();
    const auto& pattern = attention.pattern();
    return pattern.empty() ? !Latent(attention.kind())
                           : std::any_of(pattern.begin(), pattern.end(), [this](int kind) {
                               return !Latent(static_cast<v1::AttentionKind>(kind));
                             });
  }

  void Heads() {
    const v1::ModelConfig& model = config_.model();
    const int32_t kv = model.n_kv_heads() > 0 ? model.n_kv_heads() : model.n_heads();
    if (model.n_heads() < 1 || kv < 1) {
      return;  // reported as a range
    }
    if (AnyHeads()) {
      Refuse(model.n_heads() % kv != 0, "model.n_kv_heads",
             Str("must divide model.n_heads (", model.n_heads(), " / ", kv, ")"));
      Refuse(model.head_dim() == 0 && model.d_model() % model.n_heads() != 0, "model.head_dim",
             Str("give it: model.n_heads (", model.n_heads(), ") does not divide model.d_model (",
                 model.d_model(), ")"));
      const int32_t width =
          model.head_dim() > 0 ? model.head_dim() : model.d_model() / model.n_heads();
      Refuse(width % 2 != 0, "model.head_dim",
             Str("the rotary width must be even (is ", width, ")"));
    }
    const int32_t rotary = model.attention().mla().qk_rope_head_dim();
    Refuse(rotary % 2 != 0, "model.attention.mla.qk_rope_head_dim",
           Str("the rotary width must be even (is ", rotary, ")"));
    const v1::RopeScalingConfig& scaling = model.rope().scaling();
    Refuse(scaling.low_freq_factor() >= scaling.high_freq_factor(),
           "model.rope.scaling.low_freq_factor", "must be below high_freq_factor");
    Refuse(scaling.type() == v1::RopeScalingConfig::TYPE_NONE && scaling.factor() != 1,
           "model.rope.scaling.factor", "has no effect without model.rope.scaling.type");
  }

  void Nsa() {
    const v1::NsaConfig& nsa = config_.model().attention().nsa();
    const std::string at = "model.attention.nsa.";
    if (nsa.kernel_stride() < 1) {
      return;
    }
    const int64_t forced = int64_t{nsa.init_blocks()} + nsa.local_blocks();
    Refuse(nsa.topk() < forced, at + "topk",
           Str("must be at least init_blocks + local_blocks (", nsa.topk(), " < ", forced, ")"));
    Refuse(nsa.kernel_size() % nsa.kernel_stride() != 0, at + "kernel_stride",
           "must divide kernel_size");
    Refuse(nsa.block_size() % nsa.kernel_stride() != 0, at + "kernel_stride",
           "must divide block_size");
    Refuse(nsa.kernel_size() > nsa.block_size(), at + "kernel_size", "must be at most block_size");
  }

  void Indexers() {
    const v1::AttentionConfig& attention = config_.model().attention();
    const v1::GsaConfig& gsa = attention.gsa();
    if (gsa.use_adaptive_k()) {
      Refuse(gsa.k_min() > gsa.k_base(), "model.attention.gsa.k_min",
             Str("must be at most k_base (", gsa.k_min(), " > ", gsa.k_base(), ")"));
      Refuse(gsa.k_base() > gsa.k_max(), "model.attention.gsa.k_base",
             Str("must be at most k_max (", gsa.k_base(), " > ", gsa.k_max(), ")"));
    }
    Dsa();
    Refuse(attention.has_logit_scale() &&
               attention.logit_scale().min() > attention.logit_scale().max(),
           "model.attention.logit_scale.min", "must be at most max");
    Refuse(attention.qkv_bias() && (Uses(v1::ATTENTION_KIND_NSA) || Uses(v1::ATTENTION_KIND_DSA) ||
                                    Uses(v1::ATTENTION_KIND_GSA) || Uses(v1::ATTENTION_KIND_MLA)),
           "model.attention.qkv_bias", "only dense and swa layers add biases");
  }

  void Dsa() {
    const v1::AttentionConfig& attention = config_.model().attention();
    const v1::DsaConfig& dsa = attention.dsa();
    const bool latent = dsa.core() == v1::DsaConfig::CORE_MLA;
    Refuse(latent && !attention.has_mla(), "model.attention.dsa.core",
           "mla needs the sizes of model.attention.mla");
    if (!Uses(v1::ATTENTION_KIND_DSA) || dsa.profile() != v1::DsaConfig::PROFILE_V32) {
      return;
    }
    Refuse(!latent && dsa.d_indexer() % 4 != 0, "model.attention.dsa.d_indexer",
           Str("profile v32 rotates half of it, and the rotary width must be even (is ",
               dsa.d_indexer(), ")"));
    const int32_t rotated = attention.mla().qk_rope_head_dim();
    Refuse(latent && rotated > dsa.d_indexer(), "model.attention.dsa.d_indexer",
           Str("must be at least the rotated qk_rope_head_dim (", dsa.d_indexer(), " < ", rotated,
               ")"));
  }

  void Moe() {
    const v1::MoeConfig& moe = config_.model().moe();
    const int64_t experts = moe.n_experts();
    if (experts < 1 || moe.n_groups() < 1) {
      return;
    }
    Refuse(moe.top_k() > experts, "model.moe.top_k",
           Str("must be at most n_experts (", moe.top_k(), " > ", experts, ")"));
    Refuse(moe.topk_groups() > moe.n_groups(), "model.moe.topk_groups", "must be at most n_groups");
    Refuse(experts % moe.n_groups() != 0, "model.moe.n_groups", "must divide n_experts");
    const int64_t reachable = experts / moe.n_groups() * moe.topk_groups();
    Refuse(experts % moe.n_groups() == 0 && moe.top_k() <= experts && moe.top_k() > reachable,
           "model.moe.top_k",
           Str("topk_groups hold ", reachable, " experts, fewer than top_k (", moe.top_k(), ")"));
    for (int i = 0; i < moe.layers_size(); ++i) {
      Refuse(moe.layers(i) >= config_.model().n_layers(), Str("model.moe.layers[", i, "]"),
             "must be below model.n_layers");
      const auto before = moe.layers().begin() + i;
      Refuse(std::find(moe.layers().begin(), before, moe.layers(i)) != before,
             Str("model.moe.layers[", i, "]"), Str(moe.layers(i), " is named twice"));
    }
    Refuse(static_cast<double>(config_.model().n_layers()) * static_cast<double>(3 * experts + 16) >
               kTensorsMax,
           "model.moe.n_experts",
           Str(experts, " experts in each of ", config_.model().n_layers(),
               " layers are more than ", static_cast<int64_t>(kTensorsMax), " tensors"));
  }

  void Schedule() {
    const v1::ScheduleConfig& schedule = config_.schedule();
    // Heartbeats come every 2 s, and a hang is told after 5 s at the earliest.
    Refuse(schedule.hang_kill_after() > 0 && schedule.hang_kill_after() < kHangKillMsMin,
           "schedule.hang_kill_after",
           Str("must be 0 (never) or at least 5s: a rank may well do nothing for less (is ",
               schedule.hang_kill_after(), " ms)"));
    for (int i = 0; i < schedule.after_size(); ++i) {
      const std::string& after = schedule.after(i);
      const size_t colon = after.find(':');
      const std::string kind = colon == std::string::npos ? "ok" : after.substr(0, colon);
      const std::string job = colon == std::string::npos ? after : after.substr(colon + 1);
      Refuse((kind != "ok" && kind != "any" && kind != "failed") || job.empty(),
             Str("schedule.after[", i, "]"), Str("needs [ok:|any:|failed:]JOB (is '", after, "')"));
    }
    const std::string& from = config_.checkpoint().resume_from();
    Refuse(!from.empty() && from.find('@') == std::string::npos, "checkpoint.resume_from",
           Str("needs JOB@STEP or JOB@latest (is '", from.substr(0, 60), "')"));
  }

  const v1::RunConfig& config_;
  Problems& problems_;
};

}  // namespace

void CheckRanges(const PbMessage& message, Problems& problems) {
  CheckMessage(message, "", problems);
}

void CheckFields(const v1::RunConfig& config, Problems& problems) {
  FieldChecker(config, problems).Run();
}

namespace {

// Keys of experts and of GSA that another key of theirs switches off.
std::string WhyIdleInLayers(const v1::ModelConfig& model, const std::string& canonical) {
  const auto inside = [&](const char* group) { return canonical.rfind(group, 0) == 0; };
  const v1::MoeConfig& moe = model.moe();
  if (inside("model.moe.") && moe.n_experts() == 0) {
    return "without model.moe.n_experts";
  }
  if ((canonical == "model.moe.every" || canonical == "model.moe.first_dense") &&
      moe.layers_size() > 0) {
    return "with model.moe.layers, which names the layers";
  }
  if (canonical == "model.moe.bias_center" && moe.bias_update_rate() == 0) {
    return "without model.moe.bias_update_rate";
  }
  if (canonical == "model.moe.aux_form" && moe.aux_loss() == 0) {
    return "without model.moe.aux_loss";
  }
  if (canonical == "model.moe.topk_groups" && moe.n_groups() <= 1) {
    return "without model.moe.n_groups";
  }
  if (canonical == "model.moe.norm_topk" && moe.router() == v1::MoeConfig::ROUTER_SIGMOID) {
    return "with model.moe.router=sigmoid, whose weights always sum to 1";
  }
  const v1::GsaConfig& gsa = model.attention().gsa();
  const bool adaptive = inside("model.attention.gsa.k_m") || inside("model.attention.gsa.adaptive");
  if (adaptive && !gsa.use_adaptive_k()) {
    return "without model.attention.gsa.use_adaptive_k";
  }
  if (inside("model.attention.gsa.gate_") && !gsa.use_value_gate() && !gsa.use_output_gate()) {
    return "without a gate";
  }
  return "";
}

// Keys of the whole model that another one of it switches off.
std::string WhyIdleInModel(const v1::ModelConfig& model, const std::string& canonical) {
  if (canonical == "model.attention.kind" && model.attention().pattern_size() > 0) {
    return "with model.attention.pattern, which names the kind of every layer";
  }
  if (canonical == "model.norm_eps" && model.norm() == v1::ModelConfig::NORM_DYT &&
      !model.attention().has_mla()) {
    return "with model.norm=dyt, which divides by nothing";
  }
  const bool latent =
      model.attention().pattern_size() == 0 && UsesKind(model.attention(), v1::ATTENTION_KIND_MLA);
  if (latent && (canonical == "model.n_kv_heads" || canonical == "model.head_dim")) {
    return "in layers of kind mla, whose widths are those of model.attention.mla";
  }
  const v1::RopeScalingConfig& scaling = model.rope().scaling();
  if (canonical == "model.rope.scaling.type" && scaling.factor() == 1) {
    return "with model.rope.scaling.factor=1";
  }
  if (canonical == "model.rope.scaling.type" &&
      scaling.type() == v1::RopeScalingConfig::TYPE_YARN &&
      model.max_position_embeddings() <= scaling.original_max_position_embeddings()) {
    return "unless model.max_position_embeddings is above original_max_position_embeddings";
  }
  const auto inside = [&](const char* group) { return canonical.rfind(group, 0) == 0; };
  const bool llama3 = inside("model.rope.scaling.low_") || inside("model.rope.scaling.high_");
  const bool yarn = inside("model.rope.scaling.beta_") || inside("model.rope.scaling.mscale");
  if ((llama3 && scaling.type() != v1::RopeScalingConfig::TYPE_LLAMA3) ||
      (yarn && scaling.type() != v1::RopeScalingConfig::TYPE_YARN)) {
    return llama3 ? "without model.rope.scaling.type=llama3"
                  : "without model.rope.scaling.type=yarn";
  }
  return "";
}

}  // namespace

std::string WhyIdle(const v1::RunConfig& config, const std::string& canonical) {
  const auto inside = [&](const char* group) { return canonical.rfind(group, 0) == 0; };
  if (config.kind() == v1::RunConfig::KIND_COMMAND &&
      (inside("model.") || inside("training.") || inside("data.") || inside("memory.") ||
       inside("checkpoint.") || canonical == "parallel.expert" || canonical == "parallel.shard" ||
       canonical == "parallel.reduce_dtype")) {
    return "in a job of kind command";
  }
  if (canonical == "schedule.preemptible" || canonical == "schedule.min_runtime") {
    return "because this version preempts only by `heddle preempt`";
  }
  if (canonical == "training.eps" &&
      config.training().optimizer() == v1::TrainingConfig::OPTIMIZER_LION) {
    return "with lion, which divides by nothing";
  }
  if (canonical == "parallel.shard" && config.parallel().ranks().max() == 1) {
    return "with one rank, which holds everything";
  }
  const v1::MemoryConfig& memory = config.memory();
  if (inside("memory.expert_offloading.") && !memory.expert_offloading().enabled()) {
    return "without memory.expert_offloading.enabled";
  }
  if (canonical == "memory.expert_offloading.pin_memory" &&
      config.parallel().gpus_per_rank() == 0) {
    return "without parallel.gpus_per_rank, whose copies it is for";
  }
  if (canonical == "memory.expert_offloading.spill_dir" &&
      memory.expert_offloading().resident_mb() == 0) {
    return "without memory.expert_offloading.resident_mb, which says how much stays in memory";
  }
  if (canonical == "memory.kv_cache.threshold" &&
      memory.kv_cache().quantization() == v1::KvCacheConfig::QUANTIZATION_NONE) {
    return "without memory.kv_cache.quantization";
  }
  if (inside("logging.profiling.") && !config.logging().profiling().enabled()) {
    return "without logging.profiling.enabled";
  }
  if (inside("model.moe.") || inside("model.attention.gsa.")) {
    return WhyIdleInLayers(config.model(), canonical);
  }
  return WhyIdleInModel(config.model(), canonical);
}

namespace {

// Choices that are legal and seldom meant.
void WarnOfIndexers(const v1::AttentionConfig& attention, int64_t max_steps,
                    std::vector<std::string>& out) {
  const auto never_sparse = [&](v1::AttentionKind kind, const char* name, int64_t steps) {
    if (UsesKind(attention, kind) && steps >= max_steps) {
      out.push_back(Str("model.attention.", name, ".warmup_steps (", steps,
                        ") is not below training.max_steps (", max_steps,
                        "): the run never leaves the dense stage"));
    }
  };
  const v1::GsaConfig& gsa = attention.gsa();
  never_sparse(v1::ATTENTION_KIND_DSA, "dsa", attention.dsa().warmup_steps());
  never_sparse(v1::ATTENTION_KIND_GSA, "gsa", gsa.warmup_steps());
  if (!UsesKind(attention, v1::ATTENTION_KIND_GSA) || !gsa.use_adaptive_k()) {
    return;
  }
  if (gsa.adaptive_k() == v1::GsaConfig::ADAPTIVE_K_VARIANCE) {
    out.push_back(
        "model.attention.gsa.adaptive_k: variance looks at future and foreign tokens; it replays "
        "weights that were trained with it (variance_causal does not)");
  }
  if (gsa.adaptive_k() == v1::GsaConfig::ADAPTIVE_K_LEARNED) {
    out.push_back(
        "model.attention.gsa.adaptive_k: learned replays weights that have its network; no loss "
        "trains it here");
  }
}

// Groups of kinds that no layer has.
void AddUnusedGroups(const v1::AttentionConfig& attention, std::vector<std::string>& out) {
  const auto uses = [&](v1::AttentionKind kind) { return UsesKind(attention, kind); };
  const auto check = [&](bool present, v1::AttentionKind kind, const char* name) {
    if (present && !uses(kind)) {
      out.push_back(Str("model.attention.", name, " has no effect: no layer is of kind ", name));
    }
  };
  check(attention.has_swa(), v1::ATTENTION_KIND_SWA, "swa");
  check(attention.has_nsa(), v1::ATTENTION_KIND_NSA, "nsa");
  check(attention.has_dsa(), v1::ATTENTION_KIND_DSA, "dsa");
  check(attention.has_gsa(), v1::ATTENTION_KIND_GSA, "gsa");
  const bool latent =
      uses(v1::ATTENTION_KIND_DSA) && attention.dsa().core() == v1::DsaConfig::CORE_MLA;
  check(attention.has_mla() && !latent, v1::ATTENTION_KIND_MLA, "mla");
}

}  // namespace

std::vector<std::string> Warnings(const v1::RunConfig& config) {
  std::vector<std::string> out;
  if (config.kind() == v1::RunConfig::KIND_COMMAND) {
    return out;
  }
  const v1::TrainingConfig& training = config.training();
  const v1::ModelConfig& model = config.model();
  if (training.max_seq_len() > model.max_position_embeddings()) {
    out.push_back(Str("training.max_seq_len (", training.max_seq_len(),
                      ") is above model.max_position_embeddings (", model.max_position_embeddings(),
                      ")"));
  }
  if (training.warmup_steps() > training.max_steps()) {
    out.push_back(Str("training.warmup_steps (", training.warmup_steps(),
                      ") is above training.max_steps (", training.max_steps(),
                      "): the learning rate never reaches its peak"));
  }
  if (!config.data().eval_path().empty() && training.eval_interval() == 0) {
    out.push_back("data.eval_path has no effect without training.eval_interval");
  }
  if (config.parallel().reduce_dtype() == v1::ParallelConfig::REDUCE_DTYPE_BF16 &&
      training.precision() == v1::TrainingConfig::PRECISION_FP32) {
    out.push_back(
        "parallel.reduce_dtype=bf16 rounds every gradient of a model that training.precision=fp32 "
        "computes exactly");
  }
  AddUnusedGroups(model.attention(), out);
  if (model.moe().n_experts() > 0 && !AnyExperts(model)) {
    out.push_back(Str("model.moe has no effect: no layer below model.n_layers (", model.n_layers(),
                      ") is every-th (", model.moe().every(), ") from first_dense (",
                      model.moe().first_dense(), ") on"));
  }
  const v1::ExpertOffloadingConfig& offloading = config.memory().expert_offloading();
  if (offloading.enabled() && offloading.resident_mb() > 0 && offloading.spill_dir().empty() &&
      config.parallel().gpus_per_rank() == 0) {
    out.push_back(
        "memory.expert_offloading.resident_mb without spill_dir and without a GPU only costs: what "
        "is beyond the bound lies in host memory too, and the bound beside it");
  }
  WarnOfIndexers(model.attention(), training.max_steps(), out);
  return out;
}

}  // namespace heddle::settings
