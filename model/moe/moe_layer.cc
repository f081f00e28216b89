#include "model/moe/moe_layer.h"

#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"
#include "model/layers/feed_forward.h"
#include "model/layers/kernel_edge.h"
#include "model/moe/dispatch.h"
#include "model/moe/experts.h"
#include "model/moe/routed_experts.h"
#include "model/moe/router.h"

namespace heddle::moe {
namespace {

namespace pw = kernels::pointwise;

constexpr char kBiasName[] = "mlp.gate.e_score_correction_bias";

// This rank's.
std::vector<layers::FeedForwardTensors> ViewExperts(layers::Activation activation,
                                                    const layers::LayerStorage& storage) {
  const model::ExpertRange& range = storage.plan->experts;
  std::vector<layers::FeedForwardTensors> views;
  for (int64_t e = range.first; e < range.first + range.count; ++e) {
    views.push_back(ViewFeedForward(activation, storage, Str("mlp.experts.", e, ".")));
  }
  return views;
}

class MoeLayerImpl : public MoeLayer {
 public:
  MoeLayerImpl(const heddle::v1::ModelConfig& config, const layers::LayerStorage& storage);

  void Forward(const layers::PassContext& context, const at::Tensor& h, const at::Tensor& residual,
               const at::Tensor& out) override {
    const ForwardCall call = {this, &context, h, residual, out};
    ForwardAll({&call, 1});
  }
  void Backward(const layers::PassContext& context, const at::Tensor& h, const at::Tensor& gradient,
                const at::Tensor& dh) override {
    const BackwardCall call = {this, &context, h, gradient, dh};
    BackwardAll({&call, 1});
  }
  // Together they need memory for all, which buys fewer visits of experts that come and go.
  void ForwardTogether(std::span<const ForwardCall> calls) override {
    if (experts_.has_memory()) return ForwardAll(calls);
    Sublayer::ForwardTogether(calls);
  }
  void BackwardTogether(std::span<const BackwardCall> calls) override {
    if (experts_.has_memory()) return BackwardAll(calls);
    Sublayer::BackwardTogether(calls);
  }
  std::span<double> statistics() override { return loads_; }
  void UpdateBuffers() override;
  const MoeCounters& counters() const override { return counters_; }

 private:
  struct Routing {
    std::vector<int32_t> experts;  // [N, K]
    Dispatch dispatch;
  };

  struct Values {
    at::Tensor logits_NE;
    at::Tensor weights_NK;
    at::Tensor shared_pre_NC;
  };

  // A micro-batch's forward on its way.
  struct Routed {
    Routing* routing = nullptr;
    Values values;
    at::Tensor y_RD;
    at::Tensor shared_ND;
  };
  static void ForwardAll(std::span<const ForwardCall> calls);
  static void BackwardAll(std::span<const BackwardCall> calls);
  Routed RouteRows(const ForwardCall& call);
  RoutedExperts::ForwardRows RowsOf(const ForwardCall& call, const Routed& routed);
  // dL/dx of the rows, of the shared expert's input, and of the weights of the rows.
  struct RowGradients {
    at::Tensor dx_RD;
    at::Tensor shared_dx_ND;
    at::Tensor dweight_R;
  };
  RowGradients TakeGradients(const BackwardCall& call) const;
  RoutedExperts::BackwardRows RowsOf(const BackwardCall& call, const RowGradients& gradients);
  void FinishBackward(const BackwardCall& call, const RowGradients& gradients);
  // What is computed after it has no meaning.
  static void Fail(const layers::PassContext& context, const Status& status, size_t mark);
  void Score(const layers::PassContext& context, const at::Tensor& h, const at::Tensor& logits);
  void Route(const layers::PassContext& context, const at::Tensor& logits, Routing* routing);
  // out = residual + shared + sum of the weighted rows y of the token.
  void Combine(const Dispatch& dispatch, const at::Tensor& weights_NK, const at::Tensor& y_RD,
               const at::Tensor& shared_ND, const at::Tensor& residual_ND,
               const at::Tensor& out_ND) const;
  // weights [N, K] of the tokens as weights of the rows, 0 for padding.
  at::Tensor RowWeights(layers::BufferPool* scratch) const;
  // dL/dweights [N, K] from those of the rows, 0 where dropped.
  at::Tensor TokenGradients(const at::Tensor& drow, layers::BufferPool* scratch) const;

  const at::ScalarType type_;
  const int layer_;
  const double capacity_factor_;
  const double bias_update_rate_;
  const bool bias_center_;
  float* const bias_;
  const Router router_;
  RoutedExperts experts_;
  const std::optional<Experts> shared_;
  std::vector<double> loads_;
  MoeCounters counters_;

  Routing routing_;            // of the last forward of training
  Routing inference_routing_;  // apart, so that an evaluation disturbs no training pass
  Values kept_;                // of the last forward that keeps
};

MoeLayerImpl::MoeLayerImpl(const heddle::v1::ModelConfig& config,
                           const layers::LayerStorage& storage)
    : type_(storage.type),
      layer_(storage.layer),
      capacity_factor_(config.moe().capacity_factor()),
      bias_update_rate_(config.moe().bias_update_rate()),
      bias_center_(config.moe().bias_center()),
      bias_(storage.Buffer(kBiasName)),
      router_(RouterOptionsOf(config.moe()), storage.Weight("mlp.gate.weight"),
              storage.Gradient("mlp.gate.weight"), bias_),
      experts_(layers::ActivationOf(config), ViewExperts(layers::ActivationOf(config), storage),
               storage.experts, storage.layer),
      shared_(config.moe().n_shared() == 0
                  ? std::nullopt
                  : std::optional<Experts>(
                        std::in_place, layers::ActivationOf(config),
                        std::vector{ViewFeedForward(layers::ActivationOf(config), storage,
                                                    "mlp.shared_experts.")})) {
  if (bias_ != nullptr) loads_.assign(static_cast<size_t>(config.moe().n_experts()), 0.0);
}

void MoeLayerImpl::Score(const layers::PassContext& context, const at::Tensor& h,
                         const at::Tensor& logits) {
  if (context.pass == layers::Pass::kInference || context.step == nullptr) {
    router_.Logits(h, nullptr, logits);
    return;
  }
  const NoiseKey noise{context.step->seed, context.step->step, layer_, context.step->first_token};
  router_.Logits(h, &noise, logits);
}

void MoeLayerImpl::Route(const layers::PassContext& context, const at::Tensor& logits,
                         Routing* routing) {
  const RouterOptions& o = router_.options();
  const int64_t first_token = context.step == nullptr ? 0 : context.step->first_token;
  const int64_t nan_tokens = router_.Select(logits, first_token, &routing->experts);
  const bool inference = context.pass == layers::Pass::kInference;
  const int64_t capacity =
      Capacity(inference ? 0.0 : capacity_factor_, logits.size(0), o.top_k, o.experts);
  BuildDispatch(routing->experts, o.top_k, o.experts, capacity, &routing->dispatch);
  if (!Counts(context.pass)) return;
  const Dispatch& dispatch = routing->dispatch;
  for (size_t e = 0; e < loads_.size(); ++e) loads_[e] += static_cast<double>(dispatch.counts[e]);
  counters_.assignments += static_cast<int64_t>(routing->experts.size());
  counters_.dropped += dispatch.dropped;
  counters_.nan_tokens += nan_tokens;
  if (context.counts != nullptr) context.counts->dropped += dispatch.dropped;
}

Router::Routed RoutedOf(const layers::PassContext& context, const at::Tensor& logits,
                        const std::vector<int32_t>& experts, const at::Tensor& weights) {
  return {logits, experts, weights, context.documents,
          context.step == nullptr ? 0.0 : context.step->row_scale};
}

void MoeLayerImpl::Fail(const layers::PassContext& context, const Status& status, size_t mark) {
  context.scratch->Release(mark);
  HEDDLE_CHECK(context.failure != nullptr, "experts elsewhere need a place for their failures");
  if (context.failure->ok()) *context.failure = status;
}

MoeLayerImpl::Routed MoeLayerImpl::RouteRows(const ForwardCall& call) {
  const layers::PassContext& context = *call.context;
  const at::Tensor& h = call.h_ND;
  const int64_t n = h.size(0);
  const RouterOptions& o = router_.options();
  const at::ScalarType statistics = layers::StatisticsType(type_);
  layers::BufferPool* pool = Keeps(context.pass) ? context.kept : context.scratch;
  Routed routed;
  routed.routing = context.pass == layers::Pass::kInference ? &inference_routing_ : &routing_;
  Routing& routing = *routed.routing;
  Values& v = routed.values;
  v.logits_NE = pool->Take({n, o.experts}, statistics);
  v.weights_NK = pool->Take({n, o.top_k}, statistics);
  Score(context, h, v.logits_NE);
  if (context.pass == layers::Pass::kRecompute) {
    HEDDLE_CHECK(static_cast<int64_t>(routing.experts.size()) == n * o.top_k,
                 "recomputation follows a kSelect forward of the same rows");
  } else {
    Route(context, v.logits_NE, &routing);
  }
  router_.Weigh(v.logits_NE, routing.experts, v.weights_NK);
  if (Counts(context.pass) && context.losses != nullptr) {
    router_.AddLosses(RoutedOf(context, v.logits_NE, routing.experts, v.weights_NK),
                      context.losses);
  }
  const bool wanted = call.out_ND.defined();
  if (wanted) routed.y_RD = context.scratch->Take({routing.dispatch.rows(), h.size(1)}, type_);
  if (shared_.has_value()) {
    v.shared_pre_NC = pool->Take({n, shared_->columns()}, type_);
    if (wanted) routed.shared_ND = context.scratch->Take({n, h.size(1)}, type_);
  }
  return routed;
}

RoutedExperts::ForwardRows MoeLayerImpl::RowsOf(const ForwardCall& call, const Routed& routed) {
  RoutedExperts::ForwardRows rows;
  rows.experts = &experts_;
  rows.dispatch = &routed.routing->dispatch;
  rows.x_ND = call.h_ND;
  rows.y_RD = routed.y_RD;
  rows.pass = call.context->pass;
  rows.kept = Keeps(rows.pass) ? call.context->kept : nullptr;
  rows.meanwhile = [this, &call, &routed] {
    if (!shared_.has_value()) return;
    const Dispatch all = AllRows(call.h_ND.size(0));
    const Experts::ForwardRows own = {&all, call.h_ND, routed.values.shared_pre_NC,
                                      routed.shared_ND};
    const Status done = shared_->Forward({&own, 1}, call.context->scratch);
    HEDDLE_CHECK(done.ok());  // its memory is always there
  };
  return rows;
}

void MoeLayerImpl::ForwardAll(std::span<const ForwardCall> calls) {
  layers::BufferPool* const scratch = calls.front().context->scratch;
  const size_t mark = scratch->Mark();
  std::vector<Routed> routed;
  for (const ForwardCall& call : calls) {
    routed.push_back(static_cast<MoeLayerImpl*>(call.layer)->RouteRows(call));
  }
  std::vector<RoutedExperts::ForwardRows> rows;
  for (size_t i = 0; i < calls.size(); ++i) {
    rows.push_back(static_cast<MoeLayerImpl*>(calls[i].layer)->RowsOf(calls[i], routed[i]));
  }
  const Status computed = RoutedExperts::Forward(rows, scratch);
  if (!computed.ok()) return Fail(*calls.front().context, computed, mark);
  for (size_t i = 0; i < calls.size(); ++i) {
    const ForwardCall& call = calls[i];
    MoeLayerImpl& self = *static_cast<MoeLayerImpl*>(call.layer);
    if (call.out_ND.defined()) {
      self.Combine(routed[i].routing->dispatch, routed[i].values.weights_NK, routed[i].y_RD,
                   routed[i].shared_ND, call.residual_ND, call.out_ND);
    }
    if (Keeps(call.context->pass)) self.kept_ = routed[i].values;
  }
  scratch->Release(mark);
}

void MoeLayerImpl::Combine(const Dispatch& dispatch, const at::Tensor& weights, const at::Tensor& y,
                           const at::Tensor& shared, const at::Tensor& residual,
                           const at::Tensor& out) const {
  layers::CheckMatrix(out, weights.size(0), y.size(1), type_);
  layers::CheckMatrix(residual, weights.size(0), y.size(1), type_);
  pw::CombineRows p;
  p.width = y.size(1);
  p.per_row = weights.size(1);
  p.parts = y.data_ptr();
  p.slots = dispatch.slots.data();
  p.weights = weights.data_ptr();
  p.residual = residual.data_ptr();
  p.shared = shared.defined() ? shared.data_ptr() : nullptr;
  p.out = out.data_ptr();
  const pw::Table& kernels = pw::Kernels(layers::ElementOf(out));
  layers::ForRows(out.size(0), [&](pw::RowRange range) { kernels.combine_rows(p, range); });
}

at::Tensor MoeLayerImpl::RowWeights(layers::BufferPool* scratch) const {
  const Dispatch& dispatch = routing_.dispatch;
  at::Tensor rows = scratch->Take({dispatch.rows()}, kept_.weights_NK.scalar_type());
  const auto fill = [&](auto* to, const auto* from) {
    for (size_t row = 0; row < dispatch.row_assignment.size(); ++row) {
      const int32_t a = dispatch.row_assignment[row];
      to[row] = a < 0 ? 0 : from[a];
    }
  };
  if (rows.scalar_type() == at::kDouble) {
    fill(rows.data_ptr<double>(), kept_.weights_NK.data_ptr<double>());
  } else {
    fill(rows.data_ptr<float>(), kept_.weights_NK.data_ptr<float>());
  }
  return rows;
}

at::Tensor MoeLayerImpl::TokenGradients(const at::Tensor& drow, layers::BufferPool* scratch) const {
  const Dispatch& dispatch = routing_.dispatch;
  at::Tensor tokens =
      scratch->Take({kept_.weights_NK.size(0), kept_.weights_NK.size(1)}, drow.scalar_type());
  const auto fill = [&](auto* to, const auto* from) {
    for (size_t a = 0; a < dispatch.slots.size(); ++a) {
      to[a] = dispatch.slots[a] < 0 ? 0 : from[dispatch.slots[a]];
    }
  };
  if (drow.scalar_type() == at::kDouble) {
    fill(tokens.data_ptr<double>(), drow.data_ptr<double>());
  } else {
    fill(tokens.data_ptr<float>(), drow.data_ptr<float>());
  }
  return tokens;
}

// The wide ones first, as in the forward: the pool's buffers have the size of their largest use.
MoeLayerImpl::RowGradients MoeLayerImpl::TakeGradients(const BackwardCall& call) const {
  const int64_t n = call.h_ND.size(0);
  HEDDLE_CHECK(kept_.logits_NE.defined() && kept_.logits_NE.size(0) == n,
               "a backward follows a forward that keeps");
  layers::CheckMatrix(call.gradient_ND, n, call.h_ND.size(1), type_);
  layers::CheckMatrix(call.dh_ND, n, call.h_ND.size(1), type_);
  layers::BufferPool* const scratch = call.context->scratch;
  RowGradients taken;
  taken.dx_RD = scratch->Take({routing_.dispatch.rows(), call.h_ND.size(1)}, type_);
  if (shared_.has_value()) taken.shared_dx_ND = scratch->Take({n, call.h_ND.size(1)}, type_);
  return taken;
}

RoutedExperts::BackwardRows MoeLayerImpl::RowsOf(const BackwardCall& call,
                                                 const RowGradients& gradients) {
  RoutedExperts::BackwardRows rows;
  rows.experts = &experts_;
  rows.dispatch = &routing_.dispatch;
  rows.x_ND = call.h_ND;
  rows.dout_ND = call.gradient_ND;
  rows.weight_R = RowWeights(call.context->scratch);
  rows.dweight_R = gradients.dweight_R;
  rows.dx_RD = gradients.dx_RD;
  rows.meanwhile = [this, &call, &gradients] {
    if (!shared_.has_value()) return;
    const Dispatch all = AllRows(call.h_ND.size(0));
    const Experts::BackwardRows own = {
        &all, call.h_ND, call.gradient_ND, {}, kept_.shared_pre_NC, {}, gradients.shared_dx_ND};
    const Status done = shared_->Backward({&own, 1}, call.context->scratch);
    HEDDLE_CHECK(done.ok());
  };
  return rows;
}

void MoeLayerImpl::BackwardAll(std::span<const BackwardCall> calls) {
  layers::BufferPool* const scratch = calls.front().context->scratch;
  const size_t mark = scratch->Mark();
  std::vector<RowGradients> gradients;
  for (const BackwardCall& call : calls) {
    gradients.push_back(static_cast<MoeLayerImpl*>(call.layer)->TakeGradients(call));
  }
  std::vector<RoutedExperts::BackwardRows> rows;
  for (size_t i = 0; i < calls.size(); ++i) {
    MoeLayerImpl& self = *static_cast<MoeLayerImpl*>(calls[i].layer);
    gradients[i].dweight_R =
        scratch->Take({self.routing_.dispatch.rows()}, layers::StatisticsType(self.type_));
    rows.push_back(self.RowsOf(calls[i], gradients[i]));
  }
  const Status computed = RoutedExperts::Backward(rows, scratch);
  if (!computed.ok()) return Fail(*calls.front().context, computed, mark);
  for (size_t i = 0; i < calls.size(); ++i) {
    static_cast<MoeLayerImpl*>(calls[i].layer)->FinishBackward(calls[i], gradients[i]);
  }
  scratch->Release(mark);
}

void MoeLayerImpl::FinishBackward(const BackwardCall& call, const RowGradients& gradients) {
  layers::BufferPool* const scratch = call.context->scratch;
  const RouterOptions& o = router_.options();
  const int64_t n = call.h_ND.size(0);
  const size_t mark = scratch->Mark();
  const at::Tensor dlogits = scratch->Take({n, o.experts}, layers::StatisticsType(type_));
  router_.LogitsGradient(
      RoutedOf(*call.context, kept_.logits_NE, routing_.experts, kept_.weights_NK),
      TokenGradients(gradients.dweight_R, scratch), dlogits);
  router_.WeightGradient(dlogits, call.h_ND);

  pw::CombineRows p;
  p.width = call.h_ND.size(1);
  p.per_row = o.top_k;
  p.parts = gradients.dx_RD.data_ptr();
  p.slots = routing_.dispatch.slots.data();
  p.shared = shared_.has_value() ? gradients.shared_dx_ND.data_ptr() : nullptr;
  p.experts = o.experts;
  p.dlogits = dlogits.data_ptr();
  p.router = router_.weight().data_ptr();
  p.out = call.dh_ND.data_ptr();
  const pw::Table& kernels = pw::Kernels(layers::ElementOf(call.h_ND));
  layers::ForRows(n, [&](pw::RowRange range) { kernels.combine_rows(p, range); });
  scratch->Release(mark);
}

void MoeLayerImpl::UpdateBuffers() {
  if (bias_ == nullptr || bias_update_rate_ == 0.0) return;
  double total = 0;
  for (const double load : loads_) total += load;
  const double experts = static_cast<double>(loads_.size());
  std::vector<double> signs;
  double mean = 0;
  for (const double load : loads_) {
    // mean > load without a division: loads are whole numbers, so the comparison is exact.
    const double above = total - experts * load;
    signs.push_back(above > 0 ? 1.0 : (above < 0 ? -1.0 : 0.0));
    mean += signs.back() / experts;
  }
  for (size_t e = 0; e < signs.size(); ++e) {
    const double delta = bias_update_rate_ * (signs[e] - (bias_center_ ? mean : 0.0));
    bias_[e] = static_cast<float>(static_cast<double>(bias_[e]) + delta);
  }
}

}  // namespace

std::unique_ptr<MoeLayer> MakeMoe(const heddle::v1::ModelConfig& config,
                                  const layers::LayerStorage& storage) {
  return std::make_unique<MoeLayerImpl>(config, storage);
}

}  // namespace heddle::moe
