// Laws that hold for every kind of model, over shapes and ragged batches that rapidcheck draws
// (attention-and-moe.md section 13: C1, C2, C6, C7). A failure prints the smallest case it shrinks
// to.
#include <ATen/core/Tensor.h>
#include <gtest/gtest.h>
#include <rapidcheck/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "model/padded.h"
#include "tests/model/inference/inference_models.h"
#include "tests/model/tiny_model.h"

namespace heddle::model {
namespace {

using inference_test::BuildStrong;
using inference_test::EveryKind;
using inference_test::NamedConfig;
using model_test::BatchData;
using model_test::Built;
using model_test::DistinctBatch;

struct Case {
  NamedConfig named;
  std::vector<int32_t> lengths;
  uint64_t seed = 0;
};

int32_t Drawn(int32_t first, int32_t last) { return *rc::gen::inRange(first, last + 1); }

// Sizes of the sparse kinds, small against the documents, so that selections leave keys out.
void DrawSparse(heddle::v1::AttentionConfig* attention) {
  if (attention->has_swa()) {
    attention->mutable_swa()->set_window(Drawn(1, 9));
    attention->mutable_swa()->set_sink_size(Drawn(0, 3));
  }
  if (attention->has_nsa()) {
    heddle::v1::NsaConfig* nsa = attention->mutable_nsa();
    const int32_t stride = Drawn(1, 3);
    nsa->set_kernel_stride(stride);
    nsa->set_kernel_size(stride * Drawn(1, 2));
    nsa->set_block_size(2 * stride * Drawn(1, 2));
    nsa->set_topk(Drawn(std::max(1, nsa->init_blocks() + nsa->local_blocks()), 4));
    nsa->set_window_size(Drawn(1, 9));
  }
  if (attention->has_dsa()) {
    attention->mutable_dsa()->set_topk(Drawn(1, 9));
    attention->mutable_dsa()->set_n_indexer_heads(Drawn(1, 3));
  }
  if (attention->has_gsa()) {
    heddle::v1::GsaConfig* gsa = attention->mutable_gsa();
    gsa->set_n_indexer_heads(Drawn(1, 3));
    gsa->set_k_min(Drawn(1, 3));
    gsa->set_k_base(gsa->k_min() + Drawn(0, 4));
    gsa->set_k_max(gsa->k_base() + Drawn(0, 4));
  }
  if (attention->has_mla()) {
    attention->mutable_mla()->set_kv_lora_rank(Drawn(5, 14));
    attention->mutable_mla()->set_qk_nope_head_dim(Drawn(3, 8));
    attention->mutable_mla()->set_qk_rope_head_dim(2 * Drawn(1, 3));
    attention->mutable_mla()->set_v_head_dim(Drawn(3, 8));
  }
}

// Any kind of any of the inference tests' models, with other widths, heads and selections.
Case DrawCase() {
  Case drawn;
  const std::vector<NamedConfig> all = EveryKind();
  drawn.named = all[*rc::gen::inRange<size_t>(0, all.size())];
  drawn.lengths = *rc::gen::resize(
      5, rc::gen::nonEmpty(rc::gen::container<std::vector<int32_t>>(rc::gen::inRange(0, 34))));
  drawn.seed = *rc::gen::inRange<uint64_t>(1, 1000);
  heddle::v1::ModelConfig& config = drawn.named.config;
  config.set_d_model(4 * Drawn(3, 7));
  config.set_d_ffn(Drawn(5, 39));
  const int32_t groups = Drawn(1, 2);
  config.set_n_heads(groups * Drawn(1, 3));
  config.set_n_kv_heads(config.attention().has_mla() ? config.n_heads() : groups);
  config.set_head_dim(2 * Drawn(2, 4));
  DrawSparse(config.mutable_attention());
  if (config.has_moe()) {
    config.mutable_moe()->set_n_experts(Drawn(2, 6));
    config.mutable_moe()->set_top_k(Drawn(1, 2));
  }
  RC_TAG(drawn.named.name);
  return drawn;
}

std::vector<double> Rows(const at::Tensor& logits, int64_t begin, int64_t count) {
  const at::Tensor rows = logits.narrow(0, begin, count).contiguous();
  const double* data = rows.const_data_ptr<double>();
  return {data, data + rows.numel()};
}

double Distance(const std::vector<double>& a, const std::vector<double>& b) {
  double largest = a.size() == b.size() ? 0 : INFINITY;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
    largest = std::max(largest, std::abs(a[i] - b[i]));
  }
  return largest;
}

BatchData Document(const BatchData& batch, size_t b, int32_t length) {
  BatchData one;
  one.ids.assign(batch.ids.begin() + batch.cu[b], batch.ids.begin() + batch.cu[b] + length);
  one.labels.assign(one.ids.size(), kIgnoredLabel);
  one.cu = {0, length};
  return one;
}

RC_GTEST_PROP(EveryKindOfModel, C2PackedEqualsAlone, ()) {
  const Case drawn = DrawCase();
  Built built = BuildStrong(drawn.named.config, Precision::kFp64);
  const BatchData batch = DistinctBatch(drawn.lengths, drawn.named.config.vocab_size(), drawn.seed);
  RC_PRE(!batch.ids.empty());
  const at::Tensor packed = *built.model->Logits(batch.view());
  for (size_t b = 0; b + 1 < batch.cu.size(); ++b) {
    const int32_t length = batch.cu[b + 1] - batch.cu[b];
    if (length == 0) continue;
    const BatchData one = Document(batch, b, length);
    const at::Tensor alone = *built.model->Logits(one.view());
    RC_ASSERT(Distance(Rows(packed, batch.cu[b], length), Rows(alone, 0, length)) < 1e-10);
  }
}

// C6: padding on either side, the rows of tokens are those of the packed batch bit for bit.
RC_GTEST_PROP(EveryKindOfModel, C6PaddedRowsAreZero, ()) {
  const Case drawn = DrawCase();
  Built built = BuildStrong(drawn.named.config, Precision::kFp64);
  const BatchData batch = DistinctBatch(drawn.lengths, drawn.named.config.vocab_size(), drawn.seed);
  RC_PRE(!batch.ids.empty());
  const auto rows = static_cast<int64_t>(drawn.lengths.size());
  const int64_t length = 1 + *std::max_element(drawn.lengths.begin(), drawn.lengths.end());
  std::vector<int64_t> ids(static_cast<size_t>(rows * length), 3);
  std::vector<int64_t> mask(ids.size(), 0);
  for (int64_t b = 0; b < rows; ++b) {
    const int32_t tokens = drawn.lengths[static_cast<size_t>(b)];
    const bool left = *rc::gen::arbitrary<bool>();
    const auto at = static_cast<size_t>(b * length + (left ? length - tokens : 0));
    std::copy_n(batch.ids.begin() + batch.cu[static_cast<size_t>(b)], tokens, ids.begin() + at);
    std::fill_n(mask.begin() + at, tokens, 1);
  }
  const PackedRows packed = *PackPadded(ids, mask, rows, length);
  RC_ASSERT(packed.ids == batch.ids);
  RC_ASSERT(packed.cu_seqlens == batch.cu);
  const at::Tensor logits = *built.model->Logits({packed.ids, {}, packed.cu_seqlens});
  const at::Tensor flat = ScatterPadded(logits, packed, rows, length).flatten(0, 1);
  int64_t next = 0;
  for (int64_t place = 0; place < rows * length; ++place) {
    if (mask[static_cast<size_t>(place)] == 1) {
      RC_ASSERT(Rows(flat, place, 1) == Rows(logits, next++, 1));
    } else {
      RC_ASSERT(Rows(flat, place, 1) == std::vector<double>(logits.size(1), 0.0));
    }
  }
  RC_ASSERT(next == logits.size(0));
}

RC_GTEST_PROP(EveryKindOfModel, C1PrefixesAreConsistent, ()) {
  const Case drawn = DrawCase();
  Built built = BuildStrong(drawn.named.config, Precision::kFp64);
  const int32_t length = *rc::gen::inRange(2, 34);
  const int32_t prefix = *rc::gen::inRange(1, length);
  const BatchData batch = DistinctBatch({length}, drawn.named.config.vocab_size(), drawn.seed);
  const at::Tensor whole = *built.model->Logits(batch.view());
  const BatchData head = Document(batch, 0, prefix);
  const at::Tensor part = *built.model->Logits(head.view());
  RC_ASSERT(Distance(Rows(whole, 0, prefix), Rows(part, 0, prefix)) < 1e-10);
}

RC_GTEST_PROP(EveryKindOfModel, C7TheFutureChangesNothingBefore, ()) {
  const Case drawn = DrawCase();
  Built built = BuildStrong(drawn.named.config, Precision::kFp64);
  const int32_t length = *rc::gen::inRange(2, 34);
  const int32_t changed = *rc::gen::inRange(1, length);
  BatchData batch = DistinctBatch({length}, drawn.named.config.vocab_size(), drawn.seed);
  const std::vector<double> before = Rows(*built.model->Logits(batch.view()), 0, changed);
  int64_t& id = batch.ids[static_cast<size_t>(changed)];
  id = (id + 1) % drawn.named.config.vocab_size();
  const std::vector<double> after = Rows(*built.model->Logits(batch.view()), 0, changed);
  // A token that changes its expert gives that expert's products another number of rows, for which
  // LibTorch may take another kernel, with its own order of the sums.
  if (drawn.named.config.has_moe()) {
    RC_ASSERT(Distance(before, after) < 1e-12);
  } else {
    RC_ASSERT(std::memcmp(before.data(), after.data(), before.size() * sizeof(double)) == 0);
  }
}

}  // namespace
}  // namespace heddle::model
