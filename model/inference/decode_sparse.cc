#include "model/inference/decode_sparse.h"

#include <ATen/Parallel.h>

#include <limits>
#include <type_traits>

#include "base/status/status.h"
#include "kernels/sparse_attention/params.h"

namespace heddle::inference {
namespace {

namespace ks = kernels::sparse_attention;

template <typename S>
const ks::Table<S>& Kernels() {
  if constexpr (std::is_same_v<S, double>) {
    return ks::DoubleKernels();
  } else {
    return ks::FloatKernels();
  }
}

// Task (b, j): the heads of key head j of query b, as a problem of one query and one key head.
template <typename S>
void AttendTask(double scale, const attention::KeySets& sets, const ks::Forward<S>& whole,
                int64_t b, int64_t j) {
  const ks::Problem<S>& all = whole.problem;
  const int64_t group = all.heads / all.kv_heads;
  const int64_t head = b * all.heads + j * group;
  const int64_t set = b * sets.set_heads + (sets.set_heads == 1 ? 0 : j);
  ks::Forward<S> task = whole;
  ks::Problem<S>& p = task.problem;
  p.heads = group;
  p.kv_heads = 1;
  p.scale = scale;
  p.sets = {1, sets.offsets.data() + set, sets.first.data(), sets.end.data() + b, sets.width};
  p.q = all.q + head * all.key_dim;
  p.k = all.k + j * all.key_dim;
  p.v = all.v + j * all.value_dim;
  task.out = whole.out + head * all.value_dim;
  task.lse = whole.lse + head;
  Kernels<S>().forward(task, {0, 1});
}

template <typename S>
void Attend(double scale, const attention::KeySets& sets, const at::Tensor& q, const at::Tensor& k,
            const at::Tensor& v, const at::Tensor& out, const at::Tensor& lse) {
  ks::Forward<S> whole;
  ks::Problem<S>& p = whole.problem;
  p.heads = q.size(1);
  p.kv_heads = k.size(1);
  p.key_dim = k.size(2);
  p.value_dim = v.size(2);
  p.q = q.const_data_ptr<S>();
  p.k = k.const_data_ptr<S>();
  p.v = v.const_data_ptr<S>();
  p.q_stride = q.stride(0);
  p.k_stride = p.kv_heads * p.key_dim;
  p.v_stride = p.kv_heads * p.value_dim;
  whole.out = out.data_ptr<S>();
  whole.lse = lse.data_ptr<S>();
  at::parallel_for(0, q.size(0) * p.kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      AttendTask(scale, sets, whole, i / p.kv_heads, i % p.kv_heads);
    }
  });
}

}  // namespace

GatheredRows Gather(std::span<const RowsOf> rows, at::ScalarType type, layers::BufferPool* pool) {
  HEDDLE_CHECK(!rows.empty());
  GatheredRows gathered;
  int64_t total = 0;
  for (const RowsOf& one : rows) {
    gathered.first.push_back(static_cast<int32_t>(total));
    total += one.count();
  }
  HEDDLE_CHECK(total <= std::numeric_limits<int32_t>::max());
  gathered.first.push_back(static_cast<int32_t>(total));
  const KvCacheShape& shape = rows.front().cache->shape();
  gathered.k_MJD = pool->Take({total, shape.kv_heads, shape.key_dim}, type);
  gathered.v_MJE = pool->Take({total, shape.kv_heads, shape.value_dim}, type);
  for (size_t b = 0; b < rows.size(); ++b) {
    const at::Tensor k = gathered.k_MJD.narrow(0, gathered.first[b], rows[b].count());
    const at::Tensor v = gathered.v_MJE.narrow(0, gathered.first[b], rows[b].count());
    if (rows[b].index == nullptr) {
      rows[b].cache->keys().ReadFirst(k);
      rows[b].cache->values().ReadFirst(v);
    } else {
      rows[b].cache->keys().Read(*rows[b].index, k);
      rows[b].cache->values().Read(*rows[b].index, v);
    }
  }
  return gathered;
}

attention::KeySets WholeStretches(const GatheredRows& rows) {
  attention::KeySets sets;
  sets.width = std::numeric_limits<int32_t>::max();
  sets.offsets = {0};
  for (size_t b = 0; b + 1 < rows.first.size(); ++b) {
    if (rows.first[b] < rows.first[b + 1]) sets.first.push_back(rows.first[b]);
    sets.offsets.push_back(static_cast<int64_t>(sets.first.size()));
    sets.end.push_back(rows.first[b + 1]);
  }
  return sets;
}

void AttendGathered(double scale, const attention::KeySets& sets, const at::Tensor& q,
                    const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
                    const at::Tensor& lse) {
  for (const at::Tensor* t : {&q, &k, &v, &out, &lse}) {
    HEDDLE_CHECK(t->is_contiguous() && t->scalar_type() == q.scalar_type());
  }
  HEDDLE_CHECK(sets.end.size() == static_cast<size_t>(q.size(0)) && q.size(1) % k.size(1) == 0);
  HEDDLE_CHECK(sets.set_heads == 1 || sets.set_heads == k.size(1));
  if (q.scalar_type() == at::kDouble) {
    Attend<double>(scale, sets, q, k, v, out, lse);
  } else {
    Attend<float>(scale, sets, q, k, v, out, lse);
  }
}

at::Tensor WidenQuery(const at::Tensor& q, layers::BufferPool* pool) {
  const at::ScalarType type = layers::StatisticsType(q.scalar_type());
  if (q.scalar_type() == type && q.is_contiguous()) return q;
  const at::Tensor wide = pool->Take({q.size(0), q.size(1), q.size(2)}, type);
  wide.copy_(q);
  return wide;
}

}  // namespace heddle::inference
