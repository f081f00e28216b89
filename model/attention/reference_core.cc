// Dense and window attention through the kernel of the sparse kinds.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "model/attention/attention.h"
#include "model/attention/sparse_attention.h"
#include "model/layers/layers.h"

namespace heddle::attention {
namespace {

class ReferenceCore : public AttentionCore {
 public:
  ReferenceCore(double scale, std::optional<model::Window> window)
      : scale_(scale), window_(window) {}

  void Begin(const std::vector<int32_t>& cu_seqlens) override {
    std::vector<int32_t> positions;
    for (size_t b = 0; b + 1 < cu_seqlens.size(); ++b) {
      for (int32_t t = 0; t < cu_seqlens[b + 1] - cu_seqlens[b]; ++t) positions.push_back(t);
    }
    const layers::Documents documents{.cu_seqlens = cu_seqlens, .positions = positions};
    sets_ = window_.has_value() ? WindowSets(documents, *window_) : CausalSets(documents);
    documents_ = SameRows(documents);
  }

  void Forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
               Saved* saved) override {
    const at::Tensor lse = at::empty({q.size(0), q.size(1)},
                                     q.options().dtype(layers::StatisticsType(q.scalar_type())));
    SparseAttention(scale_, sets_, q, k, v, out, lse);
    if (saved != nullptr) saved->tensors = {lse};
  }

  void Backward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const at::Tensor& out, const Saved& saved, const at::Tensor& dout,
                const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) override {
    SparseAttentionBackward(scale_, sets_, documents_, q, k, v, out, saved.tensors.front(), dout,
                            dq, dk, dv);
  }

 private:
  double scale_;
  std::optional<model::Window> window_;
  KeySets sets_;
  KeyDocuments documents_;
};

}  // namespace

std::unique_ptr<AttentionCore> MakeReferenceCore(double scale,
                                                 std::optional<model::Window> window) {
  return std::make_unique<ReferenceCore>(scale, window);
}

}  // namespace heddle::attention
