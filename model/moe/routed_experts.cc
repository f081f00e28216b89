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

StatusOr<Experts::ForwardRows> RoutedExperts::Start(const ForwardRows& rows,
                                                    layers::BufferPool* scratch) {
  const at::Tensor& x = rows.x_ND;
  layers::BufferPool* const pool = rows.kept != nullptr ? rows.kept : scratch;
  Experts::ForwardRows work = {rows.dispatch, x, {}, rows.y_RD};
  if (exchange_ == nullptr) {
    rows.meanwhile();
    work.pre_RC = pool->Take({rows.dispatch->rows(), experts_.columns()}, x.scalar_type());
    if (rows.kept != nullptr) pre_RC_ = work.pre_RC;
    return work;
  }
  Plan& plan = PlanOf(rows);
  if (rows.pass != layers::Pass::kRecompute) RETURN_IF_ERROR(MakePlan(*rows.dispatch, &plan));
  work.dispatch = &plan.dispatch;
  work.x_ND = pool->Take({plan.received_rows(), x.size(1)}, x.scalar_type());
  work.pre_RC = pool->Take({plan.dispatch.rows(), experts_.columns()}, x.scalar_type());
  if (rows.kept != nullptr) {
    received_MD_ = work.x_ND;
    pre_RC_ = work.pre_RC;
  }
  RETURN_IF_ERROR(SendOut(plan, {x, {}}, {work.x_ND, {}}, rows.meanwhile, scratch));
  if (rows.y_RD.defined()) {
    work.y_RD = scratch->Take({plan.dispatch.rows(), x.size(1)}, x.scalar_type());
  }
  return work;
}

Status RoutedExperts::Forward(std::span<const ForwardRows> batches, layers::BufferPool* scratch) {
  const size_t mark = scratch->Mark();
  std::vector<Experts::ForwardRows> work;
  for (const ForwardRows& rows : batches) {
    ASSIGN_OR_RETURN(work.emplace_back(), rows.experts->Start(rows, scratch));
  }
  RETURN_IF_ERROR(batches.front().experts->experts_.Forward(work, scratch));
  for (size_t i = 0; i < batches.size(); ++i) {
    const ForwardRows& rows = batches[i];
    RoutedExperts& self = *rows.experts;
    if (self.exchange_ == nullptr || !rows.y_RD.defined()) continue;
    RETURN_IF_ERROR(self.SendBack(self.PlanOf(rows), {work[i].y_RD, {}}, {rows.y_RD, {}}, scratch));
  }
  scratch->Release(mark);
  return OkStatus();
}

StatusOr<Experts::BackwardRows> RoutedExperts::Start(const BackwardRows& rows,
                                                     layers::BufferPool* scratch) {
  const at::Tensor& x = rows.x_ND;
  if (exchange_ == nullptr) {
    rows.meanwhile();
    return Experts::BackwardRows{rows.dispatch,  x,         rows.dout_ND, rows.weight_R, pre_RC_,
                                 rows.dweight_R, rows.dx_RD};
  }
  const int64_t count = plan_.dispatch.rows();
  Experts::BackwardRows work = {&plan_.dispatch, received_MD_, {}, {}, pre_RC_, {}, {}};
  work.dout_ND = scratch->Take({plan_.received_rows(), x.size(1)}, x.scalar_type());
  work.weight_R = scratch->Take({count}, rows.weight_R.scalar_type());
  work.dweight_R = scratch->Take({count}, rows.dweight_R.scalar_type());
  work.weight_R.zero_();  // of padding
  RETURN_IF_ERROR(SendOut(plan_, {rows.dout_ND, rows.weight_R}, {work.dout_ND, work.weight_R},
                          rows.meanwhile, scratch));
  work.dx_RD = scratch->Take({count, x.size(1)}, x.scalar_type());
  return work;
}

Status RoutedExperts::Backward(std::span<const BackwardRows> batches, layers::BufferPool* scratch) {
  const size_t mark = scratch->Mark();
  std::vector<Experts::BackwardRows> work;
  for (const BackwardRows& rows : batches) {
    ASSIGN_OR_RETURN(work.emplace_back(), rows.experts->Start(rows, scratch));
  }
  RETURN_IF_ERROR(batches.front().experts->experts_.Backward(work, scratch));
  for (size_t i = 0; i < batches.size(); ++i) {
    const RoutedExperts& self = *batches[i].experts;
    if (self.exchange_ == nullptr) continue;
    RETURN_IF_ERROR(self.SendBack(self.plan_, {work[i].dx_RD, work[i].dweight_R},
                                  {batches[i].dx_RD, batches[i].dweight_R}, scratch));
  }
  scratch->Release(mark);
  return OkStatus();
}

}  // namespace heddle::moe
