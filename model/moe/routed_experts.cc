#include "model/moe/routed_experts.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace heddle::moe {

namespace {

size_t RowBytes(const at::Tensor& t) {
  return t.size(0) == 0 ? 0 : static_cast<size_t>(t.stride(0) * t.element_size());
}

const std::byte* Row(const at::Tensor& t, int64_t row) {
  return static_cast<const std::byte*>(t.data_ptr()) + static_cast<size_t>(row) * RowBytes(t);
}
std::byte* Row(at::Tensor& t, int64_t row) {
  return static_cast<std::byte*>(t.data_ptr()) + static_cast<size_t>(row) * RowBytes(t);
}

// to[i] = from[rows[i]].
void Gather(const at::Tensor& from, const std::vector<int64_t>& rows, at::Tensor to) {
  for (size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(Row(to, static_cast<int64_t>(i)), Row(from, rows[i]), RowBytes(to));
  }
}
// to[rows[i]] = from[i].
void Scatter(const at::Tensor& from, const std::vector<int64_t>& rows, at::Tensor to) {
  for (size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(Row(to, rows[i]), Row(from, static_cast<int64_t>(i)), RowBytes(from));
  }
}

// [rows] or [rows, width of `like`], of its type.
at::Tensor TakeLike(const at::Tensor& like, int64_t rows, layers::BufferPool* pool) {
  return like.dim() == 1 ? pool->Take({rows}, like.scalar_type())
                         : pool->Take({rows, like.size(1)}, like.scalar_type());
}

std::vector<int64_t> Slots(const Dispatch& dispatch) {
  return {dispatch.slots.begin(), dispatch.slots.end()};
}

}  // namespace

RoutedExperts::RoutedExperts(layers::Activation activation,
                             std::vector<layers::FeedForwardTensors> experts,
                             layers::ExpertAccess access, int layer)
    : experts_(activation, experts, access.memory, layer),
      local_(static_cast<int64_t>(experts.size())),
      exchange_(access.exchange),
      layer_(layer) {}

Status RoutedExperts::MakePlan(const Dispatch& dispatch, Plan* plan) const {
  const size_t ranks = static_cast<size_t>(exchange_->ranks());
  const size_t local = static_cast<size_t>(local_);
  HEDDLE_CHECK(dispatch.begin.size() == ranks * local + 1);
  std::vector<int64_t> mine(ranks * local, 0);  // rows for every expert
  plan->rows.clear();
  plan->sent.assign(ranks, 0);
  for (size_t e = 0; e < mine.size(); ++e) {
    for (int64_t row = dispatch.begin[e]; row < dispatch.begin[e + 1]; ++row) {
      if (dispatch.row_assignment[static_cast<size_t>(row)] < 0) continue;
      plan->rows.push_back(row);
      ++mine[e];
      ++plan->sent[e / local];
    }
  }
  std::vector<int64_t> counts(ranks * local, 0);  // [rank][local expert] rows of every rank
  const std::vector<size_t> bytes(ranks, local * sizeof(int64_t));
  RETURN_IF_ERROR(exchange_->AllToAll(layer_, std::as_bytes(std::span<const int64_t>(mine)), bytes,
                                      std::as_writable_bytes(std::span<int64_t>(counts)), bytes));
  plan->received.assign(ranks, 0);
  std::vector<int32_t> experts;  // of the received rows
  for (size_t i = 0; i < counts.size(); ++i) {
    plan->received[i / local] += counts[i];
    experts.insert(experts.end(), static_cast<size_t>(counts[i]), static_cast<int32_t>(i % local));
  }
  BuildDispatch(experts, 1, local_, INT64_MAX, &plan->dispatch);
  return OkStatus();
}

Status RoutedExperts::Exchange(const at::Tensor& from, const std::vector<int64_t>& sent,
                               const at::Tensor& to, const std::vector<int64_t>& received) const {
  const auto row = static_cast<size_t>((from.dim() == 1 ? 1 : from.size(1)) * from.element_size());
  std::vector<size_t> sent_bytes;
  std::vector<size_t> received_bytes;
  size_t out = 0;
  size_t in = 0;
  for (size_t r = 0; r < sent.size(); ++r) {
    out += sent_bytes.emplace_back(static_cast<size_t>(sent[r]) * row);
    in += received_bytes.emplace_back(static_cast<size_t>(received[r]) * row);
  }
  return exchange_->AllToAll(layer_, {static_cast<const std::byte*>(from.data_ptr()), out},
                             sent_bytes, {static_cast<std::byte*>(to.data_ptr()), in},
                             received_bytes);
}

Status RoutedExperts::Return(const Plan& plan, const at::Tensor& computed, const at::Tensor& out,
                             layers::BufferPool* scratch) const {
  const size_t mark = scratch->Mark();
  const at::Tensor ordered = TakeLike(computed, plan.received_rows(), scratch);
  Gather(computed, Slots(plan.dispatch), ordered);
  const at::Tensor back = TakeLike(computed, static_cast<int64_t>(plan.rows.size()), scratch);
  const Status exchanged = Exchange(ordered, plan.received, back, plan.sent);
  if (exchanged.ok()) Scatter(back, plan.rows, out);
  scratch->Release(mark);
  return exchanged;
}

Status RoutedExperts::Forward(const Dispatch& dispatch, const at::Tensor& x, const at::Tensor& y,
                              layers::BufferPool* kept, layers::BufferPool* scratch) {
  layers::BufferPool* const pool = kept != nullptr ? kept : scratch;
  if (exchange_ == nullptr) {
    const at::Tensor pre = pool->Take({dispatch.rows(), experts_.columns()}, x.scalar_type());
    if (kept != nullptr) pre_RC_ = pre;
    return experts_.Forward(dispatch, x, pre, y, scratch);
  }
  Plan& plan = kept != nullptr ? plan_ : inference_plan_;
  RETURN_IF_ERROR(MakePlan(dispatch, &plan));
  const at::Tensor received = pool->Take({plan.received_rows(), x.size(1)}, x.scalar_type());
  const at::Tensor pre = pool->Take({plan.dispatch.rows(), experts_.columns()}, x.scalar_type());
  if (kept != nullptr) {
    received_MD_ = received;
    pre_RC_ = pre;
  }
  const size_t mark = scratch->Mark();
  std::vector<int64_t> tokens;
  for (const int64_t row : plan.rows) tokens.push_back(dispatch.token(row));
  const at::Tensor out =
      scratch->Take({static_cast<int64_t>(tokens.size()), x.size(1)}, x.scalar_type());
  Gather(x, tokens, out);
  RETURN_IF_ERROR(Exchange(out, plan.sent, received, plan.received));
  at::Tensor computed;
  if (y.defined()) computed = scratch->Take({plan.dispatch.rows(), x.size(1)}, x.scalar_type());
  RETURN_IF_ERROR(experts_.Forward(plan.dispatch, received, pre, computed, scratch));
  if (y.defined()) RETURN_IF_ERROR(Return(plan, computed, y, scratch));
  scratch->Release(mark);
  return OkStatus();
}

StatusOr<at::Tensor> RoutedExperts::Backward(const Dispatch& dispatch, const at::Tensor& x,
                                             const at::Tensor& dout, const at::Tensor& weight,
                                             const at::Tensor& dweight,
                                             layers::BufferPool* scratch) {
  if (exchange_ == nullptr) {
    return experts_.Backward(dispatch, x, dout, weight, pre_RC_, dweight, scratch);
  }
  const Plan& plan = plan_;
  const at::Tensor dx = scratch->Take({dispatch.rows(), x.size(1)}, x.scalar_type());
  const size_t mark = scratch->Mark();
  const auto sent_rows = static_cast<int64_t>(plan.rows.size());
  std::vector<int64_t> tokens;
  for (const int64_t row : plan.rows) tokens.push_back(dispatch.token(row));
  const at::Tensor out = scratch->Take({sent_rows, x.size(1)}, x.scalar_type());
  Gather(dout, tokens, out);
  const at::Tensor received = scratch->Take({plan.received_rows(), x.size(1)}, x.scalar_type());
  RETURN_IF_ERROR(Exchange(out, plan.sent, received, plan.received));
  const at::Tensor out_weight = TakeLike(weight, sent_rows, scratch);
  Gather(weight, plan.rows, out_weight);
  const at::Tensor received_weight = TakeLike(weight, plan.received_rows(), scratch);
  RETURN_IF_ERROR(Exchange(out_weight, plan.sent, received_weight, plan.received));
  const at::Tensor row_weight = TakeLike(weight, plan.dispatch.rows(), scratch);
  row_weight.zero_();
  Scatter(received_weight, Slots(plan.dispatch), row_weight);
  const at::Tensor row_dweight = TakeLike(dweight, plan.dispatch.rows(), scratch);
  ASSIGN_OR_RETURN(const at::Tensor computed,
                   experts_.Backward(plan.dispatch, received_MD_, received, row_weight, pre_RC_,
                                     row_dweight, scratch));
  RETURN_IF_ERROR(Return(plan, computed, dx, scratch));
  RETURN_IF_ERROR(Return(plan, row_dweight, dweight, scratch));
  scratch->Release(mark);
  return dx;
}

}  // namespace heddle::moe
