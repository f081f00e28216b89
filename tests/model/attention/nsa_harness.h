// One NSA layer with its parameters in flat buffers, for tests: any sizes, any compute type.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/full_like.h>
#include <ATen/ops/sub.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/rng/rng.h"
#include "heddle/v1/config.pb.h"
#include "model/attention/nsa_layer.h"

namespace heddle::attention {

struct NsaSizes {
  int64_t d_model = 20;
  int64_t heads = 4;
  int64_t kv_heads = 2;
  int64_t dim = 6;
  int32_t kernel_size = 4;
  int32_t stride = 2;
  int32_t block = 8;
  int32_t topk = 3;
  int32_t init_blocks = 1;
  int32_t local_blocks = 1;
  int32_t window = 6;
  heddle::v1::NsaConfig::CompressType type = heddle::v1::NsaConfig::COMPRESS_TYPE_WEIGHTEDPOOL;
  bool separate = false;
  bool interleaved = false;
};

inline heddle::v1::ModelConfig ConfigOf(const NsaSizes& sizes) {
  heddle::v1::ModelConfig config;
  config.set_d_model(static_cast<int32_t>(sizes.d_model));
  config.set_vocab_size(8);
  config.set_n_layers(1);
  config.set_d_ffn(8);
  config.set_n_heads(static_cast<int32_t>(sizes.heads));
  config.set_n_kv_heads(static_cast<int32_t>(sizes.kv_heads));
  config.set_head_dim(static_cast<int32_t>(sizes.dim));
  config.mutable_rope()->set_theta(1e4);
  if (sizes.interleaved) {
    config.mutable_rope()->set_layout(heddle::v1::RopeConfig::LAYOUT_INTERLEAVED);
  }
  config.mutable_attention()->set_kind(heddle::v1::ATTENTION_KIND_NSA);
  heddle::v1::NsaConfig* nsa = config.mutable_attention()->mutable_nsa();
  nsa->set_compress_type(sizes.type);
  nsa->set_kernel_size(sizes.kernel_size);
  nsa->set_kernel_stride(sizes.stride);
  nsa->set_block_size(sizes.block);
  nsa->set_topk(sizes.topk);
  nsa->set_init_blocks(sizes.init_blocks);
  nsa->set_local_blocks(sizes.local_blocks);
  nsa->set_window_size(sizes.window);
  if (sizes.separate) nsa->set_kv(heddle::v1::NsaConfig::KV_SEPARATE);
  return config;
}

// Packed documents that own what layers::Documents borrows.
struct NsaBatch {
  explicit NsaBatch(const std::vector<int32_t>& lengths) {
    for (const int32_t length : lengths) {
      for (int32_t t = 0; t < length; ++t) positions.push_back(t);
      cu.push_back(cu.back() + length);
      longest = std::max<int64_t>(longest, length);
    }
  }
  layers::Documents documents() const { return {cu, positions, longest}; }
  int64_t rows() const { return cu.back(); }

  std::vector<int32_t> cu = {0};
  std::vector<int32_t> positions;
  int64_t longest = 0;
};

inline at::Tensor RandomTensor(at::IntArrayRef shape, uint64_t seed, double scale = 1.0) {
  at::Tensor out = at::empty(shape, at::kDouble);
  const Rng rng(seed, "test.nsa");
  double* values = out.data_ptr<double>();
  for (int64_t i = 0; i < out.numel(); ++i) {
    values[i] = scale * rng.NormalAt(static_cast<uint64_t>(i));
  }
  return out;
}

class NsaModel {
 public:
  explicit NsaModel(const NsaSizes& sizes, at::ScalarType type = at::kDouble)
      : sizes_(sizes),
        config_(ConfigOf(sizes)),
        plan_(*model::PlanModel(config_)),
        type_(type),
        weights_(at::zeros({plan_.flat_elements}, type)),
        gradients_(at::zeros({plan_.flat_elements}, layers::StatisticsType(type))),
        ropes_(config_, type == at::kDouble) {
    storage_.plan = &plan_;
    storage_.weights = {weights_};
    storage_.gradients = {gradients_};
    storage_.type = type;
    layer_ = MakeNsa(config_, storage_, &ropes_);
    // Large enough that gates, probabilities and selections differ from row to row, small enough
    // that no softmax saturates.
    for (const std::string& name : Names()) {
      const at::Tensor weight = Weight(name);
      const bool linear = weight.dim() == 3 && name != "compress.k_pe";
      const double scale = linear ? 1.2 / std::sqrt(static_cast<double>(weight.size(1))) : 0.35;
      weight.copy_(RandomTensor(weight.sizes(), std::hash<std::string>()(name), scale));
    }
  }

  const NsaSizes& sizes() const { return sizes_; }
  // Tensors of the attention, without "self_attn.".
  std::vector<std::string> Names() const {
    const std::string prefix = "model.layers.0.self_attn.";
    std::vector<std::string> names;
    for (const model::TensorSpec& spec : plan_.tensors) {
      if (spec.name.starts_with(prefix)) names.push_back(spec.name.substr(prefix.size()));
    }
    return names;
  }
  at::Tensor Weight(const std::string& name) const { return storage_.Weight("self_attn." + name); }
  at::Tensor Gradient(const std::string& name) const {
    return storage_.Gradient("self_attn." + name);
  }
  at::Tensor weights() const { return weights_; }
  at::Tensor gradients() const { return gradients_; }
  layers::RopeSet* ropes() { return &ropes_; }
  NsaWeights MakeWeights() { return NsaWeights(config_, storage_, &ropes_); }
  int64_t pool_bytes() const { return kept_.bytes() + scratch_.bytes(); }
  layers::BufferPool* kept() { return &kept_; }
  layers::BufferPool* scratch() { return &scratch_; }

  // out = f(h), without a residual; undefined if not `wanted`.
  at::Tensor Forward(const NsaBatch& batch, const at::Tensor& h, layers::Pass pass,
                     bool wanted = true, layers::CacheRows* cache_rows = nullptr) {
    const layers::Documents documents = batch.documents();
    ropes_.Ensure(std::max<int64_t>(batch.longest, 1));
    if (pass != layers::Pass::kRecompute) layer_->Begin(documents);
    kept_.Release(0);
    layers::PassContext context = ContextOf(documents, pass);
    context.cache_rows = cache_rows;
    at::Tensor out;
    if (wanted) out = at::empty_like(h);
    layer_->Forward(context, h, at::zeros_like(h), out);
    return out;
  }

  // dh; gradients of the weights are overwritten.
  at::Tensor Backward(const NsaBatch& batch, const at::Tensor& h, const at::Tensor& gradient) {
    const layers::Documents documents = batch.documents();
    gradients_.zero_();
    at::Tensor dh = at::full_like(h, std::numeric_limits<double>::quiet_NaN());
    layer_->Backward(ContextOf(documents, layers::Pass::kTrain), h, gradient, dh);
    return dh;
  }

 private:
  layers::PassContext ContextOf(const layers::Documents& documents, layers::Pass pass) {
    layers::PassContext context;
    context.pass = pass;
    context.documents = &documents;
    context.kept = &kept_;
    context.scratch = &scratch_;
    return context;
  }

  NsaSizes sizes_;
  heddle::v1::ModelConfig config_;
  model::ModelPlan plan_;
  at::ScalarType type_;
  at::Tensor weights_;
  at::Tensor gradients_;
  layers::RopeSet ropes_;
  layers::LayerStorage storage_;
  layers::BufferPool kept_;
  layers::BufferPool scratch_;
  std::unique_ptr<layers::Sublayer> layer_;
};

// The branches of a layer by the functions that a decoder uses, with everything on the way.
struct NsaBranchesRun {
  NsaBranchesRun(NsaModel* model, const NsaBatch& batch, const at::Tensor& h,
                 bool with_scores = false)
      : weights(model->MakeWeights()) {
    const layers::Documents documents = batch.documents();
    const NsaShape& shape = weights.shape();
    model->ropes()->Ensure(std::max<int64_t>(batch.longest, 1));
    rows = weights.Project(h, batch.positions, &pool);
    windows = WindowsOf(shape.compression, documents);
    geometry = GeometryOf(shape, QueriesOf(documents, windows));
    keys = {.k = rows.k, .v = rows.v, .window_k = rows.window_k, .window_v = rows.window_v};
    weights.CompressRows(windows, rows.raw_k, rows.raw_v, &pool, &scratch, &keys.kc, &keys.vc);
    attended = TakeAttended(shape, batch.rows(), h.scalar_type(), &pool);
    AttendCompressed(shape, geometry, rows.q, keys, attended);
    if (with_scores) {
      const int64_t blocks = (std::max<int64_t>(batch.longest, 1) - 1) / shape.selection.block + 1;
      scores = at::zeros({batch.rows(), shape.heads.kv, blocks}, attended.lse[0].scalar_type());
    }
    selected =
        SelectBlocks(shape, geometry.queries, rows.q, keys.kc, attended.lse[0], &scratch, scores);
    AttendTokens(shape, geometry, selected.sets, rows.q, keys, attended);
  }

  // Blocks of (row, key head), as numbers within the document.
  std::vector<int> Blocks(int64_t row, int64_t group) const {
    const KeySets& sets = selected.sets;
    const size_t pair = static_cast<size_t>(row * sets.set_heads + group);
    std::vector<int> out;
    for (int64_t i = sets.offsets[pair]; i < sets.offsets[pair + 1]; ++i) {
      out.push_back((sets.first[static_cast<size_t>(i)] -
                     geometry.queries.key_first[static_cast<size_t>(row)]) /
                    sets.width);
    }
    return out;
  }
  const at::Tensor& cmp() const { return attended.out[0]; }
  const at::Tensor& slc() const { return attended.out[1]; }
  const at::Tensor& win() const { return attended.out[2]; }

  layers::BufferPool pool;
  layers::BufferPool scratch;
  NsaWeights weights;
  NsaRows rows;
  CompressionWindows windows;
  NsaGeometry geometry;
  NsaKeys keys;
  SelectedBlocks selected;
  NsaAttended attended;
  at::Tensor scores;  // [N, J, blocks of the longest], if asked
};

// A layer whose input rows are [q | k | v | gate logits] themselves and whose output rows begin
// with o: every product with a weight is exact, and dh is the gradient of the branches' inputs.
inline NsaSizes TransparentSizes(NsaSizes sizes) {
  sizes.d_model = (sizes.heads + 2 * sizes.kv_heads) * sizes.dim + 3 * sizes.heads;
  return sizes;
}
inline void MakeTransparent(const NsaModel& model) {
  const NsaSizes& s = model.sizes();
  const auto identity = [&](const std::string& name, int64_t first_row, int64_t first_column) {
    at::Tensor weight = model.Weight(name);
    weight.zero_();
    const int64_t count = std::min(weight.size(0) - first_row, weight.size(1) - first_column);
    weight.narrow(0, first_row, count).narrow(1, first_column, count).fill_diagonal_(1.0);
  };
  const int64_t q = s.heads * s.dim;
  const int64_t kv = s.kv_heads * s.dim;
  identity("q_proj.weight", 0, 0);
  identity("k_proj.weight", 0, q);
  identity("v_proj.weight", 0, q + kv);
  identity("gate_proj.weight", 0, q + 2 * kv);
  identity("o_proj.weight", 0, 0);
}

inline std::vector<double> ToVector(const at::Tensor& t) {
  const at::Tensor wide = t.to(at::kDouble).contiguous();
  return {wide.data_ptr<double>(), wide.data_ptr<double>() + wide.numel()};
}

// Largest absolute value; infinity if any is NaN.
inline double Largest(const at::Tensor& t) {
  double worst = 0;
  for (const double value : ToVector(t)) {
    if (std::isnan(value)) return std::numeric_limits<double>::infinity();
    worst = std::max(worst, std::abs(value));
  }
  return worst;
}
inline double MaxDifference(const at::Tensor& a, const at::Tensor& b) {
  EXPECT_EQ(a.sizes(), b.sizes());
  return a.numel() == 0 ? 0 : Largest(at::sub(a.to(at::kDouble), b.to(at::kDouble)));
}
inline bool SameBits(const at::Tensor& a, const at::Tensor& b) {
  const at::Tensor x = a.contiguous();
  const at::Tensor y = b.contiguous();
  return x.nbytes() == y.nbytes() && std::memcmp(x.data_ptr(), y.data_ptr(), x.nbytes()) == 0;
}
// Input rows of a batch.
inline at::Tensor RandomRows(const NsaModel& model, const NsaBatch& batch, uint64_t seed = 5) {
  return RandomTensor({batch.rows(), model.sizes().d_model}, seed);
}

inline constexpr heddle::v1::NsaConfig::CompressType kCompressTypes[] = {
    heddle::v1::NsaConfig::COMPRESS_TYPE_AVGPOOL, heddle::v1::NsaConfig::COMPRESS_TYPE_WEIGHTEDPOOL,
    heddle::v1::NsaConfig::COMPRESS_TYPE_LINEAR};

}  // namespace heddle::attention
