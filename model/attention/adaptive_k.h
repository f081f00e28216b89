// How many keys a query of GSA attends to, from the spread of its indexer scores. Plain numbers: no
// tensors, so that a forward and a decoder count alike. Source: attention-and-moe.md section 7.2.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace heddle::v1 {
class GsaConfig;
}

namespace heddle::attention {

// Of the scores of one row over its visible keys.
struct ScoreSpread {
  double mean = 0;
  double variance = 0;  // population
  double maximum = 0;
  double entropy = 0;   // of softmax over the scores, natural log
  int64_t visible = 1;  // keys
  int64_t columns = 1;  // tokens of the document: `variance` alone reads it, and so is not causal
};

class AdaptiveK {
 public:
  enum class Kind { kFixed, kVarianceCausal, kVariance, kEntropy, kLearned };

  explicit AdaptiveK(const heddle::v1::GsaConfig& config);

  Kind kind() const { return kind_; }
  bool needs_scores() const { return kind_ != Kind::kFixed; }
  // Rows with at most so many visible keys keep all of them.
  int64_t least() const { return kind_ == Kind::kFixed ? k_base_ : k_min_; }

  // The learned kind's MLP 3-32-1 (ReLU), reads (mean, standard deviation, maximum). Nothing in
  // the design gives it a gradient: it keeps the weights it was given. Values in file order: first
  // [32, 3], first bias [32], second [1, 32], second bias [1].
  static constexpr int kHidden = 32;
  struct Mlp {
    std::vector<double> first;
    std::vector<double> first_bias;
    std::vector<double> second;
    double second_bias = 0;
  };
  void set_mlp(Mlp mlp) { mlp_ = std::move(mlp); }

  // What the variance kinds compare with `reference`: the population variance over the visible
  // scores (kVarianceCausal), or the unbiased variance over all columns with hidden scores taken
  // as 0 (kVariance).
  double Spread(const ScoreSpread& row) const;
  // Keys of the row, 1 .. row.visible. `reference` is the variance at which tau = 1 gives k_base;
  // <= 0 means that none is known yet: the row then counts as lying at the reference. A NaN gives
  // k_min.
  int32_t Count(const ScoreSpread& row, double reference) const;

 private:
  double Learned(const ScoreSpread& row) const;

  Kind kind_;
  int64_t k_base_;
  int64_t k_min_;
  int64_t k_max_;
  double temperature_;
  Mlp mlp_;
};

}  // namespace heddle::attention
