#include "model/attention/mla_absorbed.h"

#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/bmm.h>

#include <tuple>

#include "base/status/status.h"
#include "model/layers/layers.h"
#include "model/layers/products.h"

namespace heddle::attention {
AbsorbedMla::AbsorbedMla(const heddle::v1::ModelConfig& config, const layers::LayerStorage& storage,
                         layers::RopeSet* ropes)
    : projection_(config, storage, ropes) {
  const MlaShape& s = shape();
  const at::Tensor by_head = projection_.weights().kv.view({s.heads, s.nope + s.value, s.latent});
  key_up_HNC_ = by_head.narrow(1, 0, s.nope);
  value_up_HCE_ = by_head.narrow(1, s.nope, s.value).transpose(1, 2);
}

AbsorbedMla::Tokens AbsorbedMla::Project(const at::Tensor& h, std::span<const int32_t> positions,
                                         layers::BufferPool* pool) const {
  const MlaShape& s = shape();
  const MlaProjected p = projection_.Forward(h, positions, pool, pool);
  Tokens tokens;
  tokens.latent_BC = p.latent_NC;
  tokens.rotary_BR = p.kr_NR;
  tokens.indexer_u_BU = s.query_latent > 0 ? p.query_latent_NQ : h;
  tokens.query_BHL = pool->Take({h.size(0), s.heads, row_width()}, h.scalar_type());
  tokens.query_BHL.narrow(2, 0, s.latent)
      .copy_(at::bmm(layers::Widened(p.q_NHK.narrow(2, 0, s.nope)).transpose(0, 1),
                     layers::Widened(key_up_HNC_))
                 .transpose(0, 1));
  tokens.query_BHL.narrow(2, s.latent, s.rotary).copy_(p.q_NHK.narrow(2, s.nope, s.rotary));
  return tokens;
}

void AbsorbedMla::Attend(const at::Tensor& query, const at::Tensor& rows,
                         const at::Tensor& z) const {
  HEDDLE_CHECK(rows.dim() == 2 && rows.size(1) == row_width() && rows.size(0) >= 1);
  HEDDLE_CHECK(query.size(0) == shape().heads && query.size(1) == row_width());
  // The heads are the queries of one head, and the rows are keys and values at once: a row is read
  // for all heads together. The last dr columns of the result are not wanted.
  const at::Tensor keys = layers::Widened(rows).unsqueeze(0).unsqueeze(0);
  const at::Tensor out = std::get<0>(at::_scaled_dot_product_flash_attention_for_cpu(
      layers::Widened(query).unsqueeze(0).unsqueeze(0), keys, keys, /*dropout_p=*/0.0,
      /*is_causal=*/false,
      /*attn_mask=*/std::nullopt, shape().scale));
  at::Tensor to = z;
  to.copy_(out[0][0].narrow(1, 0, shape().latent));
}

void AbsorbedMla::Output(const at::Tensor& z, const at::Tensor& residual, layers::BufferPool* pool,
                         const at::Tensor& out) const {
  const MlaShape& s = shape();
  const at::Tensor o = pool->Take({z.size(0), s.heads, s.value}, z.scalar_type());
  o.copy_(
      at::bmm(layers::Widened(z).transpose(0, 1), layers::Widened(value_up_HCE_)).transpose(0, 1));
  layers::LinearAdd(residual, o.view({z.size(0), s.value_columns()}), projection_.weights().out,
                    out);
}

}  // namespace heddle::attention
