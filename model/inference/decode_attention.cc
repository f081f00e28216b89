#include "model/inference/decode_attention.h"

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"

namespace heddle::inference {

void DecodeAttention::Backward(const layers::PassContext& /*context*/, const at::Tensor& /*h*/,
                               const at::Tensor& /*gradient*/, const at::Tensor& /*dh*/) {
  HEDDLE_CHECK(false, "decoding has no backward");
}

std::unique_ptr<DecodeAttention> MakeDecodeAttention(const DecodeLayerContext& context,
                                                     const layers::LayerStorage& storage) {
  const heddle::v1::AttentionKind kind = model::LayerKind(*context.config, storage.layer);
  switch (kind) {
    case heddle::v1::ATTENTION_KIND_DENSE:
    case heddle::v1::ATTENTION_KIND_SWA:
      return MakeDecodeGqa(context, storage);
    case heddle::v1::ATTENTION_KIND_NSA:
      return MakeDecodeNsa(context, storage);
    case heddle::v1::ATTENTION_KIND_GSA:
      return MakeDecodeIndexed(context, storage);
    case heddle::v1::ATTENTION_KIND_MLA:
      return MakeDecodeMla(context, storage);
    case heddle::v1::ATTENTION_KIND_DSA:
      return model::LayerUsesLatent(*context.config, storage.layer)
                 ? MakeDecodeMla(context, storage)
                 : MakeDecodeIndexed(context, storage);
    default:
      HEDDLE_CHECK(false, "PlanModel accepts no layer of kind ", static_cast<int>(kind));
      return nullptr;
  }
}

}  // namespace heddle::inference
