// Lets a core work in fp32 where LibTorch's bf16 products are slow (model/layers/products.h) and it
// does not bring its own.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <utility>

#include "model/attention/attention.h"
#include "model/attention/flash.h"
#include "model/layers/products.h"

namespace heddle::attention {
namespace {

class WideningCore : public AttentionCore {
 public:
  explicit WideningCore(std::unique_ptr<AttentionCore> core) : core_(std::move(core)) {}

  void Begin(const std::vector<int32_t>& cu_seqlens) override { core_->Begin(cu_seqlens); }

  void Forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
               Saved* saved) override {
    if (!Widens(q)) {
      core_->Forward(q, k, v, out, saved);
      return;
    }
    const at::Tensor wide = Like(out);
    core_->Forward(layers::Widened(q), layers::Widened(k), layers::Widened(v), wide, saved);
    out.copy_(wide);
  }

  void Backward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const at::Tensor& out, const Saved& saved, const at::Tensor& dout,
                const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) override {
    if (!Widens(q)) {
      core_->Backward(q, k, v, out, saved, dout, dq, dk, dv);
      return;
    }
    const at::Tensor wide[] = {Like(dq), Like(dk), Like(dv)};
    core_->Backward(layers::Widened(q), layers::Widened(k), layers::Widened(v),
                    layers::Widened(out), saved, layers::Widened(dout), wide[0], wide[1], wide[2]);
    at::Tensor to[] = {dq, dk, dv};
    for (int i = 0; i < 3; ++i) to[i].copy_(wide[i]);
  }

 private:
  static bool Widens(const at::Tensor& t) {
    return t.scalar_type() == at::kBFloat16 && layers::WidensBf16() && !Flash::Supports(t);
  }
  static at::Tensor Like(const at::Tensor& t) { return at::empty(t.sizes(), at::kFloat); }

  std::unique_ptr<AttentionCore> core_;
};

}  // namespace

std::unique_ptr<AttentionCore> MakeWideningCore(std::unique_ptr<AttentionCore> core) {
  return std::make_unique<WideningCore>(std::move(core));
}

}  // namespace heddle::attention
