#include <cmath>
#include <numeric>
#include <utility>

#include "data/pack/checksum.h"
#include "data/stream/sequence_stream.h"

namespace heddle::stream {
namespace {

// Sources alternate with this period, so that counts are known without walking from 0.
constexpr int64_t kPeriod = 1 << 16;

// Multiples of 1 / kPeriod closest to the weights' shares, at least one each, that add up to one.
std::vector<int64_t> RoundShares(const std::vector<WeightedSource>& sources) {
  double sum = 0;
  for (const WeightedSource& source : sources) sum += source.weight;
  std::vector<int64_t> shares;
  for (const WeightedSource& source : sources) {
    const double exact = source.weight / sum * static_cast<double>(kPeriod);
    shares.push_back(std::max<int64_t>(1, std::llround(exact)));
  }
  // Rounding leaves a few too many or too few; the largest share bears them with the least harm.
  while (true) {
    const int64_t excess = std::accumulate(shares.begin(), shares.end(), int64_t{0}) - kPeriod;
    if (excess == 0) return shares;
    const auto largest = std::max_element(shares.begin(), shares.end());
    *largest -= std::min(excess, *largest - 1);
  }
}

class Mixture : public SequenceSource {
 public:
  explicit Mixture(std::vector<WeightedSource> sources) : sources_(std::move(sources)) {
    shares_ = RoundShares(sources_);
    std::vector<int64_t> counts(sources_.size(), 0);
    for (int64_t i = 0; i < kPeriod; ++i) {
      size_t best = 0;
      int64_t best_deficit = 0;
      for (size_t k = 0; k < sources_.size(); ++k) {
        // How far source k is behind after this draw, in units of 1 / kPeriod.
        const int64_t deficit = (i + 1) * shares_[k] - counts[k] * kPeriod;
        if (k == 0 || deficit > best_deficit) {
          best = k;
          best_deficit = deficit;
        }
      }
      pattern_.push_back({static_cast<uint32_t>(best), static_cast<uint32_t>(counts[best])});
      ++counts[best];
    }
    HEDDLE_CHECK(counts == shares_);
  }

  Status AppendAs(int64_t index, int64_t global_index, PackedBatch* batch) const override {
    const auto [source, local] = Locate(index);
    return sources_[source].source->AppendAs(local, global_index, batch);
  }

  SequenceShape Shape(int64_t index) const override {
    const auto [source, local] = Locate(index);
    SequenceShape shape = sources_[source].source->Shape(local);
    shape.index = index;
    return shape;
  }

  std::string fingerprint() const override {
    std::string text = "mixture 1";
    for (size_t k = 0; k < sources_.size(); ++k) {
      text += Str(" ", shares_[k], " ", sources_[k].source->fingerprint());
    }
    return pack::Xxh3Hex(text);
  }

 private:
  struct Turn {
    uint32_t source;
    uint32_t count;  // of that source's earlier turns in the period
  };

  std::pair<size_t, int64_t> Locate(int64_t index) const {
    const Turn& turn = pattern_[static_cast<size_t>(index % kPeriod)];
    return {turn.source, index / kPeriod * shares_[turn.source] + turn.count};
  }

  std::vector<WeightedSource> sources_;
  std::vector<int64_t> shares_;
  std::vector<Turn> pattern_;
};

}  // namespace

StatusOr<std::unique_ptr<SequenceSource>> MakeMixture(std::vector<WeightedSource> sources) {
  if (sources.empty()) return InvalidArgument("mixture: no source");
  if (sources.size() > kPeriod / 2) return InvalidArgument("mixture: too many sources");
  for (const WeightedSource& source : sources) {
    if (!(source.weight > 0) || !std::isfinite(source.weight)) {
      return InvalidArgument(Str("mixture: weight ", source.weight, ": must be positive"));
    }
  }
  return std::unique_ptr<SequenceSource>(new Mixture(std::move(sources)));
}

}  // namespace heddle::stream
