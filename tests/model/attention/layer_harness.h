// One attention layer on the tensors of the model's plan, driven as the model drives it: for the
// tests of layers with parameters of their own.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "base/rng/rng.h"
#include "heddle/v1/config.pb.h"
#include "model/layers/rope.h"
#include "model/layers/sublayer.h"

namespace heddle::model_test {

// Documents of the given lengths, as the model hands them to a layer.
class TestDocuments {
 public:
  explicit TestDocuments(const std::vector<int32_t>& lengths) {
    for (const int32_t length : lengths) {
      for (int32_t t = 0; t < length; ++t) positions_.push_back(t);
      cu_.push_back(cu_.back() + length);
      longest_ = std::max<int64_t>(longest_, length);
    }
  }
  layers::Documents view() const { return {cu_, positions_, longest_}; }
  int64_t rows() const { return cu_.back(); }
  const std::vector<int32_t>& cu() const { return cu_; }
  const std::vector<int32_t>& positions() const { return positions_; }

 private:
  std::vector<int32_t> cu_ = {0};
  std::vector<int32_t> positions_;
  int64_t longest_ = 0;
};

inline std::vector<double> ToVector(const at::Tensor& t) {
  const at::Tensor wide = t.to(at::kDouble).contiguous();
  return {wide.const_data_ptr<double>(), wide.const_data_ptr<double>() + wide.numel()};
}

inline at::Tensor FromVector(const std::vector<double>& values, std::vector<int64_t> shape,
                             at::ScalarType type = at::kDouble) {
  at::Tensor t = at::empty(shape, at::kDouble);
  EXPECT_EQ(t.numel(), static_cast<int64_t>(values.size()));
  std::copy(values.begin(), values.end(), t.data_ptr<double>());
  return t.to(type);
}

// Uniform in (-scale, scale).
inline at::Tensor RandomTensor(std::vector<int64_t> shape, uint64_t seed, double scale = 1.0,
                               at::ScalarType type = at::kDouble) {
  const Rng rng(seed, "test.tensor");
  at::Tensor t = at::empty(shape, at::kDouble);
  double* data = t.data_ptr<double>();
  for (int64_t i = 0; i < t.numel(); ++i) {
    data[i] = scale * (2.0 * rng.UniformAt(static_cast<uint64_t>(i)) - 1.0);
  }
  return t.to(type);
}

inline double MaxDifference(const at::Tensor& a, const at::Tensor& b) {
  const std::vector<double> x = ToVector(a), y = ToVector(b);
  EXPECT_EQ(x.size(), y.size());
  double worst = 0;
  for (size_t i = 0; i < std::min(x.size(), y.size()); ++i) {
    const double difference = std::abs(x[i] - y[i]);
    if (!(difference <= worst)) worst = difference;
  }
  return worst;
}

inline bool SameBits(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.contiguous(), y = b.contiguous();
  return x.scalar_type() == y.scalar_type() && x.numel() == y.numel() &&
         std::memcmp(x.const_data_ptr(), y.const_data_ptr(), x.nbytes()) == 0;
}

inline bool AllZero(const at::Tensor& t) {
  const std::vector<double> values = ToVector(t);
  return std::ranges::all_of(values, [](double v) { return v == 0; });
}

// Owns what the attention of one layer stands on, at the places that the model's plan gives it.
class LayerHarness {
 public:
  LayerHarness(heddle::v1::ModelConfig config, at::ScalarType type, int layer = 0)
      : config_(std::move(config)),
        type_(type),
        layer_(layer),
        ropes_(config_, type == at::kDouble) {
    StatusOr<model::ModelPlan> plan = model::PlanModel(config_);
    EXPECT_TRUE(plan.ok()) << plan.status();
    plan_ = *std::move(plan);
    const std::string prefix = "model.layers." + std::to_string(layer) + ".";
    for (const model::TensorSpec& tensor : plan_.tensors) {
      if (tensor.name.rfind(prefix + "self_attn.", 0) == 0) {
        names_.push_back(tensor.name.substr(prefix.size()));
      }
    }
    weights_ = at::zeros({plan_.flat_elements}, type);
    gradients_ = at::zeros({plan_.flat_elements}, layers::StatisticsType(type));
    buffers_.resize(static_cast<size_t>(plan_.buffer_elements), 0.0f);
    ropes_.Ensure(64);
  }
  LayerHarness(const LayerHarness&) = delete;
  LayerHarness& operator=(const LayerHarness&) = delete;

  layers::LayerStorage storage() {
    layers::LayerStorage storage;
    storage.plan = &plan_;
    storage.layer = layer_;
    storage.weights = {weights_};
    storage.gradients = {gradients_};
    storage.buffers = buffers_.data();
    storage.type = type_;
    return storage;
  }
  const heddle::v1::ModelConfig& config() const { return config_; }
  layers::RopeSet* ropes() { return &ropes_; }
  at::ScalarType type() const { return type_; }
  // Tensors of the attention, without "model.layers.{layer}.".
  const std::vector<std::string>& names() const { return names_; }
  at::Tensor Weight(const std::string& name) { return storage().Weight(name); }
  at::Tensor Gradient(const std::string& name) { return storage().Gradient(name); }
  void Set(const std::string& name, const at::Tensor& value) { Weight(name).copy_(value); }
  // Uniform values of about the size that an initialisation gives.
  void Randomize(uint64_t seed, double scale = 0.6) {
    for (const std::string& name : names_) {
      const at::Tensor weight = Weight(name);
      weight.copy_(RandomTensor(weight.sizes().vec(), seed++, scale));
    }
  }
  // Another layer's weights, of the names both have.
  void CopyFrom(LayerHarness* other) {
    for (const std::string& name : names_) {
      if (other->storage().Has(name)) Set(name, other->Weight(name));
    }
  }
  void ZeroGradients() { gradients_.zero_(); }
  const at::Tensor& gradients() const { return gradients_; }

 private:
  heddle::v1::ModelConfig config_;
  at::ScalarType type_;
  int layer_;
  layers::RopeSet ropes_;
  model::ModelPlan plan_;
  std::vector<std::string> names_;
  at::Tensor weights_;
  at::Tensor gradients_;
  std::vector<float> buffers_;
};

// The rest of a model that a test of one layer does not look at, small.
inline heddle::v1::ModelConfig SmallModel(int64_t d_model) {
  heddle::v1::ModelConfig config;
  config.set_vocab_size(2);
  config.set_n_layers(1);
  config.set_d_ffn(2);
  config.set_d_model(static_cast<int32_t>(d_model));
  return config;
}

struct RunOptions {
  layers::StepInfo step;
  bool recompute = false;
  bool backward = true;
  // Called between the forward that selects and the one that is repeated.
  std::function<void()> between = [] {};
};

struct RunResult {
  at::Tensor out;
  at::Tensor dh;
  layers::LayerLosses losses;
};

// Forward and backward of one micro-batch; dout is dL/dout. The residual is 0.
inline RunResult RunLayer(layers::Sublayer* layer, const TestDocuments& documents,
                          const at::Tensor& h, const at::Tensor& dout,
                          const RunOptions& options = {}) {
  layers::BufferPool kept, scratch;
  const layers::Documents view = documents.view();
  RunResult result;
  layers::PassContext context;
  context.pass = !options.backward   ? layers::Pass::kInference
                 : options.recompute ? layers::Pass::kSelect
                                     : layers::Pass::kTrain;
  context.documents = &view;
  context.step = &options.step;
  context.losses = &result.losses;
  context.kept = &kept;
  context.scratch = &scratch;
  const at::Tensor residual = at::zeros(h.sizes(), h.options());
  // NaN shows rows that nobody wrote.
  const double nan = std::numeric_limits<double>::quiet_NaN();
  result.out = at::full(h.sizes(), nan, h.options());
  result.dh = at::full(h.sizes(), nan, h.options());
  layer->Begin(view);
  const size_t mark = kept.Mark();
  layer->Forward(context, h, residual, result.out);
  if (!options.backward) return result;
  if (options.recompute) {
    kept.Release(mark);
    // What the released pool holds is gone in a real run.
    kept.Take({1 << 16}, at::kDouble).fill_(nan);
    kept.Release(mark);
    options.between();
    context.pass = layers::Pass::kRecompute;
    layer->Forward(context, h, residual, at::Tensor());
  }
  layer->Backward(context, h, dout, result.dh);
  return result;
}

inline at::Tensor Infer(layers::Sublayer* layer, const TestDocuments& documents,
                        const at::Tensor& h) {
  RunOptions options;
  options.backward = false;
  return RunLayer(layer, documents, h, at::Tensor(), options).out;
}

// Cache rows of an inference over the documents, copied.
inline layers::CacheRows CacheRowsOf(layers::Sublayer* layer, const TestDocuments& documents,
                                     const at::Tensor& h) {
  layers::BufferPool kept, scratch;
  const layers::Documents view = documents.view();
  layers::CacheRows rows;
  layers::PassContext context;
  context.documents = &view;
  context.kept = &kept;
  context.scratch = &scratch;
  context.cache_rows = &rows;
  const at::Tensor out = at::zeros(h.sizes(), h.options());
  layer->Begin(view);
  layer->Forward(context, h, at::zeros(h.sizes(), h.options()), out);
  for (at::Tensor* t : {&rows.k, &rows.v, &rows.index_k}) {
    if (t->defined()) *t = t->clone();
  }
  return rows;
}

}  // namespace heddle::model_test
