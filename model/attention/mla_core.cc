#include "model/attention/mla_core.h"

#include <algorithm>

#include "model/attention/attention.h"

namespace heddle::attention {
namespace {

class DenseMlaCore : public MlaCore {
 public:
  explicit DenseMlaCore(const MlaShape& shape)
      : width_(std::max(shape.key(), shape.value)), core_(MakeDense(shape.scale)) {}

  // The bf16 kernel wants a multiple of 32 and takes at most 256 columns.
  int64_t KeyWidth(at::ScalarType type) const override {
    const int64_t rounded = (width_ + 31) / 32 * 32;
    return type == at::kBFloat16 && rounded <= 256 ? rounded : width_;
  }
  int64_t ValueWidth(at::ScalarType type) const override { return KeyWidth(type); }

  void Begin(const layers::Documents& documents) override {
    core_->Begin({documents.cu_seqlens.begin(), documents.cu_seqlens.end()});
  }
  void Forward(const MlaInputs& inputs, const MlaHeads& heads) override {
    const bool keep = layers::Keeps(inputs.context->pass);
    core_->Forward(heads.q_NHK, heads.k_NHK, heads.v_NHE, heads.out_NHE, keep ? &saved_ : nullptr);
  }
  void Backward(const MlaInputs& /*inputs*/, const MlaHeads& heads, const MlaHeads& d) override {
    core_->Backward(heads.q_NHK, heads.k_NHK, heads.v_NHE, heads.out_NHE, saved_, d.out_NHE,
                    d.q_NHK, d.k_NHK, d.v_NHE);
    saved_ = {};
  }

 private:
  int64_t width_;
  std::unique_ptr<AttentionCore> core_;
  Saved saved_;
};

}  // namespace

std::unique_ptr<MlaCore> MakeDenseMlaCore(const MlaShape& shape) {
  return std::make_unique<DenseMlaCore>(shape);
}

}  // namespace heddle::attention
