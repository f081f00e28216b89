// One layer with a hand-built plan, for tests of sublayers: flat buffers filled from a seed, one
// training pass as vectors of doubles, and central differences of its loss.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>

#include "base/rng/rng.h"
#include "model/layers/sublayer.h"
#include "model/model_plan.h"

namespace heddle::layers_test {

inline std::vector<double> ToVector(const at::Tensor& t) {
  const at::Tensor wide = t.to(at::kDouble).contiguous();
  return {wide.data_ptr<double>(), wide.data_ptr<double>() + wide.numel()};
}
inline at::Tensor ToTensor(const std::vector<double>& values, int64_t columns,
                           at::ScalarType type) {
  const int64_t rows = static_cast<int64_t>(values.size()) / columns;
  at::Tensor out = at::empty({rows, columns}, at::kDouble);
  std::copy(values.begin(), values.end(), out.data_ptr<double>());
  return out.to(type);
}

// Standard normal values of a named stream.
inline std::vector<double> Normal(int64_t count, const std::string& purpose, double scale = 1.0) {
  const Rng rng(11, purpose);
  std::vector<double> values;
  for (int64_t i = 0; i < count; ++i) {
    values.push_back(scale * rng.NormalAt(static_cast<uint64_t>(i)));
  }
  return values;
}

inline double MaxDifference(const std::vector<double>& a, const std::vector<double>& b) {
  EXPECT_EQ(a.size(), b.size());
  double worst = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double difference = std::abs(a[i] - b[i]);
    if (!(difference <= worst)) worst = difference;
  }
  return worst;
}

// The tensors of one layer, or, with kNoLayer, tensors by whole names.
class LayerFixture {
 public:
  explicit LayerFixture(at::ScalarType type, int layer = 3) {
    storage_.type = type;
    storage_.layer = layer;
  }

  // `joined`: end to end with the tensor before.
  void Add(const std::string& name, std::vector<int64_t> shape, bool joined = false) {
    Append(&plan_.tensors, &plan_.flat_elements, name, std::move(shape), joined);
  }
  void AddBuffer(const std::string& name, int64_t size) {
    Append(&plan_.buffers, &plan_.buffer_elements, name, {size}, false);
  }

  // All experts of the layer are here.
  void HasExperts(int64_t count) { plan_.experts = {0, count}; }

  // Normal weights of standard deviation `scale`, the same numbers in every type.
  const layers::LayerStorage& Build(double scale) {
    const at::TensorOptions weights = at::TensorOptions().dtype(storage_.type);
    weights_ = at::full({plan_.flat_elements}, 0.0, weights);
    gradients_ = at::full({plan_.flat_elements}, 0.0,
                          at::TensorOptions().dtype(layers::StatisticsType(storage_.type)));
    buffers_.assign(static_cast<size_t>(plan_.buffer_elements), 0.0f);
    storage_.plan = &plan_;
    storage_.weights = {weights_};
    storage_.gradients = {gradients_};
    storage_.buffers = buffers_.data();
    for (const model::TensorSpec& spec : plan_.tensors) {
      Set(spec.name.substr(Prefix().size()), Normal(spec.elements, spec.name, scale));
    }
    return storage_;
  }

  void Set(const std::string& name, const std::vector<double>& values) {
    const at::Tensor to = storage_.Weight(name);
    ASSERT_EQ(to.numel(), static_cast<int64_t>(values.size()));
    to.copy_(ToTensor(values, static_cast<int64_t>(values.size()), storage_.type).view(to.sizes()));
  }
  std::vector<double> Weight(const std::string& name) const {
    return ToVector(storage_.Weight(name));
  }
  std::vector<double> Gradient(const std::string& name) const {
    return ToVector(storage_.Gradient(name));
  }
  void ZeroGradients() { gradients_.zero_(); }

  const layers::LayerStorage& storage() const { return storage_; }
  const model::ModelPlan& plan() const { return plan_; }
  std::string Prefix() const {
    if (storage_.layer == layers::LayerStorage::kNoLayer) return "";
    return "model.layers." + std::to_string(storage_.layer) + ".";
  }
  // Names without the prefix.
  std::vector<std::string> Names() const {
    std::vector<std::string> names;
    for (const model::TensorSpec& spec : plan_.tensors) {
      names.push_back(spec.name.substr(Prefix().size()));
    }
    return names;
  }

 private:
  void Append(std::vector<model::TensorSpec>* to, int64_t* end, const std::string& name,
              std::vector<int64_t> shape, bool joined) {
    model::TensorSpec spec;
    spec.name = Prefix() + name;
    spec.shape = std::move(shape);
    spec.elements = 1;
    for (const int64_t extent : spec.shape) spec.elements *= extent;
    if (!joined)
      *end = (*end + model::kFlatAlignment - 1) / model::kFlatAlignment * model::kFlatAlignment;
    spec.offset = *end;
    *end += spec.elements;
    to->push_back(spec);
  }

  model::ModelPlan plan_;
  layers::LayerStorage storage_;
  at::Tensor weights_;
  at::Tensor gradients_;
  std::vector<float> buffers_;
};

// Names of one feed-forward function under `prefix`.
inline void AddFeedForward(LayerFixture* fixture, const std::string& prefix, bool gated,
                           int64_t width, int64_t hidden) {
  if (gated) fixture->Add(prefix + "gate_proj.weight", {hidden, width});
  fixture->Add(prefix + "up_proj.weight", {hidden, width}, /*joined=*/gated);
  fixture->Add(prefix + "down_proj.weight", {width, hidden});
}

// One micro-batch through a sublayer: dL/dout and the residual are fixed pseudo-random values.
struct Batch {
  std::vector<int32_t> cu = {0};
  std::vector<int32_t> positions;
  layers::StepInfo step;
  int64_t width = 0;
  std::vector<double> h;         // [N, width]
  std::vector<double> residual;  // [N, width]
  std::vector<double> gradient;  // [N, width]

  Batch(const std::vector<int32_t>& lengths, int64_t d, const std::string& purpose) : width(d) {
    for (const int32_t length : lengths) {
      cu.push_back(cu.back() + length);
      for (int32_t i = 0; i < length; ++i) positions.push_back(i);
    }
    h = Normal(rows() * d, purpose + ".h");
    residual = Normal(rows() * d, purpose + ".residual");
    gradient = Normal(rows() * d, purpose + ".gradient");
  }
  int64_t rows() const { return cu.back(); }
  layers::Documents documents() const {
    layers::Documents documents;
    documents.cu_seqlens = cu;
    documents.positions = positions;
    return documents;
  }
};

struct Outcome {
  std::vector<double> out;
  std::vector<double> dh;
  layers::LayerLosses losses;
  bool operator==(const Outcome& other) const {
    return out == other.out && dh == other.dh && losses.Total() == other.losses.Total();
  }
};

// Pools and passes of one sublayer.
class Runner {
 public:
  Runner(layers::Sublayer* layer, at::ScalarType type) : layer_(layer), type_(type) {}

  // A forward of the given pass; `out` undefined asks for what the backward needs alone.
  layers::LayerLosses Forward(const Batch& batch, layers::Pass pass, const at::Tensor& out) {
    documents_ = batch.documents();
    layers::LayerLosses losses;
    context_ = {};
    context_.pass = pass;
    context_.documents = &documents_;
    context_.step = &batch.step;
    context_.losses = &losses;
    context_.kept = &kept_;
    context_.scratch = &scratch_;
    kept_.Release(0);
    h_ = ToTensor(batch.h, batch.width, type_);
    layer_->Forward(context_, h_, ToTensor(batch.residual, batch.width, type_), out);
    context_.losses = nullptr;
    EXPECT_EQ(scratch_.Mark(), 0u);
    return losses;
  }
  at::Tensor Blank(const Batch& batch) const {
    return at::full({batch.rows(), batch.width}, std::nan(""), at::TensorOptions().dtype(type_));
  }
  Outcome Infer(const Batch& batch) {
    Outcome o;
    const at::Tensor out = Blank(batch);
    o.losses = Forward(batch, layers::Pass::kInference, out);
    o.out = ToVector(out);
    return o;
  }
  Outcome Train(const Batch& batch) {
    Outcome o;
    const at::Tensor out = Blank(batch);
    o.losses = Forward(batch, layers::Pass::kTrain, out);
    o.out = ToVector(out);
    o.dh = Backward(batch);
    return o;
  }
  // kSelect, `between`, kRecompute without an output, backward.
  Outcome TrainWithRecomputation(
      const Batch& batch, const std::function<void()>& between = [] {}) {
    Outcome o;
    const at::Tensor out = Blank(batch);
    o.losses = Forward(batch, layers::Pass::kSelect, out);
    o.out = ToVector(out);
    between();
    const layers::LayerLosses again = Forward(batch, layers::Pass::kRecompute, at::Tensor());
    EXPECT_EQ(again.Total(), 0.0);
    o.dh = Backward(batch);
    return o;
  }

 private:
  std::vector<double> Backward(const Batch& batch) {
    const at::Tensor dh = Blank(batch);
    layer_->Backward(context_, h_, ToTensor(batch.gradient, batch.width, type_), dh);
    EXPECT_EQ(scratch_.Mark(), 0u);
    return ToVector(dh);
  }

  layers::Sublayer* layer_;
  at::ScalarType type_;
  layers::BufferPool kept_;
  layers::BufferPool scratch_;
  layers::Documents documents_;
  layers::PassContext context_;
  at::Tensor h_;
};

// d(sum gradient o out + losses) by central differences against the backward, in fp64: some
// elements of every weight and of h. Returns the number of elements compared.
inline int CheckGradients(LayerFixture* fixture, layers::Sublayer* layer, Batch batch,
                          double tolerance = 1e-6) {
  Runner runner(layer, at::kDouble);
  const auto loss = [&] {
    const at::Tensor out = runner.Blank(batch);
    double sum = runner.Forward(batch, layers::Pass::kTrain, out).Total();
    const std::vector<double> values = ToVector(out);
    for (size_t i = 0; i < values.size(); ++i) sum += values[i] * batch.gradient[i];
    return sum;
  };
  fixture->ZeroGradients();
  const Outcome outcome = runner.Train(batch);
  int compared = 0;
  const auto compare = [&](double* value, double got, const std::string& what) {
    const double before = *value;
    const double step = 1e-5;
    *value = before + step;
    const double above = loss();
    *value = before - step;
    const double below = loss();
    *value = before;
    const double expected = (above - below) / (2 * step);
    EXPECT_NEAR(got, expected, tolerance * (0.1 + std::abs(expected))) << what;
    ++compared;
  };
  for (const std::string& name : fixture->Names()) {
    const std::vector<double> gradient = fixture->Gradient(name);
    double* weight = fixture->storage().Weight(name).data_ptr<double>();
    const size_t stride = std::max<size_t>(1, gradient.size() / 6);
    for (size_t i = 0; i < gradient.size(); i += stride) {
      compare(weight + i, gradient[i], name + "[" + std::to_string(i) + "]");
    }
  }
  const size_t stride = std::max<size_t>(1, batch.h.size() / 40);
  for (size_t i = 0; i < batch.h.size(); i += stride) {
    compare(&batch.h[i], outcome.dh[i], "h[" + std::to_string(i) + "]");
  }
  return compared;
}

}  // namespace heddle::layers_test
