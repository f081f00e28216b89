#include "model/layers/rope.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cmath>
#include <numbers>
#include <utility>

#include "heddle/v1/config.pb.h"

namespace heddle::layers {
namespace {

using heddle::v1::RopeScalingConfig;

constexpr double kTwoPi = 2.0 * std::numbers::pi;

double Llama3(double inverse, const RopeScalingConfig& s) {
  const double original = s.original_max_position_embeddings();
  const double wavelength = kTwoPi / inverse;
  if (wavelength > original / s.low_freq_factor()) return inverse / s.factor();
  if (wavelength < original / s.high_freq_factor()) return inverse;
  const double smooth =
      (original / wavelength - s.low_freq_factor()) / (s.high_freq_factor() - s.low_freq_factor());
  return (1.0 - smooth) * inverse / s.factor() + smooth * inverse;
}

void ApplyYarn(double theta, int64_t head_dim, const RopeScalingConfig& s,
               RopeFrequencies* frequencies) {
  const double d = static_cast<double>(head_dim);
  const auto correction = [&](double rotations) {
    return d * std::log(s.original_max_position_embeddings() / (kTwoPi * rotations)) /
           (2.0 * std::log(theta));
  };
  const double low = std::max(std::floor(correction(s.beta_fast())), 0.0);
  const double high = std::min(std::ceil(correction(s.beta_slow())), d - 1.0);
  for (size_t i = 0; i < frequencies->inverse.size(); ++i) {
    const double span = std::max(high - low, 1e-3);
    const double ramp = std::clamp((static_cast<double>(i) - low) / span, 0.0, 1.0);
    double& inverse = frequencies->inverse[i];
    inverse = inverse / s.factor() * ramp + inverse * (1.0 - ramp);
  }
  const double mscale = 0.1 * s.mscale() * std::log(s.factor()) + 1.0;
  frequencies->softmax_scale_factor = mscale * mscale;
}

}  // namespace

RopeFrequencies RopeFrequenciesOf(const heddle::v1::ModelConfig& config, int64_t head_dim) {
  const heddle::v1::RopeConfig& rope = config.rope();
  const RopeScalingConfig& scaling = rope.scaling();
  const double d = static_cast<double>(head_dim);
  double theta = rope.theta();
  if (scaling.type() == RopeScalingConfig::TYPE_NTK && head_dim > 2) {
    theta *= std::pow(scaling.factor(), d / (d - 2.0));
  }
  RopeFrequencies frequencies;
  frequencies.interleaved = rope.layout() == heddle::v1::RopeConfig::LAYOUT_INTERLEAVED;
  for (int64_t i = 0; i < head_dim / 2; ++i) {
    double inverse = std::pow(theta, -2.0 * static_cast<double>(i) / d);
    if (scaling.type() == RopeScalingConfig::TYPE_LINEAR) inverse /= scaling.factor();
    if (scaling.type() == RopeScalingConfig::TYPE_LLAMA3) inverse = Llama3(inverse, scaling);
    frequencies.inverse.push_back(inverse);
  }
  if (scaling.type() == RopeScalingConfig::TYPE_YARN &&
      config.max_position_embeddings() > scaling.original_max_position_embeddings()) {
    ApplyYarn(theta, head_dim, scaling, &frequencies);
  }
  return frequencies;
}

struct RopeTables::Tables {
  at::Tensor cosine;
  at::Tensor sine;
  int64_t length = 0;
};

RopeTables::RopeTables(RopeFrequencies frequencies, bool fp64)
    : frequencies_(std::move(frequencies)), fp64_(fp64), tables_(std::make_unique<Tables>()) {}
RopeTables::~RopeTables() = default;

namespace {

template <typename T>
void Fill(const std::vector<double>& inverse, int64_t length, T* cosine, T* sine) {
  for (int64_t position = 0; position < length; ++position) {
    for (const double frequency : inverse) {
      const double angle = static_cast<double>(position) * frequency;
      *cosine++ = static_cast<T>(std::cos(angle));
      *sine++ = static_cast<T>(std::sin(angle));
    }
  }
}

}  // namespace

void RopeTables::Ensure(int64_t length) {
  if (length <= tables_->length) return;
  const int64_t rows = std::max(length, 2 * tables_->length);
  const int64_t half = static_cast<int64_t>(frequencies_.inverse.size());
  const at::TensorOptions options = at::TensorOptions().dtype(fp64_ ? at::kDouble : at::kFloat);
  tables_->cosine = at::empty({rows, half}, options);
  tables_->sine = at::empty({rows, half}, options);
  if (fp64_) {
    Fill(frequencies_.inverse, rows, tables_->cosine.data_ptr<double>(),
         tables_->sine.data_ptr<double>());
  } else {
    Fill(frequencies_.inverse, rows, tables_->cosine.data_ptr<float>(),
         tables_->sine.data_ptr<float>());
  }
  tables_->length = rows;
}

const at::Tensor& RopeTables::cosine() const { return tables_->cosine; }
const at::Tensor& RopeTables::sine() const { return tables_->sine; }

RopeSet::RopeSet(const heddle::v1::ModelConfig& config, bool fp64) : config_(config), fp64_(fp64) {}
RopeSet::~RopeSet() = default;

const RopeTables& RopeSet::Tables(int64_t width) {
  return Get(width, config_.rope().layout() == heddle::v1::RopeConfig::LAYOUT_INTERLEAVED);
}
const RopeTables& RopeSet::HalfLayout(int64_t width) { return Get(width, false); }

const RopeTables& RopeSet::Get(int64_t width, bool interleaved) {
  std::unique_ptr<RopeTables>& tables = tables_[{width, interleaved}];
  if (tables == nullptr) {
    RopeFrequencies frequencies = RopeFrequenciesOf(config_, width);
    frequencies.interleaved = interleaved;
    tables = std::make_unique<RopeTables>(std::move(frequencies), fp64_);
    tables->Ensure(length_);
  }
  return *tables;
}

void RopeSet::Ensure(int64_t length) {
  length_ = std::max(length_, length);
  for (const auto& [key, tables] : tables_) tables->Ensure(length_);
}

}  // namespace heddle::layers
