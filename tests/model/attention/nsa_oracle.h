// NSA of one document in plain loops over double, from the formulas of attention-and-moe.md section
// 5 alone: shares no code with the layer. A second opinion for random shapes.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <numeric>
#include <vector>

#include "tests/model/attention/nsa_harness.h"

namespace heddle::attention {

using Row = std::vector<double>;
using Matrix = std::vector<Row>;  // [token][column]

struct NsaOracle {
  Matrix out;                                         // [T][d], without the residual
  Matrix cmp, slc, win;                               // [T][H D]
  std::vector<std::vector<Row>> scores;               // [T][J][blocks]
  std::vector<std::vector<std::vector<int>>> blocks;  // [T][J] ascending
  // Smallest difference between a chosen and a rejected score over all rows.
  double margin = std::numeric_limits<double>::infinity();
};

namespace oracle {

inline Matrix Times(const Matrix& x, const at::Tensor& weight_OI) {
  const Row w = ToVector(weight_OI);
  const size_t outputs = static_cast<size_t>(weight_OI.size(0));
  const size_t inputs = static_cast<size_t>(weight_OI.size(1));
  Matrix y(x.size(), Row(outputs));
  for (size_t t = 0; t < x.size(); ++t) {
    for (size_t o = 0; o < outputs; ++o) {
      for (size_t i = 0; i < inputs; ++i) y[t][o] += x[t][i] * w[o * inputs + i];
    }
  }
  return y;
}

// Row of one head.
inline Row Head(const Row& row, size_t head, size_t dim) {
  return Row(row.begin() + static_cast<long>(head * dim),
             row.begin() + static_cast<long>((head + 1) * dim));
}

inline Row Rotated(const Row& row, double position, size_t dim, bool interleaved) {
  Row out = row;
  for (size_t first = 0; first < row.size(); first += dim) {
    for (size_t i = 0; i < dim / 2; ++i) {
      const double angle =
          position * std::pow(1e4, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
      const size_t a = first + (interleaved ? 2 * i : i);
      const size_t b = first + (interleaved ? 2 * i + 1 : i + dim / 2);
      out[a] = row[a] * std::cos(angle) - row[b] * std::sin(angle);
      out[b] = row[b] * std::cos(angle) + row[a] * std::sin(angle);
    }
  }
  return out;
}

inline Matrix RotatedRows(const Matrix& rows, double spacing, size_t dim, bool interleaved) {
  Matrix out;
  for (size_t t = 0; t < rows.size(); ++t) {
    out.push_back(Rotated(rows[t], spacing * static_cast<double>(t), dim, interleaved));
  }
  return out;
}

// Probabilities of the keys in `visible`; empty if there is none.
inline Row Probabilities(const Row& query, const Matrix& keys, size_t group, size_t dim,
                         const std::vector<int>& visible) {
  Row p;
  for (const int s : visible) {
    const Row key = Head(keys[static_cast<size_t>(s)], group, dim);
    p.push_back(std::inner_product(query.begin(), query.end(), key.begin(), 0.0) /
                std::sqrt(static_cast<double>(dim)));
  }
  if (p.empty()) return p;
  const double best = *std::max_element(p.begin(), p.end());
  double sum = 0;
  for (double& x : p) sum += x = std::exp(x - best);
  for (double& x : p) x /= sum;
  return p;
}

inline void AddValues(const Row& p, const Matrix& values, size_t group, size_t dim,
                      const std::vector<int>& visible, double* out) {
  for (size_t i = 0; i < p.size(); ++i) {
    const Row value = Head(values[static_cast<size_t>(visible[i])], group, dim);
    for (size_t d = 0; d < dim; ++d) out[d] += p[i] * value[d];
  }
}

inline Matrix Compressed(const NsaSizes& s, const Matrix& x, const at::Tensor& weight,
                         const at::Tensor& pe) {
  const size_t l = static_cast<size_t>(s.kernel_size);
  const size_t dim = static_cast<size_t>(s.dim);
  const size_t kv_heads = static_cast<size_t>(s.kv_heads);
  const Row w = weight.defined() ? ToVector(weight) : Row();
  const Row e = pe.defined() ? ToVector(pe) : Row(kv_heads * l * dim);
  Matrix out;
  for (size_t first = 0; first + l <= x.size(); first += static_cast<size_t>(s.stride)) {
    Row row(kv_heads * dim);
    for (size_t g = 0; g < kv_heads; ++g) {
      for (size_t m = 0; m < l; ++m) {
        for (size_t d = 0; d < dim; ++d) {
          const double in = x[first + m][g * dim + d] + e[(g * l + m) * dim + d];
          if (s.type == heddle::v1::NsaConfig::COMPRESS_TYPE_LINEAR) {
            for (size_t o = 0; o < dim; ++o) {
              row[g * dim + o] += in * w[((g * l + m) * dim + d) * dim + o];
            }
          } else {
            row[g * dim + d] += in * (w.empty() ? 1.0 / static_cast<double>(l) : w[g * l + m]);
          }
        }
      }
    }
    out.push_back(row);
  }
  return out;
}

// |[j r, j r + l) intersect [i B, (i + 1) B)| / r
inline double Overlap(const NsaSizes& s, int window, int block) {
  const int begin = std::max(window * s.stride, block * s.block);
  const int end = std::min(window * s.stride + s.kernel_size, (block + 1) * s.block);
  return end > begin ? static_cast<double>(end - begin) / s.stride : 0.0;
}

inline std::vector<int> Best(const NsaSizes& s, int t, const Row& score, double* margin) {
  const int current = t / s.block;
  std::vector<int> chosen;
  std::vector<int> others;
  for (int i = 0; i <= current; ++i) {
    const bool forced = i < s.init_blocks || i > current - s.local_blocks;
    (forced ? chosen : others).push_back(i);
  }
  std::stable_sort(others.begin(), others.end(), [&](int a, int b) {
    return score[static_cast<size_t>(a)] > score[static_cast<size_t>(b)];
  });
  const size_t room = static_cast<size_t>(s.topk) - std::min<size_t>(chosen.size(), s.topk);
  if (room > 0 && room < others.size()) {
    *margin = std::min(*margin, score[static_cast<size_t>(others[room - 1])] -
                                    score[static_cast<size_t>(others[room])]);
  }
  others.resize(std::min(others.size(), room));
  chosen.insert(chosen.end(), others.begin(), others.end());
  std::sort(chosen.begin(), chosen.end());
  return chosen;
}

inline std::vector<int> Range(int begin, int end) {
  std::vector<int> out;
  for (int i = begin; i < end; ++i) out.push_back(i);
  return out;
}

struct Branches {
  Matrix q, kc, vc, k_slc, v_slc, k_win, v_win;
};

inline Branches Inputs(const NsaModel& model, const Matrix& h) {
  const NsaSizes& s = model.sizes();
  const size_t dim = static_cast<size_t>(s.dim);
  const auto project = [&](const char* name) { return Times(h, model.Weight(name)); };
  const auto rotated = [&](const Matrix& rows, double spacing) {
    return RotatedRows(rows, spacing, dim, s.interleaved);
  };
  const bool pool = s.type == heddle::v1::NsaConfig::COMPRESS_TYPE_AVGPOOL;
  const Matrix k = project("k_proj.weight");
  const Matrix v = project("v_proj.weight");
  Branches in;
  in.q = rotated(project("q_proj.weight"), 1);
  in.kc = rotated(Compressed(s, k, pool ? at::Tensor() : model.Weight("compress.k_weight"),
                             model.Weight("compress.k_pe")),
                  s.stride);
  in.vc = Compressed(s, v, pool ? at::Tensor() : model.Weight("compress.v_weight"), at::Tensor());
  in.k_slc = rotated(s.separate ? project("k_proj_slc.weight") : k, 1);
  in.v_slc = s.separate ? project("v_proj_slc.weight") : v;
  in.k_win = rotated(s.separate ? project("k_proj_win.weight") : k, 1);
  in.v_win = s.separate ? project("v_proj_win.weight") : v;
  return in;
}

// One token: compressed branch and scores of all groups, then selection, then the token branches.
inline void AttendToken(const NsaSizes& s, const Branches& in, int t, NsaOracle* o) {
  const size_t dim = static_cast<size_t>(s.dim);
  const size_t group_size = static_cast<size_t>(s.heads / s.kv_heads);
  const size_t at = static_cast<size_t>(t);
  const int windows = t < s.kernel_size - 1 ? 0 : (t - s.kernel_size + 1) / s.stride + 1;
  const std::vector<int> visible = Range(0, windows);
  const std::vector<int> window = Range(std::max(0, t - s.window + 1), t + 1);
  for (size_t g = 0; g < static_cast<size_t>(s.kv_heads); ++g) {
    Row score(static_cast<size_t>(t / s.block + 1));
    for (size_t h = g * group_size; h < (g + 1) * group_size; ++h) {
      const Row p = Probabilities(Head(in.q[at], h, dim), in.kc, g, dim, visible);
      AddValues(p, in.vc, g, dim, visible, o->cmp[at].data() + h * dim);
      for (size_t i = 0; i < score.size(); ++i) {
        for (int j = 0; j < windows; ++j) {
          score[i] += p[static_cast<size_t>(j)] * Overlap(s, j, static_cast<int>(i));
        }
      }
    }
    o->scores[at].push_back(score);
    o->blocks[at].push_back(Best(s, t, score, &o->margin));
    std::vector<int> selected;
    for (const int block : o->blocks[at].back()) {
      const std::vector<int> rows = Range(block * s.block, std::min((block + 1) * s.block, t + 1));
      selected.insert(selected.end(), rows.begin(), rows.end());
    }
    for (size_t h = g * group_size; h < (g + 1) * group_size; ++h) {
      const Row query = Head(in.q[at], h, dim);
      AddValues(Probabilities(query, in.k_slc, g, dim, selected), in.v_slc, g, dim, selected,
                o->slc[at].data() + h * dim);
      AddValues(Probabilities(query, in.k_win, g, dim, window), in.v_win, g, dim, window,
                o->win[at].data() + h * dim);
    }
  }
}

}  // namespace oracle

// h: rows of one document.
inline NsaOracle RunOracle(const NsaModel& model, const at::Tensor& h_TD) {
  const NsaSizes& s = model.sizes();
  const size_t tokens = static_cast<size_t>(h_TD.size(0));
  const size_t width = static_cast<size_t>(h_TD.size(1));
  const size_t dim = static_cast<size_t>(s.dim);
  const Row flat = ToVector(h_TD);
  Matrix h;
  for (size_t t = 0; t < tokens; ++t) {
    h.emplace_back(flat.begin() + static_cast<long>(t * width),
                   flat.begin() + static_cast<long>((t + 1) * width));
  }
  NsaOracle o;
  o.cmp = o.slc = o.win = Matrix(tokens, Row(static_cast<size_t>(s.heads) * dim));
  o.scores.resize(tokens);
  o.blocks.resize(tokens);
  const oracle::Branches in = oracle::Inputs(model, h);
  const Matrix logits = oracle::Times(h, model.Weight("gate_proj.weight"));
  Matrix mixed = o.cmp;
  for (size_t t = 0; t < tokens; ++t) {
    oracle::AttendToken(s, in, static_cast<int>(t), &o);
    for (size_t i = 0; i < mixed[t].size(); ++i) {
      const double* logit = logits[t].data() + 3 * (i / dim);
      const auto gate = [&](int b) { return 1.0 / (1.0 + std::exp(-logit[b])); };
      mixed[t][i] = gate(0) * o.cmp[t][i] + gate(1) * o.slc[t][i] + gate(2) * o.win[t][i];
    }
  }
  o.out = oracle::Times(mixed, model.Weight("o_proj.weight"));
  return o;
}

}  // namespace heddle::attention
