// Keys and values of one layer and one sequence, rotated already.
//
// Dense: row of position s is s. Window: rows 0 .. A-1 are the pinned first A positions, row
// A + (s - A) mod W holds position s >= A. A position that is both sink and inside the window lives
// once, pinned. The rows in use are always the first rows(), so attention needs no index and no
// mask: after position t was stored they are exactly the keys that t sees.
#pragma once

#include <cstdint>
#include <memory>

namespace at {
class Tensor;
}
namespace c10 {
enum class ScalarType : int8_t;
}

namespace heddle::inference {

class KvCache {
 public:
  // window 0: dense.
  KvCache(int64_t kv_heads, int64_t head_dim, int64_t window, int64_t sinks, c10::ScalarType type);
  ~KvCache();
  KvCache(const KvCache&) = delete;
  KvCache& operator=(const KvCache&) = delete;

  // Stores positions length(), length() + 1, ... of [n, J, D] tensors.
  void Append(const at::Tensor& k_NJD, const at::Tensor& v_NJD);
  void Reset();

  int64_t length() const { return length_; }
  // Rows in use.
  int64_t rows() const;
  // Bytes of the buffers that this length needs.
  int64_t bytes() const;
  at::Tensor keys() const;    // [rows, J, D]
  at::Tensor values() const;  // [rows, J, D]

 private:
  void Reserve(int64_t rows);
  int64_t RowOf(int64_t position) const;

  struct Buffers;
  int64_t kv_heads_;
  int64_t head_dim_;
  int64_t window_;
  int64_t sinks_;
  c10::ScalarType type_;
  int64_t length_ = 0;
  std::unique_ptr<Buffers> buffers_;
};

}  // namespace heddle::inference
