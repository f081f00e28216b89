#include "model/block.h"

#include <vector>

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
  const ForwardCall call = {this, &context, attention, x, y};
  Forward({&call, 1});
}

void Block::Forward(std::span<const ForwardCall> calls) {
  std::vector<layers::Sublayer::ForwardCall> halves;
  for (const ForwardCall& call : calls) {
    Block& self = *call.block;
    const layers::PassContext& context = *call.context;
    const at::Tensor& x = call.x_ND;
    const int64_t n = x.size(0);
    const auto take = [&] { return context.kept->Take({n, x.size(1)}, x.scalar_type()); };
    self.x_ = x;
    self.h1_ = take();
    self.x2_ = take();
    self.h2_ = take();
    self.norm1_saved_ = context.kept->Take({n}, layers::StatisticsType(x.scalar_type()));
    self.norm2_saved_ = context.kept->Take({n}, layers::StatisticsType(x.scalar_type()));
    self.input_norm_.Forward(x, self.h1_, self.norm1_saved_);
    call.attention->Forward(context, self.h1_, x, self.x2_);
    self.post_norm_.Forward(self.x2_, self.h2_, self.norm2_saved_);
    halves.push_back({self.feed_forward(), &context, self.h2_, self.x2_, call.y_ND});
  }
  halves.front().layer->ForwardTogether(halves);
}

void Block::Backward(std::span<const BackwardCall> calls) {
  layers::BufferPool* const scratch = calls.front().context->scratch;
  const size_t mark = scratch->Mark();
  std::vector<layers::Sublayer::BackwardCall> halves;
  for (const BackwardCall& call : calls) {
    const at::Tensor& gradient = call.gradient_ND;
    halves.push_back({call.block->feed_forward(), call.context, call.block->h2_, gradient,
                      scratch->Take({gradient.size(0), gradient.size(1)}, gradient.scalar_type())});
  }
  halves.front().layer->BackwardTogether(halves);
  for (size_t i = 0; i < calls.size(); ++i) {
    const BackwardCall& call = calls[i];
    Block& self = *call.block;
    const at::Tensor& dh = halves[i].dh_ND;
    const at::Tensor& gradient = call.gradient_ND;
    self.post_norm_.Backward(self.x2_, self.norm2_saved_, dh, gradient, gradient);
    call.attention->Backward(*call.context, self.h1_, gradient, dh);
    self.input_norm_.Backward(self.x_, self.norm1_saved_, dh, gradient, gradient);
  }
  scratch->Release(mark);
}

namespace {

// The contexts of calls, with another pass.
template <typename Call>
std::vector<layers::PassContext> With(layers::Pass pass, std::span<const Call> calls) {
  std::vector<layers::PassContext> contexts;
  for (const Call& call : calls) contexts.emplace_back(*call.context).pass = pass;
  return contexts;
}

}  // namespace

void Block::SelectiveForward(std::span<const ForwardCall> calls) {
  layers::BufferPool* const scratch = calls.front().context->scratch;
  const size_t mark = scratch->Mark();
  const std::vector<layers::PassContext> keeping = With(layers::Pass::kTrain, calls);
  const std::vector<layers::PassContext> selecting = With(layers::Pass::kSelect, calls);
  std::vector<layers::Sublayer::ForwardCall> halves;
  for (size_t i = 0; i < calls.size(); ++i) {
    Block& self = *calls[i].block;
    const at::Tensor& x = calls[i].x_ND;
    const int64_t n = x.size(0);
    const at::Tensor h = scratch->Take({n, x.size(1)}, x.scalar_type());
    const at::Tensor norm_saved = scratch->Take({n}, layers::StatisticsType(x.scalar_type()));
    self.x_ = x;
    self.x2_ = keeping[i].kept->Take({n, x.size(1)}, x.scalar_type());
    self.input_norm_.Forward(x, h, norm_saved);
    calls[i].attention->Forward(keeping[i], h, x, self.x2_);
    self.post_norm_.Forward(self.x2_, h, norm_saved);
    halves.push_back({self.feed_forward(), &selecting[i], h, self.x2_, calls[i].y_ND});
  }
  halves.front().layer->ForwardTogether(halves);
  scratch->Release(mark);
}

void Block::SelectiveBackward(std::span<const BackwardCall> calls, layers::BufferPool* redone) {
  layers::BufferPool* const scratch = calls.front().context->scratch;
  const size_t mark = scratch->Mark();
  std::vector<layers::PassContext> redoing = With(layers::Pass::kRecompute, calls);
  for (layers::PassContext& context : redoing) context.kept = redone;
  const std::vector<layers::PassContext> keeping = With(layers::Pass::kTrain, calls);
  std::vector<layers::Sublayer::ForwardCall> forwards;
  std::vector<layers::Sublayer::BackwardCall> backwards;
  std::vector<at::Tensor> norms_saved;
  for (size_t i = 0; i < calls.size(); ++i) {
    Block& self = *calls[i].block;
    const at::Tensor& gradient = calls[i].gradient_ND;
    const int64_t n = gradient.size(0);
    const auto take = [&] { return scratch->Take({n, gradient.size(1)}, gradient.scalar_type()); };
    const at::Tensor dh = take();
    const at::Tensor h = take();
    norms_saved.push_back(scratch->Take({n}, layers::StatisticsType(gradient.scalar_type())));
    self.post_norm_.Forward(self.x2_, h, norms_saved[i]);
    forwards.push_back({self.feed_forward(), &redoing[i], h, self.x2_, at::Tensor()});
    backwards.push_back({self.feed_forward(), &redoing[i], h, gradient, dh});
  }
  forwards.front().layer->ForwardTogether(forwards);
  if (calls.front().context->failed()) return scratch->Release(mark);
  backwards.front().layer->BackwardTogether(backwards);
  for (size_t i = 0; i < calls.size(); ++i) {
    Block& self = *calls[i].block;
    const at::Tensor& gradient = calls[i].gradient_ND;
    const at::Tensor& h = backwards[i].h_ND;
    const at::Tensor& dh = backwards[i].dh_ND;
    self.post_norm_.Backward(self.x2_, norms_saved[i], dh, gradient, gradient);
    self.input_norm_.Forward(self.x_, h, norms_saved[i]);
    calls[i].attention->Backward(keeping[i], h, gradient, dh);
    self.input_norm_.Backward(self.x_, norms_saved[i], dh, gradient, gradient);
  }
  scratch->Release(mark);
}

}  // namespace heddle::model
