#include "tests/model/attention/mla_harness.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string_view>

#include "base/status/status.h"
#include "tests/model/golden.h"

namespace heddle::attention {

using layers::Pass;
using layers::PassContext;

heddle::v1::ModelConfig MlaConfigOf(const MlaSizes& sizes) {
  heddle::v1::ModelConfig config;
  config.set_vocab_size(11);
  config.set_d_model(sizes.d);
  config.set_n_layers(1);
  config.set_n_heads(sizes.heads);
  config.set_n_kv_heads(sizes.heads);
  config.set_d_ffn(8);
  config.set_norm_eps(1e-6);
  config.mutable_rope()->set_layout(heddle::v1::RopeConfig::LAYOUT_INTERLEAVED);
  config.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_MLA);
  heddle::v1::MlaConfig* mla = config.mutable_attention()->mutable_mla();
  mla->set_q_lora_rank(sizes.query_latent);
  mla->set_kv_lora_rank(sizes.latent);
  mla->set_qk_nope_head_dim(sizes.nope);
  mla->set_qk_rope_head_dim(sizes.rotary);
  mla->set_v_head_dim(sizes.value);
  if (sizes.layernorm) mla->set_latent_norm(heddle::v1::MlaConfig::LATENT_NORM_LAYERNORM);
  return config;
}

heddle::v1::ModelConfig DsaMlaConfigOf(const MlaSizes& sizes, int32_t topk) {
  heddle::v1::ModelConfig config = MlaConfigOf(sizes);
  config.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_DSA);
  heddle::v1::DsaConfig* dsa = config.mutable_attention()->mutable_dsa();
  dsa->set_core(heddle::v1::DsaConfig::CORE_MLA);
  dsa->set_profile(heddle::v1::DsaConfig::PROFILE_V32);
  dsa->set_n_indexer_heads(3);
  dsa->set_d_indexer(8);
  dsa->set_topk(topk);
  return config;
}

OwnedDocuments::OwnedDocuments(const std::vector<int32_t>& lengths) : cu{0} {
  for (const int32_t length : lengths) {
    cu.push_back(cu.back() + length);
    for (int32_t t = 0; t < length; ++t) positions.push_back(t);
    view.longest = std::max<int64_t>(view.longest, length);
  }
  view.cu_seqlens = cu;
  view.positions = positions;
}

namespace {

// The layer's tensors of product.md section 5.
model::ModelPlan PlanOf(const heddle::v1::ModelConfig& config) {
  model::ModelPlan plan;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape) {
    model::TensorSpec spec;
    spec.name = "model.layers.0.self_attn." + name;
    spec.elements = 1;
    for (const int64_t extent : shape) spec.elements *= extent;
    spec.shape = std::move(shape);
    spec.offset = plan.flat_elements;
    plan.parameters += spec.elements;
    plan.flat_elements += (spec.elements + 31) / 32 * 32;
    plan.tensors.push_back(std::move(spec));
  };
  const heddle::v1::MlaConfig& mla = config.attention().mla();
  const int64_t d = config.d_model();
  const int64_t heads = config.n_heads();
  const int64_t q_columns = heads * (mla.qk_nope_head_dim() + mla.qk_rope_head_dim());
  const int64_t rank = mla.q_lora_rank();
  if (rank > 0) {
    add("q_a_proj.weight", {rank, d});
    add("q_a_layernorm.weight", {rank});
    add("q_b_proj.weight", {q_columns, rank});
  } else {
    add("q_proj.weight", {q_columns, d});
  }
  add("kv_a_proj_with_mqa.weight", {mla.kv_lora_rank() + mla.qk_rope_head_dim(), d});
  add("kv_a_layernorm.weight", {mla.kv_lora_rank()});
  if (mla.latent_norm() == heddle::v1::MlaConfig::LATENT_NORM_LAYERNORM) {
    add("kv_a_layernorm.bias", {mla.kv_lora_rank()});
  }
  add("kv_b_proj.weight",
      {heads * (mla.qk_nope_head_dim() + mla.v_head_dim()), mla.kv_lora_rank()});
  add("o_proj.weight", {d, heads * mla.v_head_dim()});
  if (config.attention().kind() == heddle::v1::ATTENTION_KIND_DSA) {
    const heddle::v1::DsaConfig& dsa = config.attention().dsa();
    const int64_t width = dsa.d_indexer();
    add("indexer.q_proj.weight", {dsa.n_indexer_heads() * width, rank > 0 ? rank : d});
    add("indexer.k_proj.weight", {width, d});
    add("indexer.weights_proj.weight", {dsa.n_indexer_heads(), d});
    add("indexer.k_norm.weight", {width});
    add("indexer.k_norm.bias", {width});
  }
  return plan;
}

constexpr std::string_view kPrefix = "model.layers.0.";
std::string FullName(const std::string& name) { return std::string(kPrefix) + name; }

at::Tensor Slice(const at::Tensor& flat, const model::TensorSpec& spec) {
  return flat.narrow(0, spec.offset, spec.elements);
}

}  // namespace

MlaHarness::MlaHarness(const heddle::v1::ModelConfig& config, at::ScalarType type)
    : config_(config), plan_(PlanOf(config)), ropes_(config_, type == at::kDouble) {
  weights_ = at::zeros({plan_.flat_elements}, type);
  storage_.plan = &plan_;
  storage_.type = type;
  gradients_ = at::zeros({plan_.flat_elements}, storage_.statistics_type());
  storage_.weights = {weights_};
  storage_.gradients = {gradients_};
  layer_ = config_.attention().kind() == heddle::v1::ATTENTION_KIND_DSA
               ? MakeDsaMla(config_, storage_, &ropes_, &shared_)
               : MakeMla(config_, storage_, &ropes_);
  // Weights that differ everywhere, with gains around 1.
  double phase = 0.15;
  for (const model::TensorSpec& spec : plan_.tensors) {
    const bool norm = spec.name.find("norm.weight") != std::string::npos;
    std::vector<double> values = model_test::Gen(spec.elements, phase, norm ? 0.25 : 0.4);
    if (norm) {
      for (double& value : values) value += 1.0;
    }
    Slice(weights_, spec).copy_(Matrix(values, spec.elements, type)[0]);
    phase += 0.31;
  }
}

std::vector<std::string> MlaHarness::Names() const {
  std::vector<std::string> names;
  for (const model::TensorSpec& spec : plan_.tensors)
    names.push_back(spec.name.substr(kPrefix.size()));
  return names;
}
void MlaHarness::SetWeight(const std::string& name, const std::vector<double>& values) {
  const model::TensorSpec* spec = plan_.Find(FullName(name));
  HEDDLE_CHECK(spec != nullptr && spec->elements == static_cast<int64_t>(values.size()), name);
  Slice(weights_, *spec).copy_(Matrix(values, spec->elements, type())[0]);
}
std::vector<double> MlaHarness::Weight(const std::string& name) const {
  return Values(Slice(weights_, *plan_.Find(FullName(name))));
}
std::vector<double> MlaHarness::Gradient(const std::string& name) const {
  return Values(Slice(gradients_, *plan_.Find(FullName(name))));
}
void MlaHarness::ZeroGradients() { gradients_.zero_(); }

at::Tensor MlaHarness::Forward(const std::vector<int32_t>& lengths, const at::Tensor& h) {
  return Forward(lengths, h, Options());
}

at::Tensor MlaHarness::Forward(const std::vector<int32_t>& lengths, const at::Tensor& h,
                               const Options& options) {
  const OwnedDocuments documents(lengths);
  HEDDLE_CHECK(documents.view.rows() == h.size(0));
  ropes_.Ensure(std::max<int64_t>(documents.view.longest, 1));
  if (options.pass != Pass::kRecompute) layer_->Begin(documents.view);
  kept_.Release(0);
  scratch_.Release(0);
  PassContext context;
  context.pass = options.pass;
  context.documents = &documents.view;
  context.step = options.step;
  context.losses = options.losses;
  context.kept = &kept_;
  context.scratch = &scratch_;
  context.cache_rows = options.rows;
  const at::Tensor residual = at::zeros(h.sizes(), h.options());
  // NaN shows rows that nobody wrote.
  at::Tensor out;
  if (options.want_out) {
    out = at::full(h.sizes(), std::numeric_limits<double>::quiet_NaN(), h.options());
  }
  layer_->Forward(context, h, residual, out);
  return out;
}

at::Tensor MlaHarness::Backward(const std::vector<int32_t>& lengths, const at::Tensor& h,
                                const at::Tensor& gradient, const layers::StepInfo* step) {
  const OwnedDocuments documents(lengths);
  PassContext context;
  context.pass = Pass::kTrain;
  context.documents = &documents.view;
  context.step = step;
  context.kept = &kept_;
  context.scratch = &scratch_;
  const at::Tensor dh = at::full(h.sizes(), std::numeric_limits<double>::quiet_NaN(), h.options());
  layer_->Backward(context, h, gradient, dh);
  return dh;
}

at::Tensor Matrix(const std::vector<double>& values, int64_t columns, at::ScalarType type) {
  const at::Tensor out = at::empty(
      {static_cast<int64_t>(values.size()) / std::max<int64_t>(columns, 1), columns}, at::kDouble);
  std::copy(values.begin(), values.end(), out.data_ptr<double>());
  return out.to(type);
}

std::vector<double> Values(const at::Tensor& t) {
  const at::Tensor wide = t.to(at::kDouble).contiguous();
  const double* data = wide.const_data_ptr<double>();
  return {data, data + wide.numel()};
}

std::vector<double> Transposed(const std::vector<double>& values, int64_t rows) {
  const size_t r = static_cast<size_t>(rows);
  const size_t columns = values.size() / r;
  std::vector<double> out(values.size());
  for (size_t i = 0; i < r; ++i) {
    for (size_t j = 0; j < columns; ++j) out[j * r + i] = values[i * columns + j];
  }
  return out;
}

namespace {

using Row = std::vector<double>;

// x W^T with W [out, in] flat; rows [first, first + count) of W.
Row Times(const std::vector<double>& weight, const Row& x, size_t first, size_t count) {
  Row y(count, 0.0);
  for (size_t o = 0; o < count; ++o) {
    for (size_t i = 0; i < x.size(); ++i) y[o] += weight[(first + o) * x.size() + i] * x[i];
  }
  return y;
}

void Norm(const std::vector<double>& gain, const std::vector<double>* bias, double eps, Row* x) {
  const double width = static_cast<double>(x->size());
  double mean = 0, squares = 0;
  if (bias != nullptr) {
    for (const double v : *x) mean += v / width;
  }
  for (const double v : *x) squares += (v - mean) * (v - mean) / width;
  for (size_t i = 0; i < x->size(); ++i) {
    (*x)[i] = ((*x)[i] - mean) / std::sqrt(squares + eps) * gain[i];
    if (bias != nullptr) (*x)[i] += (*bias)[i];
  }
}

void Turn(const layers::RopeFrequencies& rope, double position, double* x) {
  const size_t half = rope.inverse.size();
  for (size_t i = 0; i < half; ++i) {
    double& a = rope.interleaved ? x[2 * i] : x[i];
    double& b = rope.interleaved ? x[2 * i + 1] : x[i + half];
    const double cosine = std::cos(position * rope.inverse[i]);
    const double sine = std::sin(position * rope.inverse[i]);
    const double old = a;
    a = old * cosine - b * sine;
    b = b * cosine + old * sine;
  }
}

struct Token {
  std::vector<Row> q, k, v;  // per head
};

Token ProjectToken(const MlaHarness& harness, const layers::RopeFrequencies& rope, const Row& x,
                   double position) {
  const heddle::v1::MlaConfig& mla = harness.config().attention().mla();
  const size_t heads = static_cast<size_t>(harness.config().n_heads());
  const size_t dn = static_cast<size_t>(mla.qk_nope_head_dim());
  const size_t dr = static_cast<size_t>(mla.qk_rope_head_dim());
  const size_t dv = static_cast<size_t>(mla.v_head_dim());
  const size_t dc = static_cast<size_t>(mla.kv_lora_rank());
  const double eps = harness.config().norm_eps();
  Row u = x;
  std::string query = "self_attn.q_proj.weight";
  if (mla.q_lora_rank() > 0) {
    u = Times(harness.Weight("self_attn.q_a_proj.weight"), x, 0,
              static_cast<size_t>(mla.q_lora_rank()));
    Norm(harness.Weight("self_attn.q_a_layernorm.weight"), nullptr, eps, &u);
    query = "self_attn.q_b_proj.weight";
  }
  const std::vector<double> down = harness.Weight("self_attn.kv_a_proj_with_mqa.weight");
  const std::vector<double> up = harness.Weight("self_attn.kv_b_proj.weight");
  Row c = Times(down, x, 0, dc);
  Row kr = Times(down, x, dc, dr);
  std::vector<double> bias;
  const bool layernorm = mla.latent_norm() == heddle::v1::MlaConfig::LATENT_NORM_LAYERNORM;
  if (layernorm) bias = harness.Weight("self_attn.kv_a_layernorm.bias");
  Norm(harness.Weight("self_attn.kv_a_layernorm.weight"), layernorm ? &bias : nullptr, eps, &c);
  Turn(rope, position, kr.data());
  Token token;
  for (size_t h = 0; h < heads; ++h) {
    token.q.push_back(Times(harness.Weight(query), u, h * (dn + dr), dn + dr));
    Turn(rope, position, token.q.back().data() + dn);
    token.k.push_back(Times(up, c, h * (dn + dv), dn));
    token.k.back().insert(token.k.back().end(), kr.begin(), kr.end());
    token.v.push_back(Times(up, c, h * (dn + dv) + dn, dv));
  }
  return token;
}

}  // namespace

std::vector<double> ReferenceMla(const MlaHarness& harness, const std::vector<int32_t>& lengths,
                                 const std::vector<double>& h) {
  const heddle::v1::ModelConfig& config = harness.config();
  const heddle::v1::MlaConfig& mla = config.attention().mla();
  const layers::RopeFrequencies rope = layers::RopeFrequenciesOf(config, mla.qk_rope_head_dim());
  const double scale =
      rope.softmax_scale_factor / std::sqrt(mla.qk_nope_head_dim() + mla.qk_rope_head_dim());
  const size_t d = static_cast<size_t>(config.d_model());
  const std::vector<double> out_weight = harness.Weight("self_attn.o_proj.weight");
  std::vector<double> y;
  size_t first = 0;
  for (const int32_t length : lengths) {
    std::vector<Token> tokens;
    for (size_t t = 0; t < static_cast<size_t>(length); ++t) {
      const auto begin = h.begin() + static_cast<std::ptrdiff_t>((first + t) * d);
      tokens.push_back(ProjectToken(harness, rope, Row(begin, begin + static_cast<long>(d)),
                                    static_cast<double>(t)));
      Row o;
      for (size_t head = 0; head < static_cast<size_t>(config.n_heads()); ++head) {
        Row p;
        double maximum = -std::numeric_limits<double>::infinity();
        for (const Token& key : tokens) {
          double dot = 0;
          for (size_t i = 0; i < key.k[head].size(); ++i) {
            dot += tokens[t].q[head][i] * key.k[head][i];
          }
          p.push_back(scale * dot);
          maximum = std::max(maximum, p.back());
        }
        double sum = 0;
        for (double& value : p) sum += value = std::exp(value - maximum);
        Row value(static_cast<size_t>(mla.v_head_dim()), 0.0);
        for (size_t s = 0; s < p.size(); ++s) {
          for (size_t i = 0; i < value.size(); ++i) value[i] += p[s] / sum * tokens[s].v[head][i];
        }
        o.insert(o.end(), value.begin(), value.end());
      }
      const Row row = Times(out_weight, o, 0, d);
      y.insert(y.end(), row.begin(), row.end());
    }
    first += static_cast<size_t>(length);
  }
  return y;
}

}  // namespace heddle::attention
