// Rotary position embedding: frequencies with their scalings, and tables of cosines and sines that
// grow with the longest document seen. Angles are formed in double, as an integer position times a
// frequency. Source: attention-and-moe.md section 3.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <utility>
#include <vector>

namespace at {
class Tensor;
}
namespace heddle::v1 {
class ModelConfig;
}

namespace heddle::layers {

struct RopeFrequencies {
  std::vector<double> inverse;      // [head_dim / 2], radians per position
  double softmax_scale_factor = 1;  // yarn: mscale'^2, multiplies 1/sqrt(Dk)
  bool interleaved = false;
};

// Scaling none, linear, ntk, llama3 and yarn. REQUIRES: head_dim even.
RopeFrequencies RopeFrequenciesOf(const heddle::v1::ModelConfig& config, int64_t head_dim);

// Cosines and sines of positions 0, 1, ... in the statistics type (fp32, or fp64 for the reference
// precision). A table belongs to a config value: two models in one process never share one.
class RopeTables {
 public:
  RopeTables(RopeFrequencies frequencies, bool fp64);
  ~RopeTables();
  RopeTables(const RopeTables&) = delete;
  RopeTables& operator=(const RopeTables&) = delete;

  const RopeFrequencies& frequencies() const { return frequencies_; }
  // Makes positions [0, length) available.
  void Ensure(int64_t length);
  const at::Tensor& cosine() const;  // [positions, head_dim / 2]
  const at::Tensor& sine() const;

 private:
  struct Tables;
  RopeFrequencies frequencies_;
  bool fp64_;
  std::unique_ptr<Tables> tables_;
};

// The tables that one model needs: heads, MLA's rotary part and v32's indexers rotate different
// widths, and the indexer always uses the half layout. Layers share them. One thread.
class RopeSet {
 public:
  // REQUIRES: `config` outlives the set.
  RopeSet(const heddle::v1::ModelConfig& config, bool fp64);
  ~RopeSet();

  // In the layout of the configuration. Made at the first call, stays at its address.
  const RopeTables& Tables(int64_t width);
  const RopeTables& HalfLayout(int64_t width);
  // Makes positions [0, length) available in every table, made already or later.
  void Ensure(int64_t length);

 private:
  const RopeTables& Get(int64_t width, bool interleaved);

  const heddle::v1::ModelConfig& config_;
  bool fp64_;
  int64_t length_ = 0;
  std::map<std::pair<int64_t, bool>, std::unique_ptr<RopeTables>> tables_;
};

}  // namespace heddle::layers
