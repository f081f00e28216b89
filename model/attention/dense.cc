// Dense causal attention: every document through the grouped flash kernel.
#include <ATen/core/Tensor.h>

#include "model/attention/attention.h"
#include "model/attention/document_groups.h"

namespace heddle::attention {
namespace {

class Dense : public AttentionCore {
 public:
  explicit Dense(double scale) : groups_(scale) {}

  void Begin(const std::vector<int32_t>& cu_seqlens) override {
    groups_.Begin(DocumentsOf(cu_seqlens));
  }

  void Forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
               Saved* saved) override {
    if (saved != nullptr) saved->tensors.clear();
    groups_.Forward(q, k, v, out, saved);
  }

  void Backward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const at::Tensor& out, const Saved& saved, const at::Tensor& dout,
                const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) override {
    groups_.Backward(q, k, v, out, saved, dout, dq, dk, dv);
  }

 private:
  DocumentGroups groups_;
};

}  // namespace

std::unique_ptr<AttentionCore> MakeDense(double scale) { return std::make_unique<Dense>(scale); }

}  // namespace heddle::attention
