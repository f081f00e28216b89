// Dense causal attention: our flash kernel where it applies (bf16), else LibTorch's by groups.
#include <ATen/core/Tensor.h>

#include "model/attention/attention.h"
#include "model/attention/document_groups.h"
#include "model/attention/flash.h"

namespace heddle::attention {
namespace {

class Dense : public AttentionCore {
 public:
  explicit Dense(double scale) : groups_(scale), flash_(scale, {}) {}

  void Begin(const std::vector<int32_t>& cu_seqlens) override {
    const std::vector<Document> documents = DocumentsOf(cu_seqlens);
    groups_.Begin(documents);
    flash_.Begin(documents, cu_seqlens.back());
  }

  void Forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
               Saved* saved) override {
    if (saved != nullptr) saved->tensors.clear();
    if (Flash::Supports(q)) {
      flash_.Forward(q, k, v, out, saved);
    } else {
      groups_.Forward(q, k, v, out, saved);
    }
  }

  void Backward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const at::Tensor& out, const Saved& saved, const at::Tensor& dout,
                const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) override {
    if (Flash::Supports(q)) {
      flash_.Backward(q, k, v, out, saved, dout, dq, dk, dv);
    } else {
      groups_.Backward(q, k, v, out, saved, dout, dq, dk, dv);
    }
  }

 private:
  DocumentGroups groups_;
  Flash flash_;
};

}  // namespace

std::unique_ptr<AttentionCore> MakeDense(double scale) {
  return MakeWideningCore(std::make_unique<Dense>(scale));
}

}  // namespace heddle::attention
