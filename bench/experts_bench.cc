// Matrix products of experts: R rows for each of E experts of width D and hidden width F, bf16.
//   bench_experts D F E R THREADS SECONDS
// Contenders take turns, round by round: `kernels` (kernels/linear, one thread per piece of 256
// rows), `library` (the same pieces through LibTorch's mm), `grouped` (at::_grouped_mm, where it
// takes the widths), `loop` (at::mm of one expert after the other, all threads). Peers add their
// weight gradient, rounded to bf16, to the sum in fp32, as a training step must. Prints one JSON
// line: contender -> product -> GFLOP/s of every round.
#include <ATen/Parallel.h>
#include <ATen/ops/_grouped_mm.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/randn.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <ctime>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "model/layers/layers.h"
#include "model/layers/tasks.h"
#include "model/moe/expert_products.h"

namespace heddle {
namespace {

constexpr int64_t kPiece = 256;  // model/moe/experts.cc

struct Shape {
  int64_t width = 0;
  int64_t hidden = 0;
  int64_t experts = 0;
  int64_t rows = 0;  // of one expert
  int64_t threads = 1;
  int64_t seconds = 1;
};

// One of the two matrices of every expert with what goes in and out.
struct Matrices {
  at::Tensor weight_EOI, gradient_EOI, x_RI, dy_RO, y_RO, dx_RI;
};

at::Tensor Random(at::IntArrayRef sizes) { return at::randn(sizes, at::kFloat).to(at::kBFloat16); }

Matrices MakeMatrices(const Shape& s, int64_t in, int64_t out) {
  const int64_t rows = s.experts * s.rows;
  Matrices m;
  m.weight_EOI = Random({s.experts, out, in});
  m.gradient_EOI = at::zeros({s.experts, out, in}, at::kFloat);
  m.x_RI = Random({rows, in});
  m.dy_RO = Random({rows, out});
  m.y_RO = Random({rows, out});
  m.dx_RI = Random({rows, in});
  return m;
}

// Of one thread the processor's time, which other programs on the machine disturb less.
double Now(const Shape& s) {
  timespec now = {};
  clock_gettime(s.threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

using Product = std::function<void(const at::Tensor&, const at::Tensor&, const at::Tensor&)>;
struct Products {
  Product forward, input_gradient, weight_gradient;
};

// As model/moe/experts.cc cuts them.
void Pieces(const Shape& s,
            const std::function<void(int64_t expert, int64_t begin, int64_t n)>& f) {
  const int64_t each = (s.rows + kPiece - 1) / kPiece;
  layers::RunTasks(s.experts * each, [&](int64_t task, int64_t) {
    const int64_t first = task % each * kPiece;
    f(task / each, task / each * s.rows + first, std::min(kPiece, s.rows - first));
  });
}

void ForwardPieces(const Shape& s, const Matrices& m, const Product& product) {
  Pieces(s, [&](int64_t e, int64_t row, int64_t n) {
    product(m.x_RI.narrow(0, row, n), m.weight_EOI.select(0, e), m.y_RO.narrow(0, row, n));
  });
}

void InputGradientPieces(const Shape& s, const Matrices& m, const Product& product) {
  Pieces(s, [&](int64_t e, int64_t row, int64_t n) {
    product(m.dy_RO.narrow(0, row, n), m.weight_EOI.select(0, e), m.dx_RI.narrow(0, row, n));
  });
}

void WeightGradientPieces(const Shape& s, const Matrices& m, const Product& product) {
  constexpr int64_t kGradientRows = 512;
  const int64_t out = m.dy_RO.size(1);
  const int64_t each = (out + kGradientRows - 1) / kGradientRows;
  layers::RunTasks(s.experts * each, [&](int64_t task, int64_t) {
    const int64_t e = task / each;
    const int64_t first = task % each * kGradientRows;
    const int64_t n = std::min(kGradientRows, out - first);
    product(m.dy_RO.narrow(0, e * s.rows, s.rows).narrow(1, first, n),
            m.x_RI.narrow(0, e * s.rows, s.rows), m.gradient_EOI.select(0, e).narrow(0, first, n));
  });
}

void Loop(const Shape& s, const Matrices& m, std::string_view product) {
  for (int64_t e = 0; e < s.experts; ++e) {
    const at::Tensor weight = m.weight_EOI.select(0, e);
    const auto of = [&](const at::Tensor& t) { return t.narrow(0, e * s.rows, s.rows); };
    if (product == "forward") {
      at::Tensor y = of(m.y_RO);
      at::mm_out(y, of(m.x_RI), weight.t());
    } else if (product == "input_gradient") {
      at::Tensor dx = of(m.dx_RI);
      at::mm_out(dx, of(m.dy_RO), weight);
    } else {
      m.gradient_EOI.select(0, e).add_(at::mm(of(m.dy_RO).t(), of(m.x_RI)));
    }
  }
}

void Grouped(const Matrices& m, const at::Tensor& ends, std::string_view product) {
  if (product == "forward") {
    at::_grouped_mm(m.x_RI, m.weight_EOI.transpose(1, 2), ends);
  } else if (product == "input_gradient") {
    at::_grouped_mm(m.dy_RO, m.weight_EOI, ends);
  } else {
    m.gradient_EOI.add_(at::_grouped_mm(m.dy_RO.t(), m.x_RI, ends));
  }
}

void Pieced(const Shape& s, const Matrices& m, std::string_view product, const Products& by) {
  if (product == "forward") ForwardPieces(s, m, by.forward);
  if (product == "input_gradient") InputGradientPieces(s, m, by.input_gradient);
  if (product == "weight_gradient") WeightGradientPieces(s, m, by.weight_gradient);
}

void Measure(const Shape& s) {
  const Matrices both[] = {MakeMatrices(s, s.width, 2 * s.hidden),
                           MakeMatrices(s, s.hidden, s.width)};
  std::vector<int32_t> ends;
  for (int64_t e = 1; e <= s.experts; ++e) ends.push_back(static_cast<int32_t>(e * s.rows));
  const at::Tensor ends_E = at::tensor(ends, at::kInt);
  const Products kernels{moe::ExpertLinear, moe::ExpertInputGradient, moe::ExpertWeightGradient};
  const Products library{layers::Linear, layers::LinearInputGradient, layers::LinearWeightGradient};
  using Run = std::function<void(const Matrices&, std::string_view)>;
  std::vector<std::pair<const char*, Run>> contenders = {
      {"kernels", [&](const auto& m, auto product) { Pieced(s, m, product, kernels); }},
      {"library", [&](const auto& m, auto product) { Pieced(s, m, product, library); }},
      {"loop", [&](const auto& m, auto product) { Loop(s, m, product); }}};
  if (s.hidden % 8 == 0 && s.width % 8 == 0) {  // rows of whole 16 bytes, else it refuses
    contenders.emplace_back("grouped",
                            [&](const auto& m, auto product) { Grouped(m, ends_E, product); });
  }
  const double flops =
      6.0 * static_cast<double>(s.experts * s.rows) * static_cast<double>(s.width * s.hidden);
  std::map<std::string, std::map<std::string, std::vector<double>>> rates;
  const double end = Now(s) + static_cast<double>(s.seconds);
  // The first round makes LibTorch's primitives; it is not counted.
  for (int round = 0; round < 5 || Now(s) < end; ++round) {
    for (const std::string product : {"forward", "input_gradient", "weight_gradient"}) {
      for (size_t i = 0; i < contenders.size(); ++i) {
        // None is always the one that finds its arrays in the caches.
        const auto& [name, run] = contenders[(i + static_cast<size_t>(round)) % contenders.size()];
        const double began = Now(s);
        for (const Matrices& m : both) run(m, product);
        if (round > 0) rates[name][product].push_back(flops / (Now(s) - began) / 1e9);
      }
    }
  }
  const char* separator = "{";
  for (const auto& [name, products] : rates) {
    for (const auto& [product, values] : products) {
      std::printf("%s\"%s/%s\": [", separator, name.c_str(), product.c_str());
      for (size_t i = 0; i < values.size(); ++i)
        std::printf("%s%.4g", i == 0 ? "" : ", ", values[i]);
      std::printf("]");
      separator = ", ";
    }
  }
  std::printf("}\n");
}

int Main(int argc, char** argv) {
  Shape s;
  int64_t* const numbers[] = {&s.width, &s.hidden, &s.experts, &s.rows, &s.threads, &s.seconds};
  bool usable = argc == 7;
  for (int i = 1; usable && i < argc; ++i) {
    const std::string_view text = argv[i];
    usable = std::from_chars(text.data(), text.data() + text.size(), *numbers[i - 1]).ec ==
                 std::errc() &&
             *numbers[i - 1] > 0;
  }
  if (!usable) {
    std::fprintf(stderr, "usage: bench_experts D F E R THREADS SECONDS\n");
    return 2;
  }
  at::set_num_threads(static_cast<int>(s.threads));
  const c10::InferenceMode no_graph;
  Measure(s);
  return 0;
}

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) { return heddle::Main(argc, argv); }
