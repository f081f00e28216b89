#include "model/attention/nsa_branches.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"
#include "model/attention/conversion.h"
#include "model/attention/set_attention.h"
#include "model/attention/sparse_attention.h"
#include "model/layers/rope.h"

namespace heddle::attention {
namespace {

namespace bs = kernels::block_selection;
using heddle::v1::NsaConfig;

constexpr int32_t kWholeSpan = std::numeric_limits<int32_t>::max();
constexpr int64_t kRowsPerTask = 16;

CompressType TypeOf(const NsaConfig& config) {
  switch (config.compress_type()) {
    case NsaConfig::COMPRESS_TYPE_AVGPOOL:
      return CompressType::kAveragePool;
    case NsaConfig::COMPRESS_TYPE_LINEAR:
      return CompressType::kLinear;
    default:
      return CompressType::kWeightedPool;
  }
}

const bs::Table<float>& TableOf(float) { return bs::FloatKernels(); }
const bs::Table<double>& TableOf(double) { return bs::DoubleKernels(); }

int64_t LongestPosition(const NsaQueries& queries) {
  return queries.position.empty()
             ? 0
             : *std::max_element(queries.position.begin(), queries.position.end());
}

// Rows cost as much as they see, so a thread takes tasks from both ends of the batch.
bs::Rows RowsOfTask(int64_t task, int64_t tasks, int64_t rows) {
  const int64_t place = task % 2 == 0 ? task / 2 : tasks - 1 - task / 2;
  return {place * kRowsPerTask, std::min(rows, (place + 1) * kRowsPerTask)};
}

template <typename S>
int64_t RunSelection(const bs::Selection<S>& selection, const NsaQueries& queries) {
  const int64_t rows = queries.count();
  const int64_t tasks = (rows + kRowsPerTask - 1) / kRowsPerTask;
  const int64_t scratch = bs::ScratchElements(selection.shape, LongestPosition(queries));
  std::vector<int64_t> nan_rows(static_cast<size_t>(tasks));
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    std::vector<S> own(static_cast<size_t>(scratch));
    for (int64_t task = begin; task < end; ++task) {
      nan_rows[static_cast<size_t>(task)] =
          TableOf(S{}).select(selection, RowsOfTask(task, tasks, rows), own.data());
    }
  });
  int64_t sum = 0;
  for (const int64_t count : nan_rows) sum += count;
  return sum;
}

template <typename S>
int64_t Select(const NsaShape& shape, const NsaQueries& queries, const at::Tensor& q,
               const at::Tensor& kc, const at::Tensor& lse, const at::Tensor& scores,
               SelectedBlocks* selected) {
  bs::Selection<S> selection;
  selection.shape = shape.selection;
  selection.q = q.const_data_ptr<S>();
  selection.q_stride = q.stride(0);
  selection.kc = kc.const_data_ptr<S>();
  selection.lse = lse.const_data_ptr<S>();
  selection.position = queries.position.data();
  selection.window_first = queries.window_first.data();
  selection.offsets = selected->sets.offsets.data();
  if (scores.defined()) {
    selection.scores = scores.data_ptr<S>();
    selection.score_blocks = scores.size(2);
  }
  selection.blocks = selected->sets.first.data();
  return RunSelection(selection, queries);
}

// Block numbers become first rows.
void PlaceBlocks(const NsaShape& shape, const NsaQueries& queries, KeySets* sets) {
  const size_t heads = static_cast<size_t>(shape.heads.kv);
  const int32_t block = static_cast<int32_t>(shape.selection.block);
  for (size_t row = 0; row < queries.position.size(); ++row) {
    const size_t begin = static_cast<size_t>(sets->offsets[row * heads]);
    const size_t end = static_cast<size_t>(sets->offsets[(row + 1) * heads]);
    for (size_t i = begin; i < end; ++i) {
      sets->first[i] = queries.key_first[row] + sets->first[i] * block;
    }
  }
}

void CheckRows(const at::Tensor& t, int64_t heads, int64_t dim) {
  HEDDLE_CHECK(t.device().is_cpu());
  HEDDLE_CHECK(t.dim() == 3 && t.size(1) == heads && t.size(2) == dim, "rows of heads expected");
}

}  // namespace

NsaShape NsaShapeOf(const heddle::v1::ModelConfig& config) {
  const NsaConfig& nsa = config.attention().nsa();
  NsaShape shape;
  shape.heads = model::HeadsOf(config);
  shape.compression = {TypeOf(nsa), shape.heads.kv, shape.heads.dim, nsa.kernel_size(),
                       nsa.kernel_stride()};
  bs::Shape& s = shape.selection;
  s.heads = shape.heads.query;
  s.kv_heads = shape.heads.kv;
  s.dim = shape.heads.dim;
  s.scale = layers::RopeFrequenciesOf(config, s.dim).softmax_scale_factor /
            std::sqrt(static_cast<double>(s.dim));
  s.kernel_size = nsa.kernel_size();
  s.stride = nsa.kernel_stride();
  s.block = nsa.block_size();
  s.topk = nsa.topk();
  s.init_blocks = nsa.init_blocks();
  s.local_blocks = nsa.local_blocks();
  shape.window = nsa.window_size();
  shape.separate = nsa.kv() == NsaConfig::KV_SEPARATE;
  return shape;
}

NsaQueries QueriesOf(const layers::Documents& documents, const CompressionWindows& windows) {
  NsaQueries queries;
  queries.position.assign(documents.positions.begin(), documents.positions.end());
  for (size_t b = 0; b + 1 < documents.cu_seqlens.size(); ++b) {
    const int32_t first = documents.cu_seqlens[b];
    const size_t length = static_cast<size_t>(documents.cu_seqlens[b + 1] - first);
    queries.key_first.insert(queries.key_first.end(), length, first);
    queries.window_first.insert(queries.window_first.end(), length, windows.documents[b]);
  }
  HEDDLE_CHECK(queries.key_first.size() == queries.position.size());
  return queries;
}

NsaGeometry GeometryOf(const NsaShape& shape, NsaQueries queries) {
  NsaGeometry geometry;
  KeySets& compressed = geometry.compressed;
  KeySets& window = geometry.window;
  compressed.width = window.width = kWholeSpan;
  compressed.offsets = window.offsets = {0};
  for (size_t row = 0; row < queries.position.size(); ++row) {
    const int64_t t = queries.position[row];
    const int32_t windows = static_cast<int32_t>(bs::VisibleWindows(shape.selection, t));
    if (windows > 0) compressed.first.push_back(queries.window_first[row]);
    compressed.offsets.push_back(static_cast<int64_t>(compressed.first.size()));
    compressed.end.push_back(queries.window_first[row] + windows);
    const int64_t oldest = std::max<int64_t>(0, t - shape.window + 1);
    window.first.push_back(queries.key_first[row] + static_cast<int32_t>(oldest));
    window.offsets.push_back(static_cast<int64_t>(window.first.size()));
    window.end.push_back(queries.key_first[row] + static_cast<int32_t>(t) + 1);
  }
  geometry.queries = std::move(queries);
  return geometry;
}

SelectedBlocks SelectBlocks(const NsaShape& shape, const NsaQueries& queries, const at::Tensor& q,
                            const at::Tensor& kc, const at::Tensor& lse,
                            layers::BufferPool* scratch, const at::Tensor& scores) {
  CheckRows(q, shape.heads.query, shape.heads.dim);
  CheckRows(kc, shape.heads.kv, shape.heads.dim);
  HEDDLE_CHECK(q.size(0) == queries.count() && lse.size(0) == queries.count());
  HEDDLE_CHECK(kc.is_contiguous() && lse.is_contiguous());
  const at::ScalarType statistics = layers::StatisticsType(q.scalar_type());
  HEDDLE_CHECK(lse.scalar_type() == statistics);
  SelectedBlocks selected;
  KeySets& sets = selected.sets;
  sets.set_heads = shape.heads.kv;
  sets.width = static_cast<int32_t>(shape.selection.block);
  sets.usual = shape.selection.topk * shape.selection.block;
  sets.offsets = {0};
  sets.offsets.reserve(queries.position.size() * static_cast<size_t>(shape.heads.kv) + 1);
  for (size_t row = 0; row < queries.position.size(); ++row) {
    const int64_t count = bs::ChosenBlocks(shape.selection, queries.position[row]);
    for (int64_t g = 0; g < shape.heads.kv; ++g)
      sets.offsets.push_back(sets.offsets.back() + count);
    sets.end.push_back(queries.key_first[row] + queries.position[row] + 1);
  }
  sets.first.resize(static_cast<size_t>(sets.offsets.back()));
  if (scores.defined()) {
    CheckRows(scores, shape.heads.kv, LongestPosition(queries) / shape.selection.block + 1);
    HEDDLE_CHECK(scores.is_contiguous() && scores.scalar_type() == statistics);
  }
  const size_t mark = scratch->Mark();
  const at::Tensor wide_q = Converted(q, statistics, scratch);
  const at::Tensor wide_kc = Converted(kc, statistics, scratch);
  selected.nan_rows = statistics == at::kDouble
                          ? Select<double>(shape, queries, wide_q, wide_kc, lse, scores, &selected)
                          : Select<float>(shape, queries, wide_q, wide_kc, lse, scores, &selected);
  scratch->Release(mark);
  PlaceBlocks(shape, queries, &sets);
  return selected;
}

NsaAttended TakeAttended(const NsaShape& shape, int64_t rows, at::ScalarType type,
                         layers::BufferPool* pool) {
  NsaAttended attended;
  for (size_t b = 0; b < attended.out.size(); ++b) {
    attended.out[b] = pool->Take({rows, shape.heads.query, shape.heads.dim}, type);
    attended.lse[b] = pool->Take({rows, shape.heads.query}, layers::StatisticsType(type));
  }
  return attended;
}

void AttendCompressed(const NsaShape& shape, const NsaGeometry& geometry, const at::Tensor& q,
                      const NsaKeys& keys, const NsaAttended& attended) {
  SparseAttention(shape.selection.scale, geometry.compressed, q, keys.kc, keys.vc, attended.out[0],
                  attended.lse[0]);
}

void AttendTokens(const NsaShape& shape, const NsaGeometry& geometry, const KeySets& selected,
                  const KeyDocuments& documents, const at::Tensor& q, const NsaKeys& keys,
                  const NsaAttended& attended) {
  HEDDLE_CHECK(selected.end == geometry.window.end, "a selection of other documents");
  SetAttention(shape.selection.scale, selected, documents, q, keys.k, keys.v, attended.out[1],
               attended.lse[1]);
  SetAttention(shape.selection.scale, geometry.window, documents, q, keys.window_k, keys.window_v,
               attended.out[2], attended.lse[2]);
}

void AttendTokens(const NsaShape& shape, const NsaGeometry& geometry, const KeySets& selected,
                  const at::Tensor& q, const NsaKeys& keys, const NsaAttended& attended) {
  HEDDLE_CHECK(selected.end == geometry.window.end, "a selection of other documents");
  SparseAttention(shape.selection.scale, selected, q, keys.k, keys.v, attended.out[1],
                  attended.lse[1]);
  SparseAttention(shape.selection.scale, geometry.window, q, keys.window_k, keys.window_v,
                  attended.out[2], attended.lse[2]);
}

}  // namespace heddle::attention
