// One MLA layer with its own flat buffers, and section 8 of attention-and-moe.md in plain loops.
//
// N tokens, d width, H heads.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "heddle/v1/config.pb.h"
#include "model/attention/mla_layer.h"
#include "model/attention/token_indexer.h"
#include "model/layers/rope.h"
#include "model/layers/sublayer.h"
#include "model/model_plan.h"

namespace heddle::attention {

struct MlaSizes {
  std::string name;
  int32_t d = 12;
  int32_t heads = 2;
  int32_t nope = 4;
  int32_t rotary = 4;
  int32_t value = 3;
  int32_t latent = 6;
  int32_t query_latent = 0;
  bool layernorm = false;
};
heddle::v1::ModelConfig MlaConfigOf(const MlaSizes& sizes);
// The same with DSA's indexer (profile v32, core mla), `topk` keys per token.
heddle::v1::ModelConfig DsaMlaConfigOf(const MlaSizes& sizes, int32_t topk);

// Documents with what they borrow.
struct OwnedDocuments {
  explicit OwnedDocuments(const std::vector<int32_t>& lengths);
  std::vector<int32_t> cu;
  std::vector<int32_t> positions;
  layers::Documents view;
};

// MLA, or DSA on MLA where the kind of the configuration is DSA.
class MlaHarness {
 public:
  MlaHarness(const heddle::v1::ModelConfig& config, at::ScalarType type);
  explicit MlaHarness(const MlaSizes& sizes, at::ScalarType type = at::kDouble)
      : MlaHarness(MlaConfigOf(sizes), type) {}
  MlaHarness(const MlaHarness&) = delete;
  MlaHarness& operator=(const MlaHarness&) = delete;

  const heddle::v1::ModelConfig& config() const { return config_; }
  const model::ModelPlan& plan() const { return plan_; }
  const layers::LayerStorage& storage() const { return storage_; }
  layers::Sublayer* layer() { return layer_.get(); }
  layers::RopeSet* ropes() { return &ropes_; }
  at::ScalarType type() const { return storage_.type; }

  // Names of the layer's tensors, without "model.layers.0.".
  std::vector<std::string> Names() const;
  void SetWeight(const std::string& name, const std::vector<double>& values);
  std::vector<double> Weight(const std::string& name) const;
  std::vector<double> Gradient(const std::string& name) const;
  void ZeroGradients();

  struct Options {
    layers::Pass pass = layers::Pass::kTrain;
    layers::CacheRows* rows = nullptr;
    const layers::StepInfo* step = nullptr;
    layers::LayerLosses* losses = nullptr;
    bool want_out = true;
  };
  // f(h) with a residual of zeros, h [N, d] of the layer's type. kRecompute continues the pools of
  // the forward before it, all other passes start anew.
  at::Tensor Forward(const std::vector<int32_t>& lengths, const at::Tensor& h);
  at::Tensor Forward(const std::vector<int32_t>& lengths, const at::Tensor& h,
                     const Options& options);
  // dh of the last Forward that keeps.
  at::Tensor Backward(const std::vector<int32_t>& lengths, const at::Tensor& h,
                      const at::Tensor& gradient, const layers::StepInfo* step = nullptr);

 private:
  heddle::v1::ModelConfig config_;
  model::ModelPlan plan_;
  at::Tensor weights_;
  at::Tensor gradients_;
  layers::RopeSet ropes_;
  layers::LayerStorage storage_;
  SharedSelection shared_;
  std::unique_ptr<layers::Sublayer> layer_;
  layers::BufferPool kept_;
  layers::BufferPool scratch_;
};

// values [N, columns] as a tensor of the type, and back.
at::Tensor Matrix(const std::vector<double>& values, int64_t columns, at::ScalarType type);
std::vector<double> Values(const at::Tensor& t);
// [rows, columns] -> [columns, rows].
std::vector<double> Transposed(const std::vector<double>& values, int64_t rows);

// y [N, d] of the layer in naive form with the weights of `harness`, by plain loops in double.
std::vector<double> ReferenceMla(const MlaHarness& harness, const std::vector<int32_t>& lengths,
                                 const std::vector<double>& h);

}  // namespace heddle::attention
