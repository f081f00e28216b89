#include "model/layers/feed_forward.h"

#include "heddle/v1/config.pb.h"
#include "model/layers/kernel_edge.h"
#include "model/layers/layers.h"

namespace heddle::layers {
namespace {

namespace pw = kernels::pointwise;

class FeedForward : public Sublayer {
 public:
  FeedForward(Activation activation, const LayerStorage& storage)
      : activation_(activation), tensors_(ViewFeedForward(activation, storage, "mlp.")) {}

  void Forward(const PassContext& context, const at::Tensor& h, const at::Tensor& residual,
               const at::Tensor& out) override;
  void Backward(const PassContext& context, const at::Tensor& h, const at::Tensor& gradient,
                const at::Tensor& dh) override;

 private:
  const Activation activation_;
  const FeedForwardTensors tensors_;
  at::Tensor pre_NC_;  // of the last forward that keeps
};

void FeedForward::Forward(const PassContext& context, const at::Tensor& h,
                          const at::Tensor& residual, const at::Tensor& out) {
  const size_t mark = context.scratch->Mark();
  BufferPool* pool = Keeps(context.pass) ? context.kept : context.scratch;
  const at::Tensor pre = pool->Take({h.size(0), tensors_.columns()}, h.scalar_type());
  Linear(h, tensors_.in_CD, pre);
  if (out.defined()) {
    const at::Tensor hidden =
        context.scratch->Take({h.size(0), tensors_.hidden()}, h.scalar_type());
    Activate(activation_, pre, hidden);
    LinearAdd(residual, hidden, tensors_.down_DF, out);
  }
  context.scratch->Release(mark);
  pre_NC_ = Keeps(context.pass) ? pre : at::Tensor();
}

void FeedForward::Backward(const PassContext& context, const at::Tensor& h,
                           const at::Tensor& gradient, const at::Tensor& dh) {
  HEDDLE_CHECK(pre_NC_.defined(), "a backward follows a forward that keeps");
  const size_t mark = context.scratch->Mark();
  const at::Tensor hidden = context.scratch->Take({h.size(0), tensors_.hidden()}, h.scalar_type());
  LinearInputGradient(gradient, tensors_.down_DF, hidden);
  ActivateBackward(activation_, pre_NC_, hidden);  // hidden holds the forward's values again
  LinearWeightGradient(gradient, hidden, tensors_.down_gradient_DF);
  LinearInputGradient(pre_NC_, tensors_.in_CD, dh);
  LinearWeightGradient(pre_NC_, h, tensors_.in_gradient_CD);
  context.scratch->Release(mark);
  pre_NC_ = at::Tensor();
}

void CheckActivation(Activation activation, const at::Tensor& pre, const at::Tensor& hidden) {
  const int64_t columns = (activation == Activation::kSwiglu ? 2 : 1) * hidden.size(1);
  CheckMatrix(pre, hidden.size(0), columns, hidden.scalar_type());
  HEDDLE_CHECK(hidden.is_contiguous());
}

void RunBackward(Activation activation, const at::Tensor& pre, const at::Tensor& hidden_gradient,
                 const void* weight, void* dweight) {
  CheckActivation(activation, pre, hidden_gradient);
  const pw::Table& kernels = pw::Kernels(ElementOf(pre));
  const int64_t width = hidden_gradient.size(1);
  if (activation == Activation::kSwiglu) {
    const pw::SwigluBackward p{width, pre.data_ptr(), hidden_gradient.data_ptr(), weight, dweight};
    ForRows(pre.size(0), [&](pw::RowRange rows) { kernels.swiglu_backward(p, rows); });
    return;
  }
  const auto run = activation == Activation::kGelu ? kernels.gelu_backward : kernels.silu_backward;
  const pw::ActivationBackward p{width, pre.data_ptr(), hidden_gradient.data_ptr(), weight,
                                 dweight};
  ForRows(pre.size(0), [&](pw::RowRange rows) { run(p, rows); });
}

}  // namespace

Activation ActivationOf(const heddle::v1::ModelConfig& config) {
  switch (config.ffn()) {
    case heddle::v1::ModelConfig::FFN_GELU:
      return Activation::kGelu;
    case heddle::v1::ModelConfig::FFN_SILU:
      return Activation::kSilu;
    case heddle::v1::ModelConfig::FFN_SWIGLU:
      break;
  }
  return Activation::kSwiglu;
}

std::unique_ptr<Sublayer> MakeFeedForward(const heddle::v1::ModelConfig& config,
                                          const LayerStorage& storage) {
  return std::make_unique<FeedForward>(ActivationOf(config), storage);
}

FeedForwardTensors ViewFeedForward(Activation activation, const LayerStorage& storage,
                                   const std::string& prefix) {
  FeedForwardTensors t;
  t.down_DF = storage.Weight(prefix + "down_proj.weight");
  t.down_gradient_DF = storage.Gradient(prefix + "down_proj.weight");
  const bool gated = activation == Activation::kSwiglu;
  const std::string in = prefix + (gated ? "gate_proj.weight" : "up_proj.weight");
  const int64_t columns = (gated ? 2 : 1) * t.hidden();
  t.in_CD = storage.JoinedWeight(in, columns);
  t.in_gradient_CD = storage.JoinedGradient(in, columns);
  return t;
}

void Activate(Activation activation, const at::Tensor& pre, const at::Tensor& hidden) {
  if (activation == Activation::kSwiglu) {
    Swiglu(pre, hidden);
    return;
  }
  CheckActivation(activation, pre, hidden);
  const pw::Table& kernels = pw::Kernels(ElementOf(pre));
  const auto run = activation == Activation::kGelu ? kernels.gelu_forward : kernels.silu_forward;
  const pw::ActivationForward p{hidden.size(1), pre.data_ptr(), hidden.data_ptr()};
  ForRows(pre.size(0), [&](pw::RowRange rows) { run(p, rows); });
}

void ActivateBackward(Activation activation, const at::Tensor& pre,
                      const at::Tensor& hidden_gradient) {
  RunBackward(activation, pre, hidden_gradient, nullptr, nullptr);
}

void ActivateWeightedBackward(Activation activation, const at::Tensor& weight,
                              const at::Tensor& pre, const at::Tensor& hidden_gradient,
                              const at::Tensor& dweight) {
  CheckVector(weight, pre.size(0), StatisticsTypeOf(pre));
  CheckVector(dweight, pre.size(0), StatisticsTypeOf(pre));
  RunBackward(activation, pre, hidden_gradient, weight.data_ptr(), dweight.data_ptr());
}

}  // namespace heddle::layers
