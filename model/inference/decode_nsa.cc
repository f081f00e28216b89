// Decoding of NSA (attention-and-moe.md 5.5): reads the compressed rows, the tokens of the selected
// blocks and the window, and nothing else of the cache.
#include <algorithm>
#include <limits>

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"
#include "model/inference/decode_attention.h"
#include "model/inference/decode_sparse.h"
#include "model/inference/nsa_cache.h"

namespace heddle::inference {
namespace {

class DecodeNsa : public DecodeAttention {
 public:
  DecodeNsa(const DecodeLayerContext& context, const layers::LayerStorage& storage)
      : shared_(context.shared),
        weights_(*context.config, storage, context.ropes),
        quantization_(context.quantization),
        type_(storage.type) {}

  std::unique_ptr<SequenceCache> MakeCache() const override {
    return std::make_unique<NsaCache>(&weights_, type_, quantization_, &pool_);
  }
  void Forward(const layers::PassContext& context, const at::Tensor& h, const at::Tensor& residual,
               const at::Tensor& out) override;

 private:
  // One step: a query of each sequence.
  struct Step {
    layers::BufferPool* scratch = nullptr;
    at::Tensor q;  // [B, H, D] S
    std::array<at::Tensor, attention::kNsaBranches> o;
    std::array<at::Tensor, attention::kNsaBranches> lse;
  };

  const attention::NsaShape& shape() const { return weights_.shape(); }
  const NsaCache& CacheOf(size_t row) const { return *static_cast<const NsaCache*>(caches()[row]); }
  // Branch 0, and the blocks that it selects: row numbers are positions in each sequence.
  attention::KeySets AttendCompressed(const layers::PassContext& context, const Step& step) const;
  void AttendSelected(const attention::KeySets& blocks, const Step& step) const;
  void AttendWindow(const Step& step) const;

  // One branch: q over the rows that `sets` names, to step.o and step.lse.
  void Attend(size_t branch, const attention::KeySets& sets, const at::Tensor& k,
              const at::Tensor& v, const Step& step) const;

  DecodeShared* shared_;
  attention::NsaWeights weights_;
  CacheQuantization quantization_;
  at::ScalarType type_;
  mutable layers::BufferPool pool_;  // of emissions
};

void DecodeNsa::Attend(size_t branch, const attention::KeySets& sets, const at::Tensor& k,
                       const at::Tensor& v, const Step& step) const {
  shared_->attended_keys += sets.pairs() * (shape().heads.kv / sets.set_heads);
  AttendGathered(shape().selection.scale, sets, step.q, k, v, step.o[branch], step.lse[branch]);
}

attention::KeySets DecodeNsa::AttendCompressed(const layers::PassContext& context,
                                               const Step& step) const {
  attention::NsaQueries queries;
  const std::span<const int32_t> positions = context.documents->positions;
  queries.position.assign(positions.begin(), positions.end());
  queries.key_first.assign(positions.size(), 0);
  int64_t total = 0;
  for (size_t b = 0; b < positions.size(); ++b) {
    queries.window_first.push_back(static_cast<int32_t>(total));
    total += CacheOf(b).windows();
  }
  const model::Heads& heads = shape().heads;
  const at::ScalarType wide = step.q.scalar_type();
  const at::Tensor kc = step.scratch->Take({total, heads.kv, heads.dim}, wide);
  const at::Tensor vc = step.scratch->Take({total, heads.kv, heads.dim}, wide);
  for (size_t b = 0; b < positions.size(); ++b) {
    const NsaCache& cache = CacheOf(b);
    cache.compressed_keys().ReadFirst(kc.narrow(0, queries.window_first[b], cache.windows()));
    cache.compressed_values().ReadFirst(vc.narrow(0, queries.window_first[b], cache.windows()));
  }
  const attention::NsaGeometry geometry = attention::GeometryOf(shape(), std::move(queries));
  Attend(0, geometry.compressed, kc, vc, step);
  return attention::SelectBlocks(shape(), geometry.queries, step.q, kc, step.lse[0], step.scratch)
      .sets;
}

// The key heads of a query select different blocks, so the rows of all of them are gathered, whole
// blocks end to end, and each head sees its own. Only the newest block can be cut short, and it is
// the last one gathered.
void DecodeNsa::AttendSelected(const attention::KeySets& blocks, const Step& step) const {
  const size_t heads = static_cast<size_t>(blocks.set_heads);
  const size_t rows = blocks.end.size();
  attention::KeySets sets = blocks;
  std::vector<std::vector<int32_t>> index(rows);
  std::vector<RowsOf> gather;
  int32_t offset = 0;
  for (size_t b = 0; b < rows; ++b) {
    const auto begin = blocks.first.begin() + blocks.offsets[b * heads];
    const auto end = blocks.first.begin() + blocks.offsets[(b + 1) * heads];
    std::vector<int32_t> firsts(begin, end);
    std::sort(firsts.begin(), firsts.end());
    firsts.erase(std::unique(firsts.begin(), firsts.end()), firsts.end());
    for (const int32_t first : firsts) {
      const int32_t last = std::min(first + blocks.width, blocks.end[b]);
      for (int32_t row = first; row < last; ++row) index[b].push_back(row);
    }
    for (int64_t i = blocks.offsets[b * heads]; i < blocks.offsets[(b + 1) * heads]; ++i) {
      int32_t& first = sets.first[static_cast<size_t>(i)];
      const auto place = std::lower_bound(firsts.begin(), firsts.end(), first);
      first = offset + static_cast<int32_t>(place - firsts.begin()) * blocks.width;
    }
    offset += static_cast<int32_t>(index[b].size());
    sets.end[b] = offset;
    gather.push_back({&CacheOf(b).tokens(), &index[b]});
  }
  const GatheredRows gathered = Gather(gather, step.q.scalar_type(), step.scratch);
  Attend(1, sets, gathered.k_MJD, gathered.v_MJE, step);
}

void DecodeNsa::AttendWindow(const Step& step) const {
  const size_t rows = static_cast<size_t>(step.q.size(0));
  std::vector<std::vector<int32_t>> index(rows);
  std::vector<RowsOf> gather;
  for (size_t b = 0; b < rows; ++b) {
    const NsaCache& cache = CacheOf(b);
    if (cache.window() != nullptr) {
      gather.push_back({cache.window(), nullptr});  // the ring holds the window and nothing else
      continue;
    }
    const int64_t first = std::max<int64_t>(0, cache.length() - shape().window);
    for (int64_t row = first; row < cache.length(); ++row) {
      index[b].push_back(static_cast<int32_t>(row));
    }
    gather.push_back({&cache.tokens(), &index[b]});
  }
  const GatheredRows gathered = Gather(gather, step.q.scalar_type(), step.scratch);
  Attend(2, WholeStretches(gathered), gathered.k_MJD, gathered.v_MJE, step);
}

void DecodeNsa::Forward(const layers::PassContext& context, const at::Tensor& h,
                        const at::Tensor& residual, const at::Tensor& out) {
  const int64_t n = h.size(0);
  HEDDLE_CHECK(static_cast<int64_t>(caches().size()) == n, "one cache per row");
  layers::BufferPool* scratch = context.scratch;
  const size_t mark = scratch->Mark();
  const attention::NsaRows rows = weights_.Project(h, context.documents->positions, scratch);
  layers::CacheRows cache_rows;
  cache_rows.k = rows.k;
  cache_rows.v = rows.v;
  cache_rows.raw_k = rows.raw_k;
  cache_rows.raw_v = rows.raw_v;
  cache_rows.window_k = rows.window_k;
  cache_rows.window_v = rows.window_v;
  AppendRows(cache_rows);

  const model::Heads& heads = shape().heads;
  Step step;
  step.scratch = scratch;
  step.q = WidenQuery(rows.q, scratch);
  for (size_t branch = 0; branch < step.o.size(); ++branch) {
    step.o[branch] = scratch->Take({n, heads.query, heads.dim}, step.q.scalar_type());
    step.lse[branch] = scratch->Take({n, heads.query}, step.q.scalar_type());
  }
  AttendSelected(AttendCompressed(context, step), step);
  AttendWindow(step);
  attention::BranchOutputs branches;
  for (size_t branch = 0; branch < branches.size(); ++branch) {
    branches[branch] = scratch->Take({n, heads.query, heads.dim}, type_);
    branches[branch].copy_(step.o[branch]);
  }
  const at::Tensor o = scratch->Take({n, heads.query * heads.dim}, type_);
  attention::CombineBranches(rows.gate_logits, branches, o);
  weights_.Output(residual, o, out);
  scratch->Release(mark);
}

}  // namespace

std::unique_ptr<DecodeAttention> MakeDecodeNsa(const DecodeLayerContext& context,
                                               const layers::LayerStorage& storage) {
  return std::make_unique<DecodeNsa>(context, storage);
}

}  // namespace heddle::inference
