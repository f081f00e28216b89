#include "model/attention/mla_layer.h"

#include <ATen/ops/sum.h>

#include <utility>

#include "base/status/status.h"
#include "model/attention/mla_core.h"
#include "model/attention/mla_projection.h"
#include "model/attention/row_copy.h"
#include "model/layers/layers.h"

namespace heddle::attention {
namespace {

using layers::BufferPool;
using layers::PassContext;

class MlaLayer : public MlaSublayer {
 public:
  MlaLayer(MlaProjection projection, std::unique_ptr<MlaCore> core)
      : projection_(std::move(projection)), shape_(projection_.shape()), core_(std::move(core)) {}

  void Begin(const layers::Documents& documents) override { core_->Begin(documents); }
  void Forward(const PassContext& context, const at::Tensor& h, const at::Tensor& residual,
               const at::Tensor& out) override;
  void Backward(const PassContext& context, const at::Tensor& h, const at::Tensor& gradient,
                const at::Tensor& dh) override;
  MlaAttended attended() const override {
    return {heads_.q_NHK, heads_.k_NHK, heads_.v_NHE, shape_.scale, core_->selection()};
  }

 private:
  MlaInputs Inputs(const PassContext& context, const at::Tensor& h) const;
  // Keys and values of all heads from the latent and the shared rotated part.
  void ExpandHeads(const PassContext& context, BufferPool* pool);
  // The attention's output as Wo takes it, [N, H dv].
  at::Tensor CompactOutput(BufferPool* scratch) const;

  MlaProjection projection_;
  const MlaShape& shape_;
  std::unique_ptr<MlaCore> core_;

  // From a forward that keeps to its backward.
  MlaProjected projected_;
  MlaHeads heads_;
};

MlaInputs MlaLayer::Inputs(const PassContext& context, const at::Tensor& h) const {
  MlaInputs inputs;
  inputs.context = &context;
  inputs.h_ND = h;
  inputs.indexer_u_NU = shape_.query_latent > 0 ? projected_.query_latent_NQ : h;
  return inputs;
}

void MlaLayer::ExpandHeads(const PassContext& context, BufferPool* pool) {
  const int64_t n = projected_.latent_NC.size(0);
  const at::ScalarType type = projected_.latent_NC.scalar_type();
  const int64_t key_width = core_->KeyWidth(type);
  const int64_t value_width = core_->ValueWidth(type);
  heads_.k_NHK = pool->Take({n, shape_.heads, key_width}, type);
  heads_.v_NHE = pool->Take({n, shape_.heads, value_width}, type);
  heads_.out_NHE = pool->Take({n, shape_.heads, value_width}, type);
  if (key_width == shape_.key()) {
    heads_.q_NHK = projected_.q_NHK;
  } else {
    heads_.q_NHK = pool->Take({n, shape_.heads, key_width}, type);
    CopyPadded(projected_.q_NHK, heads_.q_NHK);
  }
  const size_t mark = context.scratch->Mark();
  const at::Tensor up = context.scratch->Take({n, shape_.heads, shape_.nope + shape_.value}, type);
  layers::Linear(projected_.latent_NC, projection_.weights().kv, up.view({n, shape_.kv_columns()}));
  CopyHeads(up.narrow(2, 0, shape_.nope), heads_.k_NHK.narrow(2, 0, shape_.nope));
  CopyPadded(projected_.kr_NR.unsqueeze(1).expand({n, shape_.heads, shape_.rotary}),
             heads_.k_NHK.narrow(2, shape_.nope, key_width - shape_.nope));
  CopyPadded(up.narrow(2, shape_.nope, shape_.value), heads_.v_NHE);
  context.scratch->Release(mark);
}

at::Tensor MlaLayer::CompactOutput(BufferPool* scratch) const {
  const at::Tensor& out = heads_.out_NHE;
  const int64_t n = out.size(0);
  if (out.size(2) == shape_.value) return out.view({n, shape_.value_columns()});
  const at::Tensor o = scratch->Take({n, shape_.heads, shape_.value}, out.scalar_type());
  CopyHeads(out.narrow(2, 0, shape_.value), o);
  return o.view({n, shape_.value_columns()});
}

void MlaLayer::Forward(const PassContext& context, const at::Tensor& h, const at::Tensor& residual,
                       const at::Tensor& out) {
  const bool keep = layers::Keeps(context.pass);
  const bool cache = context.cache_rows != nullptr;
  BufferPool* pool = keep ? context.kept : context.scratch;
  const size_t mark = context.scratch->Mark();
  projected_ =
      projection_.Forward(h, context.documents->positions, pool, cache ? context.kept : pool);
  if (cache) {
    context.cache_rows->latent = projected_.latent_NC;
    context.cache_rows->rotary_k = projected_.kr_NR;
  }
  ExpandHeads(context, pool);
  core_->Forward(Inputs(context, h), heads_);
  if (out.defined()) {
    layers::LinearAdd(residual, CompactOutput(context.scratch), projection_.weights().out, out);
  }
  context.scratch->Release(mark);
  if (keep) return;
  projected_ = {};
  heads_ = {};
}

void MlaLayer::Backward(const PassContext& context, const at::Tensor& h, const at::Tensor& gradient,
                        const at::Tensor& dh) {
  HEDDLE_CHECK(projected_.q_NHK.defined(), "no forward that keeps precedes");
  BufferPool* scratch = context.scratch;
  const size_t mark = scratch->Mark();
  const int64_t n = h.size(0);
  const at::ScalarType type = h.scalar_type();
  const int64_t heads = shape_.heads;

  at::Tensor dout = scratch->Take({n, heads, shape_.value}, type);
  const at::Tensor dout_columns = dout.view({n, shape_.value_columns()});
  layers::LinearInputGradient(gradient, projection_.weights().out, dout_columns);
  layers::LinearWeightGradient(gradient, CompactOutput(scratch), projection_.gradients().out);
  if (heads_.out_NHE.size(2) != shape_.value) {
    const at::Tensor padded = scratch->Take({n, heads, heads_.out_NHE.size(2)}, type);
    CopyPadded(dout, padded);
    dout = padded;
  }
  MlaHeads d;
  d.q_NHK = scratch->Take({n, heads, heads_.q_NHK.size(2)}, type);
  d.k_NHK = scratch->Take({n, heads, heads_.k_NHK.size(2)}, type);
  d.v_NHE = scratch->Take({n, heads, heads_.v_NHE.size(2)}, type);
  d.out_NHE = dout;
  core_->Backward(Inputs(context, h), heads_, d);

  MlaProjection::Gradients down;
  down.dq_NHK = d.q_NHK;
  if (d.q_NHK.size(2) != shape_.key()) {
    down.dq_NHK = scratch->Take({n, heads, shape_.key()}, type);
    CopyHeads(d.q_NHK.narrow(2, 0, shape_.key()), down.dq_NHK);
  }
  const at::Tensor dup = scratch->Take({n, heads, shape_.nope + shape_.value}, type);
  CopyHeads(d.k_NHK.narrow(2, 0, shape_.nope), dup.narrow(2, 0, shape_.nope));
  CopyHeads(d.v_NHE.narrow(2, 0, shape_.value), dup.narrow(2, shape_.nope, shape_.value));
  const at::Tensor dup_columns = dup.view({n, shape_.kv_columns()});
  down.dlatent_NC = scratch->Take({n, shape_.latent}, type);
  layers::LinearWeightGradient(dup_columns, projected_.latent_NC, projection_.gradients().kv);
  layers::LinearInputGradient(dup_columns, projection_.weights().kv, down.dlatent_NC);
  // One rotated key part serves all heads: its gradient is their sum.
  down.dkr_NR = scratch->Take({n, shape_.rotary}, type);
  at::sum_out(down.dkr_NR, d.k_NHK.narrow(2, shape_.nope, shape_.rotary), {1});
  projection_.Backward(projected_, h, context.documents->positions, down, scratch, dh);
  scratch->Release(mark);
}

}  // namespace

std::unique_ptr<MlaSublayer> MakeMlaLayer(MlaProjection projection, std::unique_ptr<MlaCore> core) {
  return std::make_unique<MlaLayer>(std::move(projection), std::move(core));
}

std::unique_ptr<MlaSublayer> MakeMla(const heddle::v1::ModelConfig& config,
                                     const layers::LayerStorage& storage, layers::RopeSet* ropes) {
  MlaProjection projection(config, storage, ropes);
  const MlaShape shape = projection.shape();
  return MakeMlaLayer(std::move(projection), MakeDenseMlaCore(shape));
}

}  // namespace heddle::attention
