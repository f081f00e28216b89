// The pools in double with plain loops: the oracle of the float tables and the arithmetic of the
// fp64 model.
#include "kernels/compression/tables.h"

namespace heddle::kernels::compression {
namespace {

double WeightOf(const Pool<double>& p, int64_t head, int64_t m) {
  return p.weight == nullptr ? 1.0 / static_cast<double>(p.kernel_size)
                             : p.weight[head * p.kernel_size + m];
}
double PeOf(const Pool<double>& p, int64_t head, int64_t m, int64_t d) {
  return p.pe == nullptr ? 0.0 : p.pe[(head * p.kernel_size + m) * p.dim + d];
}

void ForwardReference(const Forward<double>& f, Range windows) {
  const Pool<double>& p = f.pool;
  for (int64_t j = windows.begin; j < windows.end; ++j) {
    for (int64_t head = 0; head < p.heads; ++head) {
      for (int64_t d = 0; d < p.dim; ++d) {
        double sum = 0;
        for (int64_t m = 0; m < p.kernel_size; ++m) {
          const double x = p.x[(p.first[j] + m) * p.x_stride + head * p.dim + d];
          sum += WeightOf(p, head, m) * (x + PeOf(p, head, m, d));
        }
        f.out[(j * p.heads + head) * p.dim + d] = sum;
      }
    }
  }
}

void BackwardRowsReference(const Backward<double>& b, Range rows) {
  const Pool<double>& p = b.pool;
  for (int64_t row = rows.begin; row < rows.end; ++row) {
    for (int64_t head = 0; head < p.heads; ++head) {
      for (int64_t d = 0; d < p.dim; ++d) {
        double sum = 0;
        for (int64_t j = b.holders.begin[row]; j < b.holders.end[row]; ++j) {
          sum += WeightOf(p, head, row - p.first[j]) * b.dout[(j * p.heads + head) * p.dim + d];
        }
        b.dx[row * b.dx_stride + head * p.dim + d] += sum;
      }
    }
  }
}

void BackwardTapsReference(const Backward<double>& b, Range taps) {
  const Pool<double>& p = b.pool;
  for (int64_t tap = taps.begin; tap < taps.end; ++tap) {
    const int64_t head = tap / p.kernel_size;
    const int64_t m = tap % p.kernel_size;
    double dweight = 0;
    for (int64_t d = 0; d < p.dim; ++d) {
      double dpe = 0;
      for (int64_t j = 0; j < p.windows; ++j) {
        const double g = b.dout[(j * p.heads + head) * p.dim + d];
        const double x = p.x[(p.first[j] + m) * p.x_stride + head * p.dim + d];
        dweight += g * (x + PeOf(p, head, m, d));
        dpe += g;
      }
      if (b.dpe != nullptr) b.dpe[tap * p.dim + d] += WeightOf(p, head, m) * dpe;
    }
    if (b.dweight != nullptr) b.dweight[tap] += dweight;
  }
}

}  // namespace

const Table<double> kReference = {ForwardReference, BackwardRowsReference, BackwardTapsReference};

}  // namespace heddle::kernels::compression
