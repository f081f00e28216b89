#include "model/layers/norm.h"

#include "heddle/v1/config.pb.h"
#include "model/layers/kernel_edge.h"
#include "model/layers/layers.h"

namespace heddle::layers {

namespace pw = kernels::pointwise;

NormKind NormKindOf(const heddle::v1::ModelConfig& config) {
  switch (config.norm()) {
    case heddle::v1::ModelConfig::NORM_LAYERNORM:
      return NormKind::kLayer;
    case heddle::v1::ModelConfig::NORM_DYT:
      return NormKind::kDyt;
    case heddle::v1::ModelConfig::NORM_RMSNORM:
      break;
  }
  return NormKind::kRms;
}

Norm::Norm(const heddle::v1::ModelConfig& config, const LayerStorage& storage,
           const std::string& name)
    : Norm(NormKindOf(config), config.norm_eps(), storage, name) {}

Norm::Norm(NormKind kind, double eps, const LayerStorage& storage, const std::string& name)
    : kind_(kind),
      eps_(eps),
      gain_D_(storage.Weight(name + ".weight")),
      gain_gradient_D_(storage.Gradient(name + ".weight")) {
  if (kind == NormKind::kRms) return;
  bias_D_ = storage.Weight(name + ".bias");
  bias_gradient_D_ = storage.Gradient(name + ".bias");
  if (kind == NormKind::kLayer) return;
  alpha_1_ = storage.Weight(name + ".alpha");
  alpha_gradient_1_ = storage.Gradient(name + ".alpha");
  HEDDLE_CHECK(alpha_1_.numel() == 1, name, ".alpha is a scalar");
}

void Norm::Forward(const at::Tensor& x, const at::Tensor& y, const at::Tensor& saved) const {
  const int64_t width = x.size(1);
  if (kind_ == NormKind::kRms) {
    RmsNorm(x, gain_D_, eps_, y, saved);
    return;
  }
  if (kind_ == NormKind::kLayer) {
    LayerNorm(x, gain_D_, bias_D_, eps_, y, saved);
    return;
  }
  CheckMatrix(x, x.size(0), width, gain_D_.scalar_type());
  CheckMatrix(y, x.size(0), width, x.scalar_type());
  CheckVector(gain_D_, width, x.scalar_type());
  CheckVector(bias_D_, width, x.scalar_type());
  const pw::DytForward p{
      width,       x.data_ptr(), alpha_1_.data_ptr(), gain_D_.data_ptr(), bias_D_.data_ptr(),
      y.data_ptr()};
  const pw::Table& kernels = pw::Kernels(ElementOf(x));
  ForRows(x.size(0), [&](pw::RowRange rows) { kernels.dyt_forward(p, rows); });
}

void Norm::Backward(const at::Tensor& x, const at::Tensor& saved, const at::Tensor& dy,
                    const at::Tensor& residual, const at::Tensor& dx) const {
  if (kind_ == NormKind::kRms) {
    RmsNormBackward(x, gain_D_, saved, dy, residual, dx, gain_gradient_D_);
    return;
  }
  if (kind_ == NormKind::kLayer) {
    LayerNormBackward(x, gain_D_, saved, dy, residual, dx, gain_gradient_D_, bias_gradient_D_);
    return;
  }
  CheckMatrix(x, x.size(0), gain_D_.numel(), gain_D_.scalar_type());
  CheckMatrix(dy, x.size(0), x.size(1), x.scalar_type());
  CheckMatrix(dx, x.size(0), x.size(1), x.scalar_type());
  if (residual.defined()) CheckMatrix(residual, x.size(0), x.size(1), x.scalar_type());
  DytBackward(x, dy, residual, dx);
}

void Norm::DytBackward(const at::Tensor& x, const at::Tensor& dy, const at::Tensor& residual,
                       const at::Tensor& dx) const {
  const int64_t width = x.size(1);
  pw::DytBackward p;
  p.width = width;
  p.x = x.data_ptr();
  p.alpha = alpha_1_.data_ptr();
  p.gain = gain_D_.data_ptr();
  p.dy = dy.data_ptr();
  p.residual = residual.defined() ? residual.data_ptr() : nullptr;
  p.dx = dx.data_ptr();
  const pw::Table& kernels = pw::Kernels(ElementOf(x));
  const int64_t row_bytes = width * gain_gradient_D_.element_size();
  const at::Tensor sums = BlockSums(x.size(0), 2 * width + 1, gain_gradient_D_.scalar_type(),
                                    [&](pw::RowRange rows, void* block_sums) {
                                      char* at = static_cast<char*>(block_sums);
                                      pw::DytBackward q = p;
                                      q.dgain = at;
                                      q.dbias = at + row_bytes;
                                      q.dalpha = at + 2 * row_bytes;
                                      kernels.dyt_backward(q, rows);
                                    });
  AddBlockSums(sums, 0, gain_gradient_D_);
  AddBlockSums(sums, width, bias_gradient_D_);
  AddBlockSums(sums, 2 * width, alpha_gradient_1_);
}

}  // namespace heddle::layers
