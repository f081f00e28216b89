#include "model/attention/token_indexer.h"

#include <ATen/ops/empty.h>

#include <algorithm>
#include <utility>

#include "base/status/status.h"

namespace heddle::attention {
namespace {

namespace kx = kernels::indexer;

const kx::Table<float>& KernelsOf(float) { return kx::FloatKernels(); }
const kx::Table<double>& KernelsOf(double) { return kx::DoubleKernels(); }

// One query row against a cache: the row's own key is the last.
template <typename T>
struct CachedScores {
  explicit CachedScores(const IndexerInputs& inputs)
      : last(static_cast<int32_t>(inputs.k_NI.size(0)) - 1) {
    scores.heads = inputs.q_NHI.size(1);
    scores.width = inputs.q_NHI.size(2);
    scores.activation = inputs.activation;
    scores.score_scale = inputs.score_scale;
    scores.q = inputs.q_NHI.const_data_ptr<T>();
    scores.k = inputs.k_NI.const_data_ptr<T>();
    scores.w = inputs.w_NH.const_data_ptr<T>();
    if (inputs.head_bias_H.defined()) scores.head_bias = inputs.head_bias_H.const_data_ptr<T>();
    scores.first = &first;
    scores.last = &last;
  }
  CachedScores(const CachedScores&) = delete;
  CachedScores& operator=(const CachedScores&) = delete;

  int32_t first = 0;
  int32_t last;
  kx::Scores<T> scores;
};

template <typename Body>
void WithType(const at::Tensor& t, const Body& body) {
  if (t.scalar_type() == at::kDouble) {
    body(double{});
  } else {
    HEDDLE_CHECK(t.scalar_type() == at::kFloat, "scores are fp32 or fp64");
    body(float{});
  }
}

}  // namespace

at::Tensor ConvertTo(const at::Tensor& t, at::ScalarType type, layers::BufferPool* pool) {
  if (t.scalar_type() == type) return t;
  at::Tensor out = t.dim() == 3 ? pool->Take({t.size(0), t.size(1), t.size(2)}, type)
                                : pool->Take({t.size(0), t.size(1)}, type);
  out.copy_(t);
  return out;
}

at::Tensor Widen(const at::Tensor& t, layers::BufferPool* pool) {
  return ConvertTo(t, layers::StatisticsType(t.scalar_type()), pool);
}

IndexerInputs CachedInputs(const IndexRows& rows, int64_t row, const CachedIndexKeys& keys) {
  HEDDLE_CHECK(keys.key_TI.size(0) > 0, "a query sees at least itself");
  IndexerInputs one = rows.inputs;
  one.q_NHI = rows.inputs.q_NHI.narrow(0, row, 1);
  one.w_NH = rows.inputs.w_NH.narrow(0, row, 1);
  one.k_NI = keys.key_TI.to(rows.inputs.q_NHI.scalar_type()).contiguous();
  return one;
}

ScoreStatistics MeasureCached(const IndexerInputs& inputs) {
  const at::TensorOptions options = inputs.q_NHI.options();
  ScoreStatistics s{at::empty({1}, options), at::empty({1}, options), at::empty({1}, options),
                    at::empty({1}, options)};
  WithType(inputs.q_NHI, [&](auto zero) {
    using T = decltype(zero);
    const CachedScores<T> cached(inputs);
    KernelsOf(zero).statistics({cached.scores, s.mean_N.data_ptr<T>(), s.variance_N.data_ptr<T>(),
                                s.maximum_N.data_ptr<T>(), s.entropy_N.data_ptr<T>()},
                               {0, 1});
  });
  return s;
}

at::Tensor TokenIndexer::ScoreCached(const IndexRows& rows, int64_t row,
                                     const CachedIndexKeys& keys) const {
  const IndexerInputs inputs = CachedInputs(rows, row, keys);
  const at::Tensor out = at::empty({keys.key_TI.size(0)}, inputs.q_NHI.options());
  WithType(inputs.q_NHI, [&](auto zero) {
    using T = decltype(zero);
    const CachedScores<T> cached(inputs);
    KernelsOf(zero).row_scores(cached.scores, 0, out.data_ptr<T>());
  });
  return out;
}

std::vector<int32_t> TokenIndexer::SelectCached(const IndexRows& rows, int64_t row,
                                                const CachedIndexKeys& keys) const {
  const int64_t visible = keys.key_TI.size(0);
  std::vector<int32_t> selected;
  if (visible <= options_.least_count) {
    for (int32_t s = 0; s < visible; ++s) selected.push_back(s);
    return selected;
  }
  const IndexerInputs inputs = CachedInputs(rows, row, keys);
  const int64_t count = std::min<int64_t>(CountCached(inputs), visible);
  selected.resize(static_cast<size_t>(count));
  const int64_t offsets[2] = {0, count};
  WithType(inputs.q_NHI, [&](auto zero) {
    using T = decltype(zero);
    const CachedScores<T> cached(inputs);
    KernelsOf(zero).select({cached.scores, options_.tie_break, offsets, selected.data()}, {0, 1});
  });
  return selected;
}

bool TokenIndexer::Trains(const layers::PassContext& context) const {
  return has_weights_ && context.pass != layers::Pass::kInference && context.step != nullptr &&
         context.step->row_scale != 0 && options_.kl_weight != 0;
}

std::shared_ptr<const Selection> TokenIndexer::Select(const layers::PassContext& context,
                                                      const at::Tensor& u, const at::Tensor& x) {
  if (context.pass == layers::Pass::kRecompute) {
    HEDDLE_CHECK(saved_ != nullptr, "recomputation without the forward that it repeats");
    if (Trains(context)) rows_ = Project(context.documents->positions, u, x, context.scratch);
    return saved_;
  }
  std::shared_ptr<const Selection> selection;
  if (has_weights_) {
    selection = MakeSelection(context, u, x);
    if (shared_ != nullptr) shared_->latest = selection;
  } else {
    HEDDLE_CHECK(shared_ != nullptr && shared_->latest != nullptr, "no layer selects before this");
    selection = shared_->latest;
  }
  HEDDLE_CHECK(static_cast<int64_t>(selection->sets.end.size()) == context.documents->rows(),
               "a selection of other documents");
  if (context.pass != layers::Pass::kInference) saved_ = selection;
  return selection;
}

std::shared_ptr<const Selection> TokenIndexer::MakeSelection(const layers::PassContext& context,
                                                             const at::Tensor& u,
                                                             const at::Tensor& x) {
  const layers::Documents& documents = *context.documents;
  const bool warmup = context.step != nullptr && context.step->indexer_warmup;
  auto selection = std::make_shared<Selection>();
  selection->dense = warmup || documents.longest <= options_.least_count;
  const bool measures = Measures(context);
  if (!selection->dense || measures || Trains(context) || context.cache_rows != nullptr) {
    rows_ = Project(documents.positions, u, x, context.scratch);
  }
  std::vector<int32_t> counts;
  if (!selection->dense || measures) counts = CountKeys(context, rows_.inputs);
  if (!selection->dense) {
    selection->dense = std::ranges::equal(counts, documents.positions, {}, {},
                                          [](int32_t position) { return position + 1; });
  }
  selection->sets = selection->dense
                        ? CausalSets(documents)
                        : SelectKeys(rows_.inputs, documents, counts, options_.tie_break);
  // Also where nothing is left out: whether that is so may depend on other documents.
  if (!warmup) selection->sets.usual = options_.least_count;
  if (!selection->dense && layers::Counts(context.pass) && context.counts != nullptr) {
    context.counts->nan_rows += CountNanRows(rows_.inputs, documents, counts);
  }
  if (context.cache_rows != nullptr) {
    context.cache_rows->index_k =
        context.kept->Take({rows_.key_NI.size(0), rows_.key_NI.size(1)}, x.scalar_type());
    context.cache_rows->index_k.copy_(rows_.key_NI);
  }
  return selection;
}

void TokenIndexer::Train(const layers::PassContext& context, const Selection& selection,
                         const Target& target) {
  has_gradients_ = false;
  if (!Trains(context)) {
    rows_ = {};
    return;
  }
  const double row_weight = options_.kl_weight * context.step->row_scale;
  const KlTarget kl{target.q_NHD, target.k_NJD, target.lse_NH, target.scale,
                    selection.dense ? nullptr : &selection.sets};
  const IndexerInputs& inputs = rows_.inputs;
  IndexerGradients gradients;
  const bool keeps = layers::Keeps(context.pass);
  if (keeps) {
    const at::ScalarType type = inputs.q_NHI.scalar_type();
    const auto like = [&](const at::Tensor& t) {
      return t.dim() == 3 ? context.scratch->Take({t.size(0), t.size(1), t.size(2)}, type)
                          : context.scratch->Take({t.size(0), t.size(1)}, type);
    };
    gradients.dq_NHI = like(inputs.q_NHI);
    gradients.dk_NI = like(inputs.k_NI);
    gradients.dw_NH = like(inputs.w_NH);
    if (inputs.head_bias_H.defined()) {
      gradients.dhead_bias_H = at::empty({inputs.head_bias_H.size(0)}, inputs.q_NHI.options());
    }
  }
  const double sum = IndexerKl(inputs, *context.documents, kl, options_.temperature, row_weight,
                               keeps ? &gradients : nullptr);
  if (layers::Counts(context.pass)) context.losses->indexer += row_weight * sum;
  if (keeps) {
    KeepGradients(context, gradients);
    has_gradients_ = true;
  }
  rows_ = {};
}

void TokenIndexer::Backward(const layers::PassContext& context, const at::Tensor& u,
                            const at::Tensor& x) {
  if (!has_gradients_) return;
  AddGradients(context, u, x);
  has_gradients_ = false;
}

}  // namespace heddle::attention
