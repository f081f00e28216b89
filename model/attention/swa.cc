// Sliding window with sinks: our flash kernel where it applies (bf16), else LibTorch's: documents
// that fit into window + sinks are dense. The others are cut into query tiles; tile [a, a + Q)
// attends to slots of keys:
//
//   slot 0 .. A-1            sink s = slot, used if s lies before the tile's window range
//   slot A .. A + W + Q - 2  position a - W + 1 + (slot - A), used if inside the document
//
// All tiles of all documents are one batched flash call with an additive mask, so that work and
// memory are O(T (W + A + Q)). Places of a tile beyond the document's end see every used slot:
// their output is dropped and their gradient is zero.
#include <ATen/core/Tensor.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <limits>
#include <tuple>

#include "base/status/status.h"
#include "model/attention/attention.h"
#include "model/attention/document_groups.h"
#include "model/attention/flash.h"
#include "model/attention/row_copy.h"

namespace heddle::attention {
namespace {

int64_t TileOf(int64_t window) { return std::clamp<int64_t>(window / 2 / 32 * 32, 32, 256); }

class SlidingWindow : public AttentionCore {
 public:
  SlidingWindow(double scale, model::Window window)
      : scale_(scale),
        window_(window),
        tile_(TileOf(window.keys)),
        slots_(window.sinks + window.keys - 1 + tile_),
        within_(scale),
        flash_(scale, window) {}

  void Begin(const std::vector<int32_t>& cu_seqlens) override {
    std::vector<Document> fitting;
    query_rows_.clear();
    key_rows_.clear();
    long_rows_.clear();
    std::vector<float> mask;
    for (const Document& document : DocumentsOf(cu_seqlens)) {
      if (document.length <= window_.keys + window_.sinks) {
        fitting.push_back(document);
      } else {
        AddDocument(document, &mask);
      }
    }
    rows_ = cu_seqlens.back();
    flash_.Begin(DocumentsOf(cu_seqlens), rows_);
    within_.Begin(fitting);
    mask_ = at::empty({Tiles(), 1, tile_, slots_}, at::kFloat);
    if (!mask.empty()) std::copy(mask.begin(), mask.end(), mask_.data_ptr<float>());
  }

  void Forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& out,
               Saved* saved) override {
    if (saved != nullptr) saved->tensors.clear();
    if (Flash::Supports(q)) {
      flash_.Forward(q, k, v, out, saved);
      return;
    }
    within_.Forward(q, k, v, out, saved);
    if (Tiles() == 0) return;
    auto [tiles, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
        Queries(q), Keys(k), Keys(v), /*dropout_p=*/0.0, /*is_causal=*/false, MaskFor(q), scale_);
    ScatterRows(tiles.transpose(1, 2).contiguous(), query_rows_, out);
    if (saved != nullptr) saved->tensors.push_back(lse);
  }

  void Backward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                const at::Tensor& out, const Saved& saved, const at::Tensor& dout,
                const at::Tensor& dq, const at::Tensor& dk, const at::Tensor& dv) override {
    if (Flash::Supports(q)) {
      flash_.Backward(q, k, v, out, saved, dout, dq, dk, dv);
      return;
    }
    within_.Backward(q, k, v, out, saved, dout, dq, dk, dv);
    if (Tiles() == 0) return;
    auto [dq_tiles, dk_tiles, dv_tiles] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        Queries(dout), Queries(q), Keys(k), Keys(v), Queries(out), saved.tensors.back(),
        /*dropout_p=*/0.0, /*is_causal=*/false, MaskFor(q), scale_);
    ScatterRows(dq_tiles.transpose(1, 2).contiguous(), query_rows_, dq);
    SumKeys(dk_tiles, dk);
    SumKeys(dv_tiles, dv);
  }

 private:
  int64_t Tiles() const { return static_cast<int64_t>(query_rows_.size()) / tile_; }

  // Appends the tiles of one document: rows of queries and key slots, and the mask.
  void AddDocument(const Document& document, std::vector<float>* mask) {
    constexpr float kHidden = -std::numeric_limits<float>::infinity();
    for (int32_t row = 0; row < document.length; ++row) {
      long_rows_.push_back(document.first_row + row);
    }
    for (int64_t a = 0; a < document.length; a += tile_) {
      const int64_t low = std::max<int64_t>(0, a - window_.keys + 1);
      std::vector<int64_t> positions(static_cast<size_t>(slots_), -1);
      for (int64_t slot = 0; slot < slots_; ++slot) {
        const bool sink = slot < window_.sinks;
        const int64_t s = sink ? slot : a - window_.keys + 1 + slot - window_.sinks;
        const bool used = sink ? s < low : s >= 0 && s < document.length;
        if (used) positions[static_cast<size_t>(slot)] = s;
        key_rows_.push_back(used ? document.first_row + static_cast<int32_t>(s) : kNoRow);
      }
      for (int64_t t = a; t < a + tile_; ++t) {
        const bool exists = t < document.length;
        query_rows_.push_back(exists ? document.first_row + static_cast<int32_t>(t) : kNoRow);
        for (const int64_t s : positions) {
          const bool visible =
              s >= 0 && (!exists || (s <= t && (t - s < window_.keys || s < window_.sinks)));
          mask->push_back(visible ? 0.0f : kHidden);
        }
      }
    }
  }

  // [tiles, heads, Q, D] and [tiles, heads, slots, D].
  at::Tensor Queries(const at::Tensor& rows) const { return Tiled(rows, query_rows_, tile_); }
  at::Tensor Keys(const at::Tensor& rows) const { return Tiled(rows, key_rows_, slots_); }
  at::Tensor Tiled(const at::Tensor& rows, const std::vector<int32_t>& index,
                   int64_t length) const {
    const at::Tensor tiles =
        at::empty({Tiles(), length, rows.size(1), rows.size(2)}, rows.options());
    GatherRows(rows, index, tiles);
    return tiles.transpose(1, 2);
  }

  at::Tensor MaskFor(const at::Tensor& q) const {
    return q.scalar_type() == at::kDouble ? mask_.to(at::kDouble) : mask_;
  }

  // A key is in the slots of several tiles: its gradients are added in fp32, tiles ascending.
  void SumKeys(const at::Tensor& tiles, const at::Tensor& rows) const {
    const at::ScalarType type = rows.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
    const at::Tensor sums = at::zeros({rows_, rows.size(1) * rows.size(2)}, type);
    ScatterAddRows(tiles.transpose(1, 2).contiguous(), key_rows_, sums);
    ConvertRows(sums, long_rows_, rows);
  }

  double scale_;
  model::Window window_;
  int64_t tile_;
  int64_t slots_;
  DocumentGroups within_;
  Flash flash_;
  int64_t rows_ = 0;
  std::vector<int32_t> query_rows_;  // [tiles x Q]
  std::vector<int32_t> key_rows_;    // [tiles x slots]
  std::vector<int32_t> long_rows_;   // rows of the tiled documents
  at::Tensor mask_;                  // [tiles, 1, Q, slots], 0 or -inf
};

}  // namespace

std::unique_ptr<AttentionCore> MakeSlidingWindow(double scale, model::Window window) {
  return MakeWideningCore(std::make_unique<SlidingWindow>(scale, window));
}

}  // namespace heddle::attention
