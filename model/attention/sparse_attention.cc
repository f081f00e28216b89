#include "model/attention/sparse_attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

#include <algorithm>
#include <atomic>
#include <type_traits>
#include <utility>
#include <vector>

#include "base/status/status.h"
#include "kernels/sparse_attention/params.h"

namespace heddle::attention {
namespace {

namespace ks = kernels::sparse_attention;

// Pieces per thread, so that threads end together though a causal batch's last rows cost most.
constexpr int64_t kPiecesPerThread = 8;
// Neighbouring rows share keys in the cache; more rows than these gain nothing.
constexpr int64_t kRowsPerBlockMax = 64;
// Keys, values and their gradients of a task: 1 MiB at width 128, so that they stay in L2; fewer
// keys make rows do more passes.
constexpr int64_t kKeysPerTaskMin = 64;
constexpr int64_t kKeysPerTaskMax = 512;

// Runs body(i) for i in [0, count); a free thread takes the next i. Bodies are independent of each
// other, so neither their order nor their thread matters.
template <typename Body>
void ForEach(int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(count, at::get_num_threads());
  at::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) body(i);
  });
}

template <typename S>
const ks::Table<S>& Kernels() {
  if constexpr (std::is_same_v<S, double>) {
    return ks::DoubleKernels();
  } else {
    return ks::FloatKernels();
  }
}

// ---- Checks ------------------------------------------------------------------------------------

void CheckRows(const at::Tensor& t, const at::Tensor& like, const char* name) {
  HEDDLE_CHECK(t.device().is_cpu(), name, " is not on the CPU");
  HEDDLE_CHECK(t.dim() == 3, name, " has ", t.dim(), " dimensions");
  HEDDLE_CHECK(t.scalar_type() == like.scalar_type(), name, " has another type");
  HEDDLE_CHECK(t.numel() == 0 || ((t.size(2) == 1 || t.stride(2) == 1) &&
                                  (t.size(1) == 1 || t.stride(1) == t.size(2))),
               name, ": rows of heads must be contiguous");
}
void CheckLike(const at::Tensor& t, const at::Tensor& like, const char* name) {
  CheckRows(t, like, name);
  HEDDLE_CHECK(t.sizes() == like.sizes(), name, " has another shape");
}

// A result: of the inputs' type, or of the kernel's.
void CheckResult(const at::Tensor& t, const at::Tensor& like, const char* name) {
  CheckRows(t, t, name);
  HEDDLE_CHECK(t.sizes() == like.sizes(), name, " has another shape");
  HEDDLE_CHECK(t.scalar_type() == like.scalar_type() ||
                   t.scalar_type() == layers::StatisticsType(like.scalar_type()),
               name, " has another type");
}

at::ScalarType StatisticsType(const at::Tensor& q) {
  return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

void CheckSets(const KeySets& sets, int64_t rows, int64_t keys, int64_t kv_heads) {
  HEDDLE_CHECK(sets.set_heads == 1 || sets.set_heads == kv_heads, sets.set_heads, " set heads");
  HEDDLE_CHECK(sets.width >= 1);
  HEDDLE_CHECK(static_cast<int64_t>(sets.offsets.size()) == rows * sets.set_heads + 1,
               sets.offsets.size(), " offsets for ", rows, " rows");
  HEDDLE_CHECK(static_cast<int64_t>(sets.end.size()) == rows);
  HEDDLE_CHECK(sets.offsets.front() == 0 &&
               sets.offsets.back() == static_cast<int64_t>(sets.first.size()));
  HEDDLE_CHECK(std::is_sorted(sets.offsets.begin(), sets.offsets.end()));
  int32_t low = 0;
  int32_t high = -1;
  for (const int32_t first : sets.first) {
    low = std::min(low, first);
    high = std::max(high, first);
  }
  HEDDLE_CHECK(low >= 0 && high < keys, "keys ", low, " .. ", high, " of ", keys);
  low = high = 0;
  for (const int32_t end : sets.end) {
    low = std::min(low, end);
    high = std::max(high, end);
  }
  HEDDLE_CHECK(low >= 0 && high <= keys, "ends ", low, " .. ", high, " of ", keys);
}

void CheckDocuments(const KeyDocuments& documents, int64_t rows, int64_t keys) {
  int64_t row = 0;
  int64_t key = 0;
  for (const KeyDocuments::Rows& document : documents.rows) {
    HEDDLE_CHECK(document.queries.first_row >= row && document.queries.length >= 0);
    HEDDLE_CHECK(document.keys.first_row >= key && document.keys.length >= 0);
    row = document.queries.first_row + document.queries.length;
    key = document.keys.first_row + document.keys.length;
  }
  HEDDLE_CHECK(row <= rows && key <= keys, "documents beyond the rows");
}

// ---- Conversions -------------------------------------------------------------------------------

// `t` in the kernel's type; rows may be strided. Copies only where the type differs.
at::Tensor Operand(const at::Tensor& t, at::ScalarType type) {
  if (t.scalar_type() == type) return t;
  const at::Tensor wide = at::empty(t.sizes(), t.options().dtype(type));
  wide.copy_(t);
  return wide;
}
// The same with contiguous rows.
at::Tensor Packed(const at::Tensor& t, at::ScalarType type) {
  const at::Tensor wide = Operand(t, type);
  return wide.is_contiguous() ? wide : wide.contiguous();
}

// Contiguous memory of the kernel's type for a result: `to` itself where it fits.
class Result {
 public:
  Result(const at::Tensor& to, at::ScalarType type) : to_(to), rows_(to) {
    if (to.scalar_type() == type && to.is_contiguous()) return;
    rows_ = at::empty(to.sizes(), to.options().dtype(type));
  }
  template <typename S>
  S* data() const {
    return rows_.data_ptr<S>();
  }
  void Finish() const {
    if (!rows_.is_same(to_)) to_.copy_(rows_);
  }

 private:
  const at::Tensor& to_;
  at::Tensor rows_;
};

template <typename S>
ks::Problem<S> ProblemOf(double scale, const KeySets& sets, const at::Tensor& q,
                         const at::Tensor& k, const at::Tensor& v) {
  ks::Problem<S> p;
  p.heads = q.size(1);
  p.kv_heads = k.size(1);
  p.key_dim = q.size(2);
  p.value_dim = v.size(2);
  p.scale = scale;
  p.sets = sets.view();
  p.q = q.data_ptr<S>();
  p.k = k.data_ptr<S>();
  p.v = v.data_ptr<S>();
  p.q_stride = q.stride(0);
  p.k_stride = k.stride(0);
  p.v_stride = v.stride(0);
  return p;
}

// Size of a piece of `count` rows or keys. No result depends on it.
int64_t PieceOf(int64_t count, int64_t low, int64_t high) {
  return std::clamp(count / (kPiecesPerThread * at::get_num_threads()), low, high);
}

// Calls body(rows) for blocks of [0, rows), or of the rows of `only`, on LibTorch's threads.
template <typename Body>
void ForRowBlocks(int64_t rows, const KeyDocuments* only, const Body& body) {
  const int64_t step = PieceOf(rows, 1, kRowsPerBlockMax);
  std::vector<ks::Rows> blocks;
  const auto add = [&](int64_t begin, int64_t end) {
    for (; begin < end; begin += step) blocks.push_back({begin, std::min(end, begin + step)});
  };
  if (only == nullptr) add(0, rows);
  for (size_t b = 0; only != nullptr && b < only->rows.size(); ++b) {
    const Document& queries = only->rows[b].queries;
    add(queries.first_row, queries.first_row + queries.length);
  }
  ForEach(static_cast<int64_t>(blocks.size()),
          [&](int64_t i) { body(blocks[static_cast<size_t>(i)]); });
}

std::vector<ks::KeyTask> TasksOf(const KeyDocuments& documents, int64_t all_keys,
                                 int64_t kv_heads) {
  std::vector<ks::KeyTask> tasks;
  const int64_t step = PieceOf(all_keys * kv_heads, kKeysPerTaskMin, kKeysPerTaskMax);
  for (const auto& [queries, keys] : documents.rows) {
    const ks::Rows rows{queries.first_row, queries.first_row + queries.length};
    const int64_t last = keys.first_row + keys.length;
    // First keys first: under a causal mask they have the most rows.
    for (int64_t key = keys.first_row; key < last; key += step) {
      for (int64_t j = 0; j < kv_heads; ++j) {
        tasks.push_back({j, {key, std::min(last, key + step)}, rows});
      }
    }
  }
  return tasks;
}

template <typename S>
void Forward(double scale, const KeySets& sets, const at::Tensor& q, const at::Tensor& k,
             const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
             const KeyDocuments* only) {
  const at::ScalarType type = StatisticsType(q);
  const at::Tensor wide_q = Operand(q, type);
  const at::Tensor wide_k = Operand(k, type);
  const at::Tensor wide_v = Operand(v, type);
  const Result result(out, type);
  const ks::Forward<S> forward{ProblemOf<S>(scale, sets, wide_q, wide_k, wide_v), result.data<S>(),
                               lse.data_ptr<S>()};
  ForRowBlocks(q.size(0), only, [&](ks::Rows rows) { Kernels<S>().forward(forward, rows); });
  result.Finish();
}

struct BackwardTensors {
  const at::Tensor& q;
  const at::Tensor& k;
  const at::Tensor& v;
  const at::Tensor& out;
  const at::Tensor& lse;
  const at::Tensor& dout;
  const at::Tensor& dq;
  const at::Tensor& dk;
  const at::Tensor& dv;
};

template <typename S>
void Backward(double scale, const KeySets& sets, const KeyDocuments& documents,
              const BackwardTensors& t) {
  const at::ScalarType type = StatisticsType(t.q);
  const at::Tensor q = Operand(t.q, type);
  const at::Tensor k = Operand(t.k, type);
  const at::Tensor v = Operand(t.v, type);
  const at::Tensor out = Packed(t.out, type);
  const at::Tensor dout = Packed(t.dout, type);
  const at::Tensor delta = at::empty_like(t.lse);
  const Result dq(t.dq, type);
  const Result dk(t.dk, type);
  const Result dv(t.dv, type);
  const ks::Backward<S> backward{ProblemOf<S>(scale, sets, q, k, v),
                                 out.data_ptr<S>(),
                                 t.lse.data_ptr<S>(),
                                 dout.data_ptr<S>(),
                                 delta.data_ptr<S>(),
                                 dq.data<S>(),
                                 dk.data<S>(),
                                 dv.data<S>()};
  const ks::Table<S>& kernels = Kernels<S>();
  ForRowBlocks(q.size(0), &documents,
               [&](ks::Rows rows) { kernels.backward_queries(backward, rows); });
  dq.Finish();
  const std::vector<ks::KeyTask> tasks = TasksOf(documents, t.k.size(0), t.k.size(1));
  ForEach(static_cast<int64_t>(tasks.size()),
          [&](int64_t i) { kernels.backward_keys(backward, tasks[static_cast<size_t>(i)]); });
  dk.Finish();
  dv.Finish();
}

}  // namespace

void CheckAttention(const KeySets& sets, const at::Tensor& q, const at::Tensor& k,
                    const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse) {
  for (const auto& [t, name] : {std::pair(&q, "q"), {&k, "k"}, {&v, "v"}, {&out, "out"}}) {
    CheckRows(*t, q, name);
  }
  HEDDLE_CHECK(k.size(1) > 0 && q.size(1) % k.size(1) == 0, q.size(1), " query heads, ", k.size(1),
               " key heads");
  HEDDLE_CHECK(k.size(2) == q.size(2) && v.size(0) == k.size(0) && v.size(1) == k.size(1));
  HEDDLE_CHECK(out.size(0) == q.size(0) && out.size(1) == q.size(1) && out.size(2) == v.size(2));
  HEDDLE_CHECK(lse.scalar_type() == StatisticsType(q) && lse.is_contiguous() && lse.dim() == 2 &&
               lse.size(0) == q.size(0) && lse.size(1) == q.size(1));
  CheckSets(sets, q.size(0), k.size(0), k.size(1));
}

void CheckGradients(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& out, const at::Tensor& dout, const at::Tensor& dq,
                    const at::Tensor& dk, const at::Tensor& dv) {
  CheckLike(dout, out, "dout");
  CheckResult(dq, q, "dq");
  CheckResult(dk, k, "dk");
  CheckResult(dv, v, "dv");
}

void SparseAttention(double scale, const KeySets& sets, const at::Tensor& q, const at::Tensor& k,
                     const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse,
                     const KeyDocuments* only) {
  CheckAttention(sets, q, k, v, out, lse);
  if (only != nullptr) CheckDocuments(*only, q.size(0), k.size(0));
  if (q.scalar_type() == at::kDouble) {
    Forward<double>(scale, sets, q, k, v, out, lse, only);
  } else {
    Forward<float>(scale, sets, q, k, v, out, lse, only);
  }
}

void SparseAttentionBackward(double scale, const KeySets& sets, const KeyDocuments& documents,
                             const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& out, const at::Tensor& lse, const at::Tensor& dout,
                             const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) {
  CheckAttention(sets, q, k, v, out, lse);
  CheckGradients(q, k, v, out, dout, dq, dk, dv);
  CheckDocuments(documents, q.size(0), k.size(0));
  const BackwardTensors tensors{q, k, v, out, lse, dout, dq, dk, dv};
  if (q.scalar_type() == at::kDouble) {
    Backward<double>(scale, sets, documents, tensors);
  } else {
    Backward<float>(scale, sets, documents, tensors);
  }
}

}  // namespace heddle::attention
