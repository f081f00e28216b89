#include "model/moe/router.h"

#include <ATen/Parallel.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <utility>

#include "base/rng/rng.h"
#include "base/status/status.h"
#include "heddle/v1/config.pb.h"
#include "kernels/pointwise/params.h"
#include "model/layers/kernel_edge.h"

namespace heddle::moe {
namespace {

namespace pw = kernels::pointwise;
using layers::ElementOf;
using layers::kRowBlock;

// Columns of the router's matrix in one task; no sum crosses them.
constexpr int64_t kColumnBlock = 64;
// Keeps normalisation defined where all chosen scores are 0; far below any other sum.
constexpr double kTiny = 1e-20;

// a ranks strictly above b; NaN below every number.
template <typename S>
bool Above(S a, S b) {
  if (std::isnan(a)) return false;
  return std::isnan(b) || a > b;
}

// Keeps the k best of the candidates offered in ascending index order: equal scores stay in that
// order.
template <typename S>
class Best {
 public:
  Best(int32_t* indices, int64_t k) : indices_(indices), k_(k) {}
  void Offer(const S* scores, int32_t index) {
    if (size_ == k_ && !Above(scores[index], scores[indices_[k_ - 1]])) return;
    int64_t place = size_ < k_ ? size_++ : k_ - 1;
    for (; place > 0 && Above(scores[index], scores[indices_[place - 1]]); --place) {
      indices_[place] = indices_[place - 1];
    }
    indices_[place] = index;
  }
  int64_t size() const { return size_; }

 private:
  int32_t* indices_;
  int64_t k_;
  int64_t size_ = 0;
};

// Everything that a row's logits determine.
template <typename S>
struct RowScores {
  std::vector<S> softmax;
  std::vector<S> scores;  // the router's: softmax or sigmoid
  S log_sum = 0;          // logsumexp of the logits

  void Compute(const S* z, int64_t experts, bool sigmoid) {
    softmax.resize(static_cast<size_t>(experts));
    const S best = *std::max_element(z, z + experts);
    S sum = 0;
    for (int64_t e = 0; e < experts; ++e) {
      softmax[static_cast<size_t>(e)] = std::exp(z[e] - best);
      sum += softmax[static_cast<size_t>(e)];
    }
    for (S& p : softmax) p /= sum;
    log_sum = best + std::log(sum);
    if (!sigmoid) {
      scores = softmax;
      return;
    }
    scores.resize(softmax.size());
    for (int64_t e = 0; e < experts; ++e) {
      scores[static_cast<size_t>(e)] = S{1} / (S{1} + std::exp(-z[e]));
    }
  }
};

template <typename S>
S SumOfChosen(const std::vector<S>& scores, const int32_t* experts, int64_t top_k) {
  S sum = static_cast<S>(kTiny);
  for (int64_t j = 0; j < top_k; ++j) sum += scores[static_cast<size_t>(experts[j])];
  return sum;
}

template <typename S>
void WeighRow(const RouterOptions& o, const std::vector<S>& scores, const int32_t* experts,
              S* weights) {
  const S sum = o.normalize ? SumOfChosen(scores, experts, o.top_k) : S{1};
  for (int64_t j = 0; j < o.top_k; ++j) {
    weights[j] = static_cast<S>(o.route_scale) * scores[static_cast<size_t>(experts[j])] / sum;
  }
}

// Coefficients of one row's losses (Router::Balance), null where the loss has no such term.
struct RowBalance {
  const double* of_softmax = nullptr;
  const double* of_share = nullptr;
  const double* of_weight = nullptr;
};

const double* SetOf(const std::vector<double>& sets, const std::vector<int32_t>& row_set,
                    int64_t row, int64_t experts) {
  if (sets.empty()) return nullptr;
  return sets.data() + (row_set.empty() ? 0 : row_set[static_cast<size_t>(row)] * experts);
}

// p o (d - p.d): the backward of a softmax, added to `to`.
template <typename S>
void AddSoftmaxBackward(const std::vector<S>& p, const std::vector<S>& d, S* to) {
  S dot = 0;
  for (size_t e = 0; e < p.size(); ++e) dot += p[e] * d[e];
  for (size_t e = 0; e < p.size(); ++e) to[e] += p[e] * (d[e] - dot);
}

template <typename S>
struct RowGradient {
  RowScores<S> row;
  std::vector<S> dscores;
  std::vector<S> dsoftmax;

  // dz [E] of one row; dg [K] = dL/dweights through the output.
  void Compute(const RouterOptions& o, const S* z, const int32_t* experts, const S* dg,
               const RowBalance& balance, S z_scale, S* dz) {
    row.Compute(z, o.experts, o.sigmoid);
    dscores.assign(static_cast<size_t>(o.experts), S{0});
    dsoftmax.assign(static_cast<size_t>(o.experts), S{0});
    WeightsBackward(o, experts, dg, balance.of_weight);
    if (balance.of_share != nullptr) ShareBackward(balance.of_share);
    if (balance.of_softmax != nullptr) {
      for (size_t e = 0; e < dsoftmax.size(); ++e) {
        dsoftmax[e] = static_cast<S>(balance.of_softmax[e]);
      }
    }
    for (int64_t e = 0; e < o.experts; ++e) {
      dz[e] = z_scale * row.log_sum * row.softmax[static_cast<size_t>(e)];
    }
    if (o.sigmoid) {
      for (size_t e = 0; e < dscores.size(); ++e) {
        dz[e] += dscores[e] * row.scores[e] * (S{1} - row.scores[e]);
      }
    } else {
      for (size_t e = 0; e < dscores.size(); ++e) dsoftmax[e] += dscores[e];
    }
    AddSoftmaxBackward(row.softmax, dsoftmax, dz);
  }

 private:
  void WeightsBackward(const RouterOptions& o, const int32_t* experts, const S* dg,
                       const double* of_weight) {
    const auto total = [&](int64_t j) {
      return dg[j] + (of_weight == nullptr ? S{0} : static_cast<S>(of_weight[experts[j]]));
    };
    const S scale = static_cast<S>(o.route_scale);
    if (!o.normalize) {
      for (int64_t j = 0; j < o.top_k; ++j) {
        dscores[static_cast<size_t>(experts[j])] = scale * total(j);
      }
      return;
    }
    const S sum = SumOfChosen(row.scores, experts, o.top_k);
    S mean = 0;
    for (int64_t j = 0; j < o.top_k; ++j) {
      mean += total(j) * (row.scores[static_cast<size_t>(experts[j])] / sum);
    }
    for (int64_t j = 0; j < o.top_k; ++j) {
      dscores[static_cast<size_t>(experts[j])] = scale * (total(j) - mean) / sum;
    }
  }

  // Through s' = s / sum_E s.
  void ShareBackward(const double* of_share) {
    S sum = 0;
    S dot = 0;
    for (size_t e = 0; e < dscores.size(); ++e) {
      sum += row.scores[e];
      dot += static_cast<S>(of_share[e]) * row.scores[e];
    }
    for (size_t e = 0; e < dscores.size(); ++e) {
      dscores[e] += (static_cast<S>(of_share[e]) - dot / sum) / sum;
    }
  }
};

// Rows in blocks that do not depend on the number of threads; run(block, begin, end).
template <typename Run>
void ForBlocks(int64_t rows, const Run& run) {
  const int64_t blocks = (rows + kRowBlock - 1) / kRowBlock;
  at::parallel_for(0, blocks, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      run(block, block * kRowBlock, std::min(rows, (block + 1) * kRowBlock));
    }
  });
}

// Calls run(S{}) with the statistics type.
template <typename Run>
auto ByType(at::ScalarType type, const Run& run) {
  return type == at::kDouble ? run(double{}) : run(float{});
}

}  // namespace

RouterOptions RouterOptionsOf(const heddle::v1::MoeConfig& config) {
  using heddle::v1::MoeConfig;
  RouterOptions o;
  o.experts = config.n_experts();
  o.top_k = config.top_k();
  o.sigmoid = config.router() == MoeConfig::ROUTER_SIGMOID;
  o.normalize = o.sigmoid || config.norm_topk();
  o.route_scale = config.route_scale();
  o.groups = config.n_groups();
  o.topk_groups = config.topk_groups();
  o.group_sum_of_two = o.sigmoid || config.bias_update_rate() > 0;
  o.noise_std = config.noise_std();
  o.force_balance = config.force_balance();
  if (config.aux_form() == MoeConfig::AUX_FORM_SEQUENCE) o.balance = BalanceLoss::kSequence;
  if (config.aux_form() == MoeConfig::AUX_FORM_IMPORTANCE) o.balance = BalanceLoss::kImportance;
  o.balance_coefficient = config.aux_loss();
  o.z_coefficient = config.z_loss();
  return o;
}

Router::Router(const RouterOptions& options, at::Tensor weight, at::Tensor gradient,
               const float* bias)
    : options_(options),
      weight_ED_(std::move(weight)),
      gradient_ED_(std::move(gradient)),
      bias_(bias) {
  const RouterOptions& o = options_;
  HEDDLE_CHECK(o.experts >= 1 && o.top_k >= 1);
  HEDDLE_CHECK(o.groups >= 1 && o.experts % o.groups == 0, "groups must divide the experts");
  HEDDLE_CHECK(o.topk_groups >= 1 && o.topk_groups <= o.groups);
  HEDDLE_CHECK(o.top_k <= o.topk_groups * (o.experts / o.groups), "more experts than allowed ones");
}

void Router::Logits(const at::Tensor& h, const NoiseKey* noise, const at::Tensor& logits) const {
  const RouterOptions& o = options_;
  layers::CheckMatrix(h, logits.size(0), weight_ED_.size(1), weight_ED_.scalar_type());
  layers::CheckMatrix(logits, h.size(0), o.experts, layers::StatisticsTypeOf(h));
  const pw::RouterLogits p{h.size(1), o.experts, h.data_ptr(), weight_ED_.data_ptr(),
                           logits.data_ptr()};
  const pw::Table& kernels = pw::Kernels(ElementOf(h));
  layers::ForRows(h.size(0), [&](pw::RowRange rows) { kernels.router_logits(p, rows); });
  if (noise == nullptr || o.noise_std == 0.0) return;
  const Rng rng = Rng(noise->seed, "moe.router_noise")
                      .Child(static_cast<uint64_t>(noise->step))
                      .Child(static_cast<uint64_t>(noise->layer));
  ByType(logits.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    S* z = static_cast<S*>(logits.data_ptr());
    ForBlocks(h.size(0), [&](int64_t, int64_t begin, int64_t end) {
      for (int64_t i = begin * o.experts; i < end * o.experts; ++i) {
        const int64_t position = noise->first_token * o.experts + i;
        z[i] += static_cast<S>(o.noise_std * rng.NormalAt(static_cast<uint64_t>(position)));
      }
    });
  });
}

template <typename S>
int64_t Router::SelectRows(const at::Tensor& logits, std::vector<int32_t>* experts) const {
  const RouterOptions& o = options_;
  const int64_t per_group = o.experts / o.groups;
  const S* z = static_cast<const S*>(logits.data_ptr());
  std::atomic<int64_t> nan_rows{0};
  ForBlocks(logits.size(0), [&](int64_t, int64_t begin, int64_t end) {
    RowScores<S> row;
    std::vector<S> group_scores(static_cast<size_t>(o.groups));
    std::vector<int32_t> groups(static_cast<size_t>(o.topk_groups));
    for (int64_t r = begin; r < end; ++r) {
      row.Compute(z + r * o.experts, o.experts, o.sigmoid);
      std::vector<S>& s = row.scores;
      if (bias_ != nullptr) {
        for (size_t e = 0; e < s.size(); ++e) s[e] += static_cast<S>(bias_[e]);
      }
      nan_rows += std::any_of(s.begin(), s.end(), [](S v) { return std::isnan(v); });
      int32_t* chosen = experts->data() + r * o.top_k;
      Best<S> best(chosen, o.top_k);
      Best<S> best_groups(groups.data(), o.topk_groups);
      for (int64_t g = 0; g < o.groups; ++g) {
        int32_t two[2];
        Best<S> leaders(two, o.group_sum_of_two && per_group > 1 ? 2 : 1);
        for (int64_t e = g * per_group; e < (g + 1) * per_group; ++e) {
          leaders.Offer(s.data(), static_cast<int32_t>(e));
        }
        S& score = group_scores[static_cast<size_t>(g)];
        score = s[static_cast<size_t>(two[0])];
        if (leaders.size() == 2) score += s[static_cast<size_t>(two[1])];
        best_groups.Offer(group_scores.data(), static_cast<int32_t>(g));
      }
      std::sort(groups.begin(), groups.end());
      for (const int32_t g : groups) {
        for (int64_t e = g * per_group; e < (g + 1) * per_group; ++e) {
          best.Offer(s.data(), static_cast<int32_t>(e));
        }
      }
      std::sort(chosen, chosen + o.top_k);
    }
  });
  return nan_rows;
}

int64_t Router::Select(const at::Tensor& logits, int64_t first_token,
                       std::vector<int32_t>* experts) const {
  const RouterOptions& o = options_;
  experts->resize(static_cast<size_t>(logits.size(0) * o.top_k));
  const int64_t nan_rows = ByType(
      logits.scalar_type(), [&](auto zero) { return SelectRows<decltype(zero)>(logits, experts); });
  if (o.force_balance) {
    for (int64_t row = 0; row < logits.size(0); ++row) {
      int32_t* chosen = experts->data() + row * o.top_k;
      for (int64_t j = 0; j < o.top_k; ++j) {
        chosen[j] = static_cast<int32_t>(((first_token + row) * o.top_k + j) % o.experts);
      }
      std::sort(chosen, chosen + o.top_k);
    }
  }
  return nan_rows;
}

void Router::Weigh(const at::Tensor& logits, std::span<const int32_t> experts,
                   const at::Tensor& weights) const {
  const RouterOptions& o = options_;
  ByType(logits.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    const S* z = static_cast<const S*>(logits.data_ptr());
    S* g = static_cast<S*>(weights.data_ptr());
    ForBlocks(logits.size(0), [&](int64_t, int64_t begin, int64_t end) {
      RowScores<S> row;
      for (int64_t r = begin; r < end; ++r) {
        row.Compute(z + r * o.experts, o.experts, o.sigmoid);
        WeighRow(o, row.scores, experts.data() + r * o.top_k, g + r * o.top_k);
      }
    });
  });
}

void Router::SequenceBalance(const Routed& routed, Balance* balance) const {
  const RouterOptions& o = options_;
  HEDDLE_CHECK(routed.documents != nullptr, "the sequence form needs the documents");
  const std::span<const int32_t> cu = routed.documents->cu_seqlens;
  const size_t experts = static_cast<size_t>(o.experts);
  balance->of_share.assign((cu.size() - 1) * experts, 0.0);
  balance->row_set.resize(static_cast<size_t>(routed.logits_NE.size(0)));
  for (size_t b = 0; b + 1 < cu.size(); ++b) {
    double* set = balance->of_share.data() + b * experts;
    for (int64_t row = cu[b]; row < cu[b + 1]; ++row) {
      balance->row_set[static_cast<size_t>(row)] = static_cast<int32_t>(b);
      for (int64_t j = 0; j < o.top_k; ++j) {
        set[routed.experts[static_cast<size_t>(row * o.top_k + j)]] += 1.0;
      }
    }
    // A document of T rows counts T row_scale; its mean over rows divides by T.
    const double length = cu[b + 1] - cu[b];
    const double factor = o.balance_coefficient * static_cast<double>(o.experts) /
                          (static_cast<double>(o.top_k) * std::max(length, 1.0));
    for (size_t e = 0; e < experts; ++e) set[e] *= factor * routed.row_scale;
  }
}

void Router::ImportanceBalance(const Routed& routed, Balance* balance) const {
  const RouterOptions& o = options_;
  const double experts = static_cast<double>(o.experts);
  std::vector<double> importance(static_cast<size_t>(o.experts), 0.0);
  ByType(routed.weights_NK.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    const S* weights = static_cast<const S*>(routed.weights_NK.data_ptr());
    for (size_t a = 0; a < routed.experts.size(); ++a) {
      importance[static_cast<size_t>(routed.experts[a])] += static_cast<double>(weights[a]);
    }
  });
  double sum = 0;
  for (const double value : importance) sum += value;
  const double scale =
      o.balance_coefficient * routed.row_scale * static_cast<double>(routed.logits_NE.size(0));
  double dot = 0;
  for (double& value : importance) {
    value *= experts / sum;  // 1 where balanced
    balance->importance += scale * (value - 1) * (value - 1) / experts;
    dot += (value - 1) * value / experts;
  }
  balance->of_weight.resize(importance.size());
  for (size_t e = 0; e < importance.size(); ++e) {
    balance->of_weight[e] = scale * 2.0 / sum * (importance[e] - 1 - dot);
  }
}

Router::Balance Router::BalanceOf(const Routed& routed) const {
  const RouterOptions& o = options_;
  Balance balance;
  const int64_t rows = routed.logits_NE.size(0);
  if (o.balance_coefficient == 0.0 || routed.row_scale == 0.0 || rows == 0) return balance;
  switch (o.balance) {
    case BalanceLoss::kSwitch: {
      balance.of_softmax.assign(static_cast<size_t>(o.experts), 0.0);
      for (const int32_t e : routed.experts) balance.of_softmax[static_cast<size_t>(e)] += 1.0;
      const double factor = o.balance_coefficient * static_cast<double>(o.experts) *
                            routed.row_scale / static_cast<double>(rows * o.top_k);
      for (double& coefficient : balance.of_softmax) coefficient *= factor;
      break;
    }
    case BalanceLoss::kSequence:
      SequenceBalance(routed, &balance);
      break;
    case BalanceLoss::kImportance:
      ImportanceBalance(routed, &balance);
      break;
  }
  return balance;
}

void Router::AddLosses(const Routed& routed, layers::LayerLosses* losses) const {
  const RouterOptions& o = options_;
  const int64_t rows = routed.logits_NE.size(0);
  if (rows == 0 || routed.row_scale == 0.0) return;
  const Balance balance = BalanceOf(routed);
  struct Sums {
    double balance = 0;
    double squares = 0;
  };
  std::vector<Sums> blocks(static_cast<size_t>((rows + kRowBlock - 1) / kRowBlock));
  ByType(routed.logits_NE.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    const S* z = static_cast<const S*>(routed.logits_NE.data_ptr());
    ForBlocks(rows, [&](int64_t block, int64_t begin, int64_t end) {
      RowScores<S> row;
      Sums& sums = blocks[static_cast<size_t>(block)];
      for (int64_t r = begin; r < end; ++r) {
        row.Compute(z + r * o.experts, o.experts, o.sigmoid);
        sums.squares += static_cast<double>(row.log_sum) * static_cast<double>(row.log_sum);
        const double* softmax = SetOf(balance.of_softmax, balance.row_set, r, o.experts);
        const double* share = SetOf(balance.of_share, balance.row_set, r, o.experts);
        double dot = 0;
        double sum = 0;
        for (size_t e = 0; e < row.scores.size(); ++e) {
          if (softmax != nullptr) sums.balance += softmax[e] * static_cast<double>(row.softmax[e]);
          if (share != nullptr) dot += share[e] * static_cast<double>(row.scores[e]);
          sum += static_cast<double>(row.scores[e]);
        }
        if (share != nullptr) sums.balance += dot / sum;
      }
    });
  });
  losses->balance += balance.importance;
  for (const Sums& sums : blocks) {
    losses->balance += sums.balance;
    losses->router_z += o.z_coefficient * routed.row_scale * sums.squares;
  }
}

void Router::LogitsGradient(const Routed& routed, const at::Tensor& dweights,
                            const at::Tensor& dlogits) const {
  const RouterOptions& o = options_;
  const Balance balance = BalanceOf(routed);
  ByType(dlogits.scalar_type(), [&](auto zero) {
    using S = decltype(zero);
    const S* z = static_cast<const S*>(routed.logits_NE.data_ptr());
    const S* dg = static_cast<const S*>(dweights.data_ptr());
    S* dz = static_cast<S*>(dlogits.data_ptr());
    const S z_scale = static_cast<S>(2.0 * o.z_coefficient * routed.row_scale);
    ForBlocks(dlogits.size(0), [&](int64_t, int64_t begin, int64_t end) {
      RowGradient<S> gradient;
      for (int64_t r = begin; r < end; ++r) {
        const RowBalance row{SetOf(balance.of_softmax, balance.row_set, r, o.experts),
                             SetOf(balance.of_share, balance.row_set, r, o.experts),
                             SetOf(balance.of_weight, balance.row_set, r, o.experts)};
        gradient.Compute(o, z + r * o.experts, routed.experts.data() + r * o.top_k,
                         dg + r * o.top_k, row, z_scale, dz + r * o.experts);
      }
    });
  });
}

void Router::WeightGradient(const at::Tensor& dlogits, const at::Tensor& h) const {
  const int64_t width = h.size(1);
  layers::CheckMatrix(gradient_ED_, dlogits.size(1), width, dlogits.scalar_type());
  layers::CheckMatrix(dlogits, h.size(0), options_.experts, layers::StatisticsTypeOf(h));
  const pw::RouterWeightGradient p{h.size(0),          width,        options_.experts,
                                   dlogits.data_ptr(), h.data_ptr(), gradient_ED_.data_ptr()};
  const pw::Table& kernels = pw::Kernels(ElementOf(h));
  at::parallel_for(0, width, kColumnBlock, [&](int64_t begin, int64_t end) {
    kernels.router_weight_gradient(p, {begin, end});
  });
}

}  // namespace heddle::moe
