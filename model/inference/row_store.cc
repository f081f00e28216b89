#include "model/inference/row_store.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/status/status.h"
#include "model/layers/sublayer.h"

namespace heddle::inference {
namespace {

namespace kvq = kernels::kv_quant;

constexpr int64_t kFirstRows = 64;
constexpr int64_t kRowsPerTask = 32;

template <typename T>
kvq::Quantize<T> QuantizeOf(const kvq::Layout& layout, const at::Tensor& values, void* codes,
                            void* scales) {
  kvq::Quantize<T> p;
  p.layout = layout;
  p.x = static_cast<const T*>(values.const_data_ptr());
  p.x_stride = values.stride(0);
  p.codes = static_cast<uint8_t*>(codes);
  p.scales = static_cast<float*>(scales);
  return p;
}

// Copies values of a compute type to the statistics type.
void Widen(at::ScalarType type, const char* from, int64_t count, char* to) {
  if (type != at::kBFloat16) {
    std::memcpy(to, from, static_cast<size_t>(count) * c10::elementSize(type));
    return;
  }
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(from);
  uint32_t* bits = reinterpret_cast<uint32_t*>(to);
  for (int64_t i = 0; i < count; ++i) bits[i] = static_cast<uint32_t>(halves[i]) << 16;
}

}  // namespace

RowStore::RowStore(RowShape shape, at::ScalarType type) : shape_(shape), type_(type) {
  HEDDLE_CHECK(shape_.heads > 0 && shape_.width > 0 && shape_.group >= 0);
  HEDDLE_CHECK(shape_.exact_columns == 0 ||
               (shape_.heads == 1 && shape_.exact_columns < shape_.width));
}

kvq::Layout RowStore::layout() const {
  kvq::Layout layout;
  layout.format = quantization_ == Quantization::kInt8 ? kvq::Format::kInt8 : kvq::Format::kE4m3;
  layout.columns = shape_.columns() - shape_.exact_columns;
  layout.group = std::min(shape_.group > 0 ? shape_.group : shape_.width, layout.columns);
  return layout;
}

void RowStore::Grow(int64_t capacity) {
  const auto grow = [](at::Tensor* buffer, int64_t rows, at::IntArrayRef row, at::ScalarType type) {
    std::vector<int64_t> shape = {rows};
    shape.insert(shape.end(), row.begin(), row.end());
    const at::Tensor bigger = at::empty(shape, type);
    if (buffer->defined()) bigger.narrow(0, 0, buffer->size(0)).copy_(*buffer);
    *buffer = bigger;
  };
  if (quantized()) {
    grow(&codes_, capacity - exact_, {layout().columns}, at::kByte);
    grow(&scales_, capacity - exact_, {layout().groups()}, at::kFloat);
    if (shape_.exact_columns > 0) grow(&tails_, capacity - exact_, {shape_.exact_columns}, type_);
  } else {
    grow(&values_, capacity, {shape_.heads, shape_.width}, type_);
  }
  capacity_ = capacity;
}

void RowStore::Reserve(int64_t rows) {
  if (rows > capacity_) Grow(rows);
}

void RowStore::Write(int64_t first, const at::Tensor& values) {
  HEDDLE_CHECK(values.dim() == 3 && values.size(1) == shape_.heads &&
                   values.size(2) == shape_.width && values.scalar_type() == type_,
               "cache rows of another shape or type");
  const int64_t count = values.size(0);
  if (count == 0) return;
  if (first + count > capacity_) Grow(std::max({first + count, 2 * capacity_, kFirstRows}));
  if (!quantized()) {
    values_.narrow(0, first, count).copy_(values);
    return;
  }
  const int64_t exact = std::clamp<int64_t>(exact_ - first, 0, count);
  if (exact > 0) values_.narrow(0, first, exact).copy_(values.narrow(0, 0, exact));
  if (exact < count) WriteCodes(first + exact, values.narrow(0, exact, count - exact));
}

void RowStore::WriteCodes(int64_t first, const at::Tensor& given) {
  const bool rows_contiguous =
      given.stride(2) == 1 && (given.size(1) == 1 || given.stride(1) == given.size(2));
  const at::Tensor values = rows_contiguous ? given : given.contiguous();
  const kvq::Layout rows = layout();
  uint8_t* codes = codes_.data_ptr<uint8_t>() + (first - exact_) * rows.columns;
  float* scales = scales_.data_ptr<float>() + (first - exact_) * rows.groups();
  at::parallel_for(0, values.size(0), kRowsPerTask, [&](int64_t begin, int64_t end) {
    if (type_ == at::kDouble) {
      kvq::QuantizeReference(QuantizeOf<double>(rows, values, codes, scales), {begin, end});
    } else if (type_ == at::kBFloat16) {
      kvq::Kernels().quantize_bf16(QuantizeOf<uint16_t>(rows, values, codes, scales), {begin, end});
    } else {
      kvq::Kernels().quantize_f32(QuantizeOf<float>(rows, values, codes, scales), {begin, end});
    }
  });
  if (shape_.exact_columns > 0) {
    tails_.narrow(0, first - exact_, values.size(0))
        .copy_(values.squeeze(1).narrow(1, rows.columns, shape_.exact_columns));
  }
}

void RowStore::Quantize(Quantization quantization, int64_t exact, int64_t used) {
  HEDDLE_CHECK(!quantized() && quantization != Quantization::kNone);
  const at::Tensor before = values_;
  const int64_t capacity = std::max(capacity_, exact);
  quantization_ = quantization;
  exact_ = exact;
  values_ = at::empty({exact, shape_.heads, shape_.width}, type_);
  capacity_ = 0;
  Grow(capacity);
  if (used > 0) Write(0, before.narrow(0, 0, used));
}

at::Tensor RowStore::View(int64_t rows) const {
  HEDDLE_CHECK(!quantized() && rows <= capacity_);
  return values_.narrow(0, 0, rows);
}

void RowStore::CheckOut(const at::Tensor& out) const {
  HEDDLE_CHECK(out.is_contiguous() && out.numel() == out.size(0) * shape_.columns() &&
                   out.scalar_type() == layers::StatisticsType(type_),
               "cache rows are read in the statistics type");
}

void RowStore::ReadRun(int64_t from, int64_t count, const at::Tensor& out, int64_t to) const {
  const int64_t columns = shape_.columns();
  char* target = static_cast<char*>(out.data_ptr()) + to * columns * out.element_size();
  const int64_t wide = quantized() ? std::clamp<int64_t>(exact_ - from, 0, count) : count;
  if (wide > 0) {
    const char* source = static_cast<const char*>(values_.const_data_ptr());
    Widen(type_, source + from * columns * values_.element_size(), wide * columns, target);
  }
  if (wide < count) {
    ReadCodes(from + wide - exact_, count - wide, target + wide * columns * out.element_size());
  }
}

void RowStore::ReadCodes(int64_t from, int64_t count, char* to) const {
  const kvq::Layout rows = layout();
  const int64_t stride = shape_.columns();
  const uint8_t* codes = codes_.const_data_ptr<uint8_t>() + from * rows.columns;
  const float* scales = scales_.const_data_ptr<float>() + from * rows.groups();
  if (type_ == at::kDouble) {
    kvq::DequantizeReference({rows, codes, scales, reinterpret_cast<double*>(to), stride},
                             {0, count});
  } else {
    kvq::Kernels().dequantize_f32({rows, codes, scales, reinterpret_cast<float*>(to), stride},
                                  {0, count});
  }
  if (shape_.exact_columns == 0) return;
  const int64_t element = static_cast<int64_t>(c10::elementSize(type_));
  const int64_t wide = static_cast<int64_t>(c10::elementSize(layers::StatisticsType(type_)));
  const char* tails = static_cast<const char*>(tails_.const_data_ptr());
  for (int64_t i = 0; i < count; ++i) {
    Widen(type_, tails + (from + i) * shape_.exact_columns * element, shape_.exact_columns,
          to + (i * stride + rows.columns) * wide);
  }
}

void RowStore::Read(std::span<const int32_t> index, const at::Tensor& out) const {
  CheckOut(out);
  HEDDLE_CHECK(static_cast<int64_t>(index.size()) == out.size(0));
  at::parallel_for(0, out.size(0), kRowsPerTask, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ReadRun(index[static_cast<size_t>(i)], 1, out, i);
  });
}

void RowStore::ReadFirst(const at::Tensor& out) const {
  CheckOut(out);
  at::parallel_for(0, out.size(0), kRowsPerTask,
                   [&](int64_t begin, int64_t end) { ReadRun(begin, end - begin, out, begin); });
}

int64_t RowStore::BytesOf(int64_t rows) const {
  const int64_t wide = static_cast<int64_t>(c10::elementSize(type_)) * shape_.columns();
  if (!quantized()) return rows * wide;
  const int64_t exact = std::min(rows, exact_);
  const int64_t tail = static_cast<int64_t>(c10::elementSize(type_)) * shape_.exact_columns;
  return exact * wide + (rows - exact) * (layout().row_bytes() + tail);
}

int64_t RowStore::allocated_bytes() const {
  int64_t bytes = 0;
  for (const at::Tensor* buffer : {&values_, &codes_, &scales_, &tails_}) {
    if (buffer->defined()) bytes += buffer->numel() * static_cast<int64_t>(buffer->element_size());
  }
  return bytes;
}

}  // namespace heddle::inference
