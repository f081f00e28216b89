#include "model/attention/gsa_indexer.h"

#include <cmath>
#include <string>
#include <utility>

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"
#include "model/attention/gates.h"
#include "model/layers/layers.h"

namespace heddle::attention {
namespace {

constexpr double kVarianceDecay = 0.99;

TokenIndexerOptions OptionsOf(const heddle::v1::GsaConfig& gsa) {
  TokenIndexerOptions options;
  options.kl_weight = gsa.kl_weight();
  options.temperature = gsa.indexer_temperature();
  options.least_count = AdaptiveK(gsa).least();
  return options;
}

std::vector<double> ToVector(const at::Tensor& t) {
  const at::Tensor wide = t.to(at::kDouble).contiguous();
  return {wide.const_data_ptr<double>(), wide.const_data_ptr<double>() + wide.numel()};
}

// The spreads of all rows, in order.
std::vector<ScoreSpread> SpreadsOf(const ScoreStatistics& statistics,
                                   const layers::Documents& documents) {
  const std::vector<double> mean = ToVector(statistics.mean_N);
  const std::vector<double> variance = ToVector(statistics.variance_N);
  const std::vector<double> maximum = ToVector(statistics.maximum_N);
  const std::vector<double> entropy = ToVector(statistics.entropy_N);
  std::vector<ScoreSpread> rows;
  rows.reserve(mean.size());
  for (size_t b = 0; b + 1 < documents.cu_seqlens.size(); ++b) {
    const int64_t length = documents.cu_seqlens[b + 1] - documents.cu_seqlens[b];
    for (int64_t position = 0; position < length; ++position) {
      const size_t t = rows.size();
      rows.push_back({mean[t], variance[t], maximum[t], entropy[t], position + 1, length});
    }
  }
  return rows;
}

}  // namespace

GsaIndexer::GsaIndexer(const heddle::v1::ModelConfig& config, const layers::LayerStorage& storage)
    : TokenIndexer(OptionsOf(config.attention().gsa()), /*has_weights=*/true, /*shared=*/nullptr),
      storage_(storage),
      heads_(config.attention().gsa().n_indexer_heads()),
      width_(config.attention().gsa().d_indexer()),
      activation_(config.attention().gsa().indexer_activation() ==
                          heddle::v1::GsaConfig::INDEXER_ACTIVATION_RELU
                      ? kernels::indexer::Activation::kRelu
                      : kernels::indexer::Activation::kSigmoid),
      adaptive_(config.attention().gsa()),
      vref_(nullptr) {
  if (adaptive_.kind() == AdaptiveK::Kind::kVarianceCausal) {
    vref_ = storage.Buffer("self_attn.indexer.vref");
    HEDDLE_CHECK(vref_ != nullptr, "no buffer vref");
  }
}

IndexRows GsaIndexer::Project(std::span<const int32_t> /*positions*/, const at::Tensor& u,
                              const at::Tensor& x, layers::BufferPool* pool) {
  const int64_t n = x.size(0);
  const at::ScalarType type = x.scalar_type();
  const at::Tensor q = pool->Take({n, heads_ * width_}, type);
  const at::Tensor key = pool->Take({n, width_}, type);
  const at::Tensor w = pool->Take({n, heads_}, type);
  layers::Linear(u, storage_.Weight("self_attn.indexer.q_proj.weight"), q);
  layers::LinearByRow(x, storage_.Weight("self_attn.indexer.k_proj.weight"), key);
  layers::Linear(x, storage_.Weight("self_attn.indexer.weights_proj.weight"), w);
  w_ = Widen(w, pool);
  w_.add_(storage_.Weight("self_attn.indexer.weights_proj.bias"));
  Sigmoid(w_);
  IndexRows rows;
  rows.inputs.q_NHI = Widen(q, pool).view({n, heads_, width_});
  rows.inputs.k_NI = Widen(key, pool);
  rows.inputs.w_NH = w_;
  rows.inputs.head_bias_H = storage_.Weight("self_attn.indexer.bias").to(w_.scalar_type());
  rows.inputs.activation = activation_;
  rows.inputs.score_scale = 1.0 / std::sqrt(static_cast<double>(width_));
  rows.key_NI = key;
  return rows;
}

AdaptiveK GsaIndexer::Adaptive() const {
  AdaptiveK adaptive = adaptive_;
  if (adaptive.kind() != AdaptiveK::Kind::kLearned) return adaptive;
  const std::string prefix = "self_attn.indexer.adaptive_k.";
  AdaptiveK::Mlp mlp;
  mlp.first = ToVector(storage_.Weight(prefix + "fc1.weight"));
  mlp.first_bias = ToVector(storage_.Weight(prefix + "fc1.bias"));
  mlp.second = ToVector(storage_.Weight(prefix + "fc2.weight"));
  mlp.second_bias = ToVector(storage_.Weight(prefix + "fc2.bias")).front();
  adaptive.set_mlp(std::move(mlp));
  return adaptive;
}

bool GsaIndexer::Measures(const layers::PassContext& context) const {
  return vref_ != nullptr && layers::Counts(context.pass);
}

std::vector<int32_t> GsaIndexer::CountKeys(const layers::PassContext& context,
                                           const IndexerInputs& inputs) {
  const layers::Documents& documents = *context.documents;
  const AdaptiveK adaptive = Adaptive();
  std::vector<int32_t> counts;
  counts.reserve(documents.positions.size());
  if (!adaptive.needs_scores()) {
    for (const int32_t position : documents.positions) {
      counts.push_back(adaptive.Count({.visible = position + 1}, 0));
    }
    return counts;
  }
  const std::vector<ScoreSpread> rows = SpreadsOf(MeasureScores(inputs, documents), documents);
  double reference = 0;
  if (vref_ != nullptr) {
    reference = *vref_;
    if (layers::Counts(context.pass)) {
      for (const ScoreSpread& row : rows) {
        if (row.visible < 2) continue;
        statistics_[0] += row.variance;
        statistics_[1] += 1;
      }
    }
  } else {
    for (const ScoreSpread& row : rows) reference += adaptive.Spread(row);
    reference /= static_cast<double>(rows.size());
  }
  for (const ScoreSpread& row : rows) counts.push_back(adaptive.Count(row, reference));
  return counts;
}

int32_t GsaIndexer::CountCached(const IndexerInputs& inputs) const {
  const AdaptiveK adaptive = Adaptive();
  ScoreSpread row;
  row.visible = row.columns = inputs.k_NI.size(0);
  if (adaptive.needs_scores()) {
    const ScoreStatistics statistics = MeasureCached(inputs);
    row.mean = statistics.mean_N.item<double>();
    row.variance = statistics.variance_N.item<double>();
    row.maximum = statistics.maximum_N.item<double>();
    row.entropy = statistics.entropy_N.item<double>();
  }
  // `variance` has no batch to compare with here: the row lies at its own mean.
  return adaptive.Count(row, vref_ != nullptr ? *vref_ : adaptive.Spread(row));
}

void GsaIndexer::KeepGradients(const layers::PassContext& context,
                               const IndexerGradients& gradients) {
  const int64_t n = gradients.dk_NI.size(0);
  const auto keep = [&](const at::Tensor& gradient) {
    at::Tensor kept = context.kept->Take({n, gradient.numel() / n}, storage_.type);
    kept.copy_(gradient.view({n, -1}));
    return kept;
  };
  SigmoidBackward(w_, gradients.dw_NH);
  dq_ = keep(gradients.dq_NHI);
  dk_ = keep(gradients.dk_NI);
  dw_ = keep(gradients.dw_NH);
  dbeta_ = gradients.dhead_bias_H;
}

void GsaIndexer::AddGradients(const layers::PassContext& /*context*/, const at::Tensor& u,
                              const at::Tensor& x) {
  const auto gradient = [&](const char* name) {
    return storage_.Gradient(std::string("self_attn.indexer.") + name);
  };
  layers::LinearWeightGradient(dq_, u, gradient("q_proj.weight"));
  layers::LinearWeightGradient(dk_, x, gradient("k_proj.weight"));
  layers::LinearWeightGradient(dw_, x, gradient("weights_proj.weight"));
  AddColumnSums(dw_, gradient("weights_proj.bias"));
  gradient("bias").add_(dbeta_);
}

std::span<double> GsaIndexer::statistics() {
  return vref_ == nullptr ? std::span<double>() : std::span<double>(statistics_);
}

void GsaIndexer::UpdateBuffers() {
  if (vref_ == nullptr || statistics_[1] == 0) return;
  const double mean = statistics_[0] / statistics_[1];
  const double old = *vref_;
  *vref_ = static_cast<float>(old > 0 ? kVarianceDecay * old + (1 - kVarianceDecay) * mean : mean);
}

}  // namespace heddle::attention
