// Causal attention over a set of documents through LibTorch's flash kernel: documents are put into
// groups that run as one batched call. Used by dense attention for all documents, by the sliding
// window for those that fit into it.
#pragma once

#include <cstdint>
#include <vector>

#include "model/attention/attention.h"

namespace heddle::attention {

struct Document {
  int32_t first_row = 0;
  int32_t length = 0;
};

// The documents of cu_seqlens that have at least one token.
std::vector<Document> DocumentsOf(const std::vector<int32_t>& cu_seqlens);

class DocumentGroups {
 public:
  explicit DocumentGroups(double scale) : scale_(scale) {}

  void Begin(const std::vector<Document>& documents);
  // As AttentionCore; only the rows of the documents of Begin are read and written. Appends to
  // `saved` (nullable), and reads from position `first_saved` on.
  void Forward(const at::Tensor& q_NHD, const at::Tensor& k_NJD, const at::Tensor& v_NJD,
               const at::Tensor& out_NHD, Saved* saved) const;
  void Backward(const at::Tensor& q_NHD, const at::Tensor& k_NJD, const at::Tensor& v_NJD,
                const at::Tensor& out_NHD, const Saved& saved, const at::Tensor& dout_NHD,
                const at::Tensor& dq_NHD, const at::Tensor& dk_NJD, const at::Tensor& dv_NJD) const;
  // Tensors that Forward appends.
  size_t saved_count() const { return groups_.size(); }

 private:
  struct Group {
    int64_t batch = 0;
    int64_t length = 0;
    int32_t first_row = 0;       // strided: `batch` documents of `length` rows end to end
    std::vector<int32_t> index;  // padded: row of each place [batch x length], or kNoRow
    bool padded() const { return !index.empty(); }
  };

  at::Tensor Take(const Group& group, const at::Tensor& rows_NHD) const;
  static void Put(const Group& group, const at::Tensor& tiles_BHLD, const at::Tensor& rows_NHD);
  void AddPadded(std::vector<Document> documents);

  double scale_;
  std::vector<Group> groups_;
};

}  // namespace heddle::attention
