#include "model/block.h"

#include "heddle/v1/config.pb.h"
#include "model/moe/moe_layer.h"

namespace heddle::model {
namespace {

std::unique_ptr<layers::Sublayer> MakeHalf(const heddle::v1::ModelConfig& config,
                                           const layers::LayerStorage& storage) {
  if (LayerHasExperts(config, storage.layer)) return moe::MakeMoe(config, storage);
  return layers::MakeFeedForward(config, storage);
}

}  // namespace

Block::Block(const heddle::v1::ModelConfig& config, const layers::LayerStorage& storage)
    : input_norm_(config, storage, "input_layernorm"),
      post_norm_(config, storage, "post_attention_layernorm"),
      feed_forward_(MakeHalf(config, storage)) {}

void Block::Forward(const layers::PassContext& context, layers::Sublayer* attention,
                    const at::Tensor& x, const at::Tensor& y) {
  const int64_t n = x.size(0);
  const int64_t d = x.size(1);
  const auto take = [&] { return context.kept->Take({n, d}, x.scalar_type()); };
  x_ = x;
  h1_ = take();
  x2_ = take();
  h2_ = take();
  norm1_saved_ = context.kept->Take({n}, layers::StatisticsType(x.scalar_type()));
  norm2_saved_ = context.kept->Take({n}, layers::StatisticsType(x.scalar_type()));
  input_norm_.Forward(x, h1_, norm1_saved_);
  attention->Forward(context, h1_, x, x2_);
  post_norm_.Forward(x2_, h2_, norm2_saved_);
  feed_forward_->Forward(context, h2_, x2_, y);
}

void Block::Backward(const layers::PassContext& context, layers::Sublayer* attention,
                     const at::Tensor& gradient) {
  const size_t mark = context.scratch->Mark();
  const at::Tensor dh =
      context.scratch->Take({gradient.size(0), gradient.size(1)}, gradient.scalar_type());
  feed_forward_->Backward(context, h2_, gradient, dh);
  post_norm_.Backward(x2_, norm2_saved_, dh, gradient, gradient);
  attention->Backward(context, h1_, gradient, dh);
  input_norm_.Backward(x_, norm1_saved_, dh, gradient, gradient);
  context.scratch->Release(mark);
}

void Block::SelectiveForward(const layers::PassContext& context, layers::Sublayer* attention,
                             const at::Tensor& x, const at::Tensor& y) {
  const size_t mark = context.scratch->Mark();
  const at::Tensor h = context.scratch->Take({x.size(0), x.size(1)}, x.scalar_type());
  const at::Tensor norm_saved =
      context.scratch->Take({x.size(0)}, layers::StatisticsType(x.scalar_type()));
  layers::PassContext half = context;
  x_ = x;
  x2_ = context.kept->Take({x.size(0), x.size(1)}, x.scalar_type());
  input_norm_.Forward(x, h, norm_saved);
  half.pass = layers::Pass::kTrain;
  attention->Forward(half, h, x, x2_);
  post_norm_.Forward(x2_, h, norm_saved);
  half.pass = layers::Pass::kSelect;
  feed_forward_->Forward(half, h, x2_, y);
  context.scratch->Release(mark);
}

void Block::SelectiveBackward(const layers::PassContext& context, layers::Sublayer* attention,
                              const at::Tensor& gradient) {
  const size_t mark = context.scratch->Mark();
  const int64_t n = gradient.size(0);
  const int64_t d = gradient.size(1);
  const at::ScalarType type = gradient.scalar_type();
  const at::Tensor dh = context.scratch->Take({n, d}, type);
  const at::Tensor h = context.scratch->Take({n, d}, type);
  const at::Tensor norm_saved = context.scratch->Take({n}, layers::StatisticsType(type));
  layers::PassContext half = context;
  post_norm_.Forward(x2_, h, norm_saved);
  half.pass = layers::Pass::kRecompute;
  feed_forward_->Forward(half, h, x2_, at::Tensor());
  feed_forward_->Backward(half, h, gradient, dh);
  post_norm_.Backward(x2_, norm_saved, dh, gradient, gradient);
  input_norm_.Forward(x_, h, norm_saved);
  half.pass = layers::Pass::kTrain;
  attention->Backward(half, h, gradient, dh);
  input_norm_.Backward(x_, norm_saved, dh, gradient, gradient);
  context.scratch->Release(mark);
}

}  // namespace heddle::model
