#include "model/moe/routed_experts.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "model/layers/tasks.h"

namespace heddle::moe {

namespace {

// Rows that one task copies: some hundred KiB, which is worth a thread.
constexpr int64_t kRowsPerTask = 128;

// copy(i) for every row of [0, rows).
template <typename Copy>
void CopyRows(int64_t rows, const Copy& copy) {
  const int64_t tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  const auto run = [&](int64_t task, int64_t /*thread*/) {
    const int64_t end = std::min(rows, (task + 1) * kRowsPerTask);
    for (int64_t i = task * kRowsPerTask; i < end; ++i) copy(static_cast<size_t>(i));
  };
  if (tasks == 1) return run(0, 0);
  layers::RunTasks(tasks, run);
}

// The memory of a tensor [*, D] or [*], row by row; of none, rows of no bytes.
struct RowView {
  explicit RowView(const at::Tensor& t) {
    if (!t.defined()) return;
    bytes = static_cast<size_t>((t.dim() == 1 ? 1 : t.size(1)) * t.element_size());
    first = static_cast<std::byte*>(t.data_ptr());
  }
  std::byte* at(int64_t row) const { return first + static_cast<size_t>(row) * bytes; }

  std::byte* first = nullptr;
  size_t bytes = 0;
};

// Places of rows; none: row i is at i.
struct Places {
  const std::vector<int64_t>* rows = nullptr;
  int64_t operator[](size_t i) const {
    return rows == nullptr ? static_cast<int64_t>(i) : (*rows)[i];
  }
};

// A message is a row with its weight behind it, unaligned.
struct Half {
  RowView view;
  Places places;
};

void Pack(const Half& row, const Half& weight, const at::Tensor& messages) {
  const RowView to(messages);
  CopyRows(messages.size(0), [&](size_t i) {
    std::byte* message = to.at(static_cast<int64_t>(i));
    std::memcpy(message, row.view.at(row.places[i]), row.view.bytes);
    if (weight.view.bytes == 0) return;
    std::memcpy(message + row.view.bytes, weight.view.at(weight.places[i]), weight.view.bytes);
  });
}

void Unpack(const at::Tensor& messages, const Half& row, const Half& weight) {
  const RowView from(messages);
  CopyRows(messages.size(0), [&](size_t i) {
    const std::byte* message = from.at(static_cast<int64_t>(i));
    std::memcpy(row.view.at(row.places[i]), message, row.view.bytes);
    if (weight.view.bytes == 0) return;
    std::memcpy(weight.view.at(weight.places[i]), message + row.view.bytes, weight.view.bytes);
  });
}

// Room for `rows` messages of rows like `row` and weights like `weight`.
at::Tensor TakeMessages(int64_t rows, const at::Tensor& row, const at::Tensor& weight,
                        layers::BufferPool* pool) {
  const size_t bytes = RowView(row).bytes + RowView(weight).bytes;
  return pool->Take({rows, static_cast<int64_t>(bytes)}, at::kByte);
}

}  // namespace

RoutedExperts::RoutedExperts(layers::Activation activation,
                             std::vector<layers::FeedForwardTensors> experts,
                             layers::ExpertAccess access, int layer)
    : experts_(activation, experts, access.memory, layer),
      local_(static_cast<int64_t>(experts.size())),
      exchange_(access.exchange),
      layer_(layer) {}

StatusOr<std::vector<int64_t>> RoutedExperts::ExchangeCounts(
    const std::vector<int64_t>& mine) const {
  std::vector<int64_t> counts(mine.size(), 0);
  const std::vector<size_t> bytes(static_cast<size_t>(exchange_->ranks()),
                                  static_cast<size_t>(local_) * sizeof(int64_t));
  ASSIGN_OR_RETURN(
      const std::unique_ptr<layers::PendingRows> pending,
      exchange_->StartAllToAll(layer_, std::as_bytes(std::span<const int64_t>(mine)), bytes,
                               std::as_writable_bytes(std::span<int64_t>(counts)), bytes));
  RETURN_IF_ERROR(pending->Wait());
  return counts;
}

Status RoutedExperts::MakePlan(const Dispatch& dispatch, Plan* plan) const {
  const size_t ranks = static_cast<size_t>(exchange_->ranks());
  const size_t local = static_cast<size_t>(local_);
  HEDDLE_CHECK(dispatch.begin.size() == ranks * local + 1);
  std::vector<int64_t> mine(ranks * local, 0);  // rows for every expert
  plan->rows.clear();
  plan->tokens.clear();
  plan->sent.assign(ranks, 0);
  for (size_t e = 0; e < mine.size(); ++e) {
    for (int64_t row = dispatch.begin[e]; row < dispatch.begin[e + 1]; ++row) {
      if (dispatch.row_assignment[static_cast<size_t>(row)] < 0) continue;
      plan->rows.push_back(row);
      plan->tokens.push_back(dispatch.token(row));
      ++mine[e];
      ++plan->sent[e / local];
    }
  }
  ASSIGN_OR_RETURN(const std::vector<int64_t> counts, ExchangeCounts(mine));
  plan->received.assign(ranks, 0);
  std::vector<int32_t> experts;  // of the received rows
  for (size_t i = 0; i < counts.size(); ++i) {
    plan->received[i / local] += counts[i];
    experts.insert(experts.end(), static_cast<size_t>(counts[i]), static_cast<int32_t>(i % local));
  }
  BuildDispatch(experts, 1, local_, INT64_MAX, &plan->dispatch);
  plan->slots.assign(plan->dispatch.slots.begin(), plan->dispatch.slots.end());
  return OkStatus();
}

StatusOr<std::unique_ptr<layers::PendingRows>> RoutedExperts::Start(
    const at::Tensor& from, const std::vector<int64_t>& sent, const at::Tensor& to,
    const std::vector<int64_t>& received) const {
  const RowView out(from);
  const RowView in(to);
  std::vector<size_t> sent_bytes;
  std::vector<size_t> received_bytes;
  size_t leaving = 0;
  size_t coming = 0;
  for (size_t r = 0; r < sent.size(); ++r) {
    leaving += sent_bytes.emplace_back(static_cast<size_t>(sent[r]) * out.bytes);
    coming += received_bytes.emplace_back(static_cast<size_t>(received[r]) * in.bytes);
  }
  return exchange_->StartAllToAll(layer_, {out.first, leaving}, sent_bytes, {in.first, coming},
                                  received_bytes);
}

Status RoutedExperts::SendOut(const Plan& plan, const Rows& from, const Rows& to,
                              const Meanwhile& meanwhile, layers::BufferPool* scratch) const {
  const size_t mark = scratch->Mark();
  const at::Tensor out = TakeMessages(plan.sent_rows(), from.from, from.weights, scratch);
  // Rows without weights are messages already.
  const bool packed = to.weights.defined();
  const at::Tensor in =
      packed ? TakeMessages(plan.received_rows(), to.from, to.weights, scratch) : to.from;
  Pack({RowView(from.from), {&plan.tokens}}, {RowView(from.weights), {&plan.rows}}, out);
  ASSIGN_OR_RETURN(const std::unique_ptr<layers::PendingRows> pending,
                   Start(out, plan.sent, in, plan.received));
  meanwhile();
  RETURN_IF_ERROR(pending->Wait());
  if (packed) Unpack(in, {RowView(to.from), {}}, {RowView(to.weights), {&plan.slots}});
  scratch->Release(mark);
  return OkStatus();
}

Status RoutedExperts::SendBack(const Plan& plan, const Rows& computed, const Rows& out,
                               layers::BufferPool* scratch) const {
  const size_t mark = scratch->Mark();
  const at::Tensor results =
      TakeMessages(plan.received_rows(), computed.from, computed.weights, scratch);
  const at::Tensor back = TakeMessages(plan.sent_rows(), out.from, out.weights, scratch);
  Pack({RowView(computed.from), {&plan.slots}}, {RowView(computed.weights), {&plan.slots}},
       results);
  ASSIGN_OR_RETURN(const std::unique_ptr<layers::PendingRows> pending,
                   Start(results, plan.received, back, plan.sent));
  RETURN_IF_ERROR(pending->Wait());
  Unpack(back, {RowView(out.from), {&plan.rows}}, {RowView(out.weights), {&plan.rows}});
  scratch->Release(mark);
  return OkStatus();
}

Status RoutedExperts::Forward(const Dispatch& dispatch, const at::Tensor& x, const at::Tensor& y,
                              const Meanwhile& meanwhile, layers::BufferPool* kept,
                              layers::BufferPool* scratch) {
  layers::BufferPool* const pool = kept != nullptr ? kept : scratch;
  if (exchange_ == nullptr) {
    meanwhile();
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
  RETURN_IF_ERROR(SendOut(plan, {x, {}}, {received, {}}, meanwhile, scratch));
  at::Tensor computed;
  if (y.defined()) computed = scratch->Take({plan.dispatch.rows(), x.size(1)}, x.scalar_type());
  RETURN_IF_ERROR(experts_.Forward(plan.dispatch, received, pre, computed, scratch));
  if (y.defined()) RETURN_IF_ERROR(SendBack(plan, {computed, {}}, {y, {}}, scratch));
  scratch->Release(mark);
  return OkStatus();
}

Status RoutedExperts::Backward(const Dispatch& dispatch, const at::Tensor& x,
                               const at::Tensor& dout, const at::Tensor& weight,
                               const at::Tensor& dweight, const at::Tensor& dx,
                               const Meanwhile& meanwhile, layers::BufferPool* scratch) {
  if (exchange_ == nullptr) {
    meanwhile();
    return experts_.Backward(dispatch, x, dout, weight, pre_RC_, dweight, dx, scratch);
  }
  const Plan& plan = plan_;
  const size_t mark = scratch->Mark();
  const int64_t rows = plan.dispatch.rows();
  const at::Tensor received = scratch->Take({plan.received_rows(), x.size(1)}, x.scalar_type());
  const at::Tensor row_weight = scratch->Take({rows}, weight.scalar_type());
  const at::Tensor row_dweight = scratch->Take({rows}, dweight.scalar_type());
  row_weight.zero_();  // of padding
  RETURN_IF_ERROR(SendOut(plan, {dout, weight}, {received, row_weight}, meanwhile, scratch));
  const at::Tensor computed = scratch->Take({rows, x.size(1)}, x.scalar_type());
  RETURN_IF_ERROR(experts_.Backward(plan.dispatch, received_MD_, received, row_weight, pre_RC_,
                                    row_dweight, computed, scratch));
  RETURN_IF_ERROR(SendBack(plan, {computed, row_dweight}, {dx, dweight}, scratch));
  scratch->Release(mark);
  return OkStatus();
}

}  // namespace heddle::moe
