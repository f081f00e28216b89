#include "model/attention/document_groups.h"

#include <ATen/core/Tensor.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <tuple>

#include "base/status/status.h"
#include "model/attention/row_copy.h"

namespace heddle::attention {
namespace {

// Documents from this length on run in place; shorter ones share a padded call, because a call
// costs tens of microseconds.
constexpr int32_t kLongDocument = 256;
// Padded places may exceed the tokens by this factor within a group.
constexpr double kPaddingFactor = 1.25;

}  // namespace

std::vector<Document> DocumentsOf(const std::vector<int32_t>& cu_seqlens) {
  std::vector<Document> documents;
  for (size_t b = 0; b + 1 < cu_seqlens.size(); ++b) {
    const int32_t length = cu_seqlens[b + 1] - cu_seqlens[b];
    if (length > 0) documents.push_back({cu_seqlens[b], length});
  }
  return documents;
}

void DocumentGroups::Begin(const std::vector<Document>& documents) {
  groups_.clear();
  std::vector<Document> shorter;
  for (const Document& document : documents) {
    if (document.length < kLongDocument) {
      shorter.push_back(document);
      continue;
    }
    // Neighbours of one length are already a batch.
    if (!groups_.empty()) {
      Group& last = groups_.back();
      if (last.length == document.length &&
          last.first_row + last.batch * last.length == document.first_row) {
        ++last.batch;
        continue;
      }
    }
    Group group;
    group.batch = 1;
    group.length = document.length;
    group.first_row = document.first_row;
    groups_.push_back(group);
  }
  AddPadded(std::move(shorter));
}

void DocumentGroups::AddPadded(std::vector<Document> documents) {
  std::stable_sort(documents.begin(), documents.end(),
                   [](const Document& a, const Document& b) { return a.length > b.length; });
  size_t begin = 0;
  while (begin < documents.size()) {
    const int64_t length = documents[begin].length;
    int64_t tokens = 0;
    size_t end = begin;
    while (end < documents.size()) {
      const int64_t with_next = tokens + documents[end].length;
      const double places = static_cast<double>(length) * static_cast<double>(end - begin + 1);
      if (places > kPaddingFactor * static_cast<double>(with_next) + 16.0) break;
      tokens = with_next;
      ++end;
    }
    Group group;
    group.batch = static_cast<int64_t>(end - begin);
    group.length = length;
    for (size_t i = begin; i < end; ++i) {
      for (int32_t t = 0; t < length; ++t) {
        group.index.push_back(t < documents[i].length ? documents[i].first_row + t : kNoRow);
      }
    }
    groups_.push_back(std::move(group));
    begin = end;
  }
}

// [B, heads, L, D] of the group: a view, or a padded copy.
at::Tensor DocumentGroups::Take(const Group& group, const at::Tensor& rows) const {
  const int64_t heads = rows.size(1);
  const int64_t width = rows.size(2);
  if (!group.padded()) {
    const int64_t stride = rows.stride(0);
    return rows.narrow(0, group.first_row, group.batch * group.length)
        .as_strided({group.batch, heads, group.length, width},
                    {group.length * stride, width, stride, 1},
                    rows.storage_offset() + group.first_row * stride);
  }
  const at::Tensor tiles = at::empty({group.batch, group.length, heads, width}, rows.options());
  GatherRows(rows, group.index, tiles);
  return tiles.transpose(1, 2);
}

void DocumentGroups::Put(const Group& group, const at::Tensor& tiles, const at::Tensor& rows) {
  const at::Tensor by_row = tiles.transpose(1, 2);  // [B, L, heads, D]
  if (group.padded()) {
    ScatterRows(by_row.contiguous(), group.index, rows);
  } else {
    const int64_t count = group.batch * group.length;
    rows.narrow(0, group.first_row, count)
        .copy_(by_row.reshape({count, rows.size(1), rows.size(2)}));
  }
}

void DocumentGroups::Forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const at::Tensor& out, Saved* saved) const {
  for (const Group& group : groups_) {
    auto [tiles, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
        Take(group, q), Take(group, k), Take(group, v), /*dropout_p=*/0.0, /*is_causal=*/true,
        /*attn_mask=*/std::nullopt, scale_);
    Put(group, tiles, out);
    if (saved != nullptr) saved->tensors.push_back(lse);
  }
}

void DocumentGroups::Backward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const at::Tensor& out, const Saved& saved, const at::Tensor& dout,
                              const at::Tensor& dq, const at::Tensor& dk,
                              const at::Tensor& dv) const {
  HEDDLE_CHECK(saved.tensors.size() >= groups_.size());
  for (size_t i = 0; i < groups_.size(); ++i) {
    const Group& group = groups_[i];
    auto [dq_tiles, dk_tiles, dv_tiles] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        Take(group, dout), Take(group, q), Take(group, k), Take(group, v), Take(group, out),
        saved.tensors[i], /*dropout_p=*/0.0, /*is_causal=*/true, /*attn_mask=*/std::nullopt,
        scale_);
    Put(group, dq_tiles, dq);
    Put(group, dk_tiles, dk);
    Put(group, dv_tiles, dv);
  }
}

}  // namespace heddle::attention
