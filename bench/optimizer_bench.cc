// Times updates of flat parameters, ours against LibTorch's, and the memory's bandwidth for reading
// and writing in place:
//   bench_optimizer THREADS [MILLIONS] [ROUNDS]
// A round walks through the parameters in chunks, and the contenders take turns with the chunks:
// what disturbs the machine for longer than a millisecond meets all of them alike, and every chunk
// comes from memory. Prints one JSON line: ns a parameter of every chunk by contender, and
// the bytes a parameter that each must move.
#include <ATen/Parallel.h>
#include <ATen/ops/_fused_adamw.h>
#include <ATen/ops/from_blob.h>
#include <ATen/ops/full.h>
#include <torch/optim/adamw.h>

#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/rng/rng.h"
#include "base/status/status.h"
#include "model/optim/gradient_norm.h"
#include "model/optim/moments.h"
#include "model/optim/optimizer.h"

namespace heddle {
namespace {

constexpr double kLearningRate = 1e-4;
constexpr int64_t kGrain = 64 * 1024;

// The memory's own speed: every vector read, multiplied and written back.
__attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3"))) void ScaleInPlace(
    float* values, int64_t count, float factor) {
  for (int64_t i = 0; i < count; ++i) values[i] *= factor;
}
// The streams of AdamW with next to no arithmetic.
__attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3"))) void MixInPlace(
    float* __restrict__ a, float* __restrict__ b, float* __restrict__ c,
    const float* __restrict__ d, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    a[i] = a[i] * 0.5f + d[i];
    b[i] = b[i] * 0.5f + d[i];
    c[i] = c[i] * 0.5f + d[i] * d[i];  // stays a second moment
  }
}

// Larger than a core's caches; an update of it takes about a millisecond.
constexpr int64_t kChunk = int64_t{1} << 20;

struct Chunk {
  int64_t first;
  size_t number;
};

struct Contender {
  std::string name;
  double bytes;  // read and written, a parameter
  std::function<void(Chunk)> run;
  std::vector<double> nanoseconds;  // a parameter
};

class Bench {
 public:
  explicit Bench(int64_t chunks)
      : size_(chunks * kChunk), master_(Count()), gradient_(Count()), weights_(Count()) {
    const Rng rng(1, "bench.optimizer");
    for (size_t i = 0; i < Count(); ++i) {
      const uint64_t bits = rng.At(i / 8) >> (i % 8 * 8);
      gradient_[i] = 1e-3f * (static_cast<float>(bits & 0xff) - 127.5f);
      master_[i] = gradient_[i];
    }
    AddOurs("adamw", optim::Algorithm::kAdamW, optim::Moments::kFp32, false, 28);
    AddOurs("adamw_bf16_moments", optim::Algorithm::kAdamW, optim::Moments::kBf16, false, 20);
    AddOurs("adamw_with_bf16_weights", optim::Algorithm::kAdamW, optim::Moments::kFp32, true, 30);
    AddOurs("adamw_bf16_moments_with_bf16_weights", optim::Algorithm::kAdamW, optim::Moments::kBf16,
            true, 22);
    AddOurs("lion", optim::Algorithm::kLion, optim::Moments::kFp32, false, 20);
    AddOurs("lion_bf16_moments", optim::Algorithm::kLion, optim::Moments::kBf16, false, 16);
    AddNorm();
    AddFused();
    AddTorch();
    AddMemory();
  }

  // Every contender once on every chunk, that their buffers are there.
  void WarmUp() {
    for (Contender& contender : contenders_) {
      for (size_t number = 0; number < Chunks(); ++number) contender.run(At(number));
    }
  }

  void Round(size_t round) {
    ++update_;
    for (size_t number = 0; number < Chunks(); ++number) {
      // Shifted by the round: the number of chunks may be a multiple of that of the contenders.
      Contender& contender = contenders_[(number + round) % contenders_.size()];
      const auto start = std::chrono::steady_clock::now();
      contender.run(At(number));
      const std::chrono::duration<double, std::nano> spent =
          std::chrono::steady_clock::now() - start;
      contender.nanoseconds.push_back(spent.count() / static_cast<double>(kChunk));
    }
  }

  void Print(int threads) const {
    std::printf("{\"threads\": %d, \"parameters\": %lld", threads, static_cast<long long>(size_));
    for (const Contender& contender : contenders_) {
      std::printf(", \"%s\": {\"bytes\": %g, \"nanoseconds\": [", contender.name.c_str(),
                  contender.bytes);
      const char* comma = "";
      for (const double nanoseconds : contender.nanoseconds) {
        std::printf("%s%.4f", comma, nanoseconds);
        comma = ", ";
      }
      std::printf("]}");
    }
    std::printf("}\n");
  }

 private:
  size_t Count() const { return static_cast<size_t>(size_); }
  size_t Chunks() const { return static_cast<size_t>(size_ / kChunk); }
  static Chunk At(size_t number) { return {static_cast<int64_t>(number) * kChunk, number}; }
  static std::span<float> Part(std::vector<float>& values, Chunk chunk) {
    return std::span(values).subspan(static_cast<size_t>(chunk.first), kChunk);
  }
  static at::Tensor TensorOver(float* values) {
    return at::from_blob(values, {kChunk}, at::kFloat);
  }

  void AddOurs(const std::string& name, optim::Algorithm algorithm, optim::Moments moments,
               bool weights, double bytes) {
    optim::Hyperparameters hyper;
    hyper.algorithm = algorithm;
    hyper.moments = moments;
    hyper.seed = 1;
    // Both algorithms share the arrays: AdamW, which needs two, comes first.
    optim::MomentArrays& arrays = moments == optim::Moments::kBf16 ? narrow_ : wide_;
    if (!arrays.has_second()) arrays.Allocate(hyper, size_);
    const auto run = [this, hyper, weights, &arrays](Chunk chunk) {
      optim::Shard shard;
      shard.flat_offset = chunk.first;
      shard.rounding_offset = chunk.first;
      shard.master = Part(master_, chunk);
      shard.gradient = Part(gradient_, chunk);
      if (weights) {
        shard.compute_bf16 = std::span(weights_).subspan(static_cast<size_t>(chunk.first), kChunk);
      }
      arrays.Attach(chunk.first, &shard);
      optim::StepArgs args;
      args.update = update_;
      args.learning_rate = kLearningRate;
      const optim::GroupRange all = {.begin = 0, .end = size_, .weight_decay = 0.1};
      optim::OptimizerStep(hyper, std::span(&all, 1), args, shard);
    };
    contenders_.push_back({name, bytes, run, {}});
  }

  void AddNorm() {
    const auto run = [this](Chunk chunk) { optim::MeasureGradients(Part(gradient_, chunk)); };
    contenders_.push_back({"gradient_norm", 4, run, {}});
  }

  // On our own arrays: the same pages.
  void AddFused() {
    const auto run = [this](Chunk chunk) {
      const at::Tensor p = TensorOver(Part(master_, chunk).data());
      const at::Tensor g = TensorOver(Part(gradient_, chunk).data());
      const at::Tensor m = TensorOver(static_cast<float*>(wide_.At(false, chunk.first)));
      const at::Tensor v = TensorOver(static_cast<float*>(wide_.At(true, chunk.first)));
      const at::Tensor step = at::full({}, static_cast<double>(update_), at::kFloat);
      at::_fused_adamw_({p}, {g}, {m}, {v}, {}, {step}, kLearningRate, 0.9, 0.95, 0.1, 1e-8,
                        /*amsgrad=*/false, /*maximize=*/false);
    };
    contenders_.push_back({"fused_adamw", 28, run, {}});
  }

  void AddTorch() {
    for (size_t number = 0; number < Chunks(); ++number) {
      at::Tensor p = TensorOver(Part(master_, At(number)).data());
      p.set_requires_grad(true);
      p.mutable_grad() = TensorOver(Part(gradient_, At(number)).data());
      torch::optim::AdamWOptions options(kLearningRate);
      options.betas({0.9, 0.95}).weight_decay(0.1);
      torch_.push_back(std::make_unique<torch::optim::AdamW>(std::vector<at::Tensor>{p}, options));
    }
    const auto run = [this](Chunk chunk) { torch_[chunk.number]->step(); };
    contenders_.push_back({"torch_adamw", 28, run, {}});
  }

  void AddMemory() {
    const auto scale = [this](Chunk chunk) {
      float* p = master_.data() + chunk.first;
      at::parallel_for(0, kChunk, kGrain, [&](int64_t from, int64_t to) {
        ScaleInPlace(p + from, to - from, 0.999f);
      });
    };
    const auto mix = [this](Chunk chunk) {
      float* p = master_.data() + chunk.first;
      float* m = static_cast<float*>(wide_.At(false, chunk.first));
      float* v = static_cast<float*>(wide_.At(true, chunk.first));
      const float* g = gradient_.data() + chunk.first;
      at::parallel_for(0, kChunk, kGrain, [&](int64_t from, int64_t to) {
        MixInPlace(p + from, m + from, v + from, g + from, to - from);
      });
    };
    contenders_.push_back({"memory_scale", 8, scale, {}});
    contenders_.push_back({"memory_mix", 28, mix, {}});
  }

  const int64_t size_;
  std::vector<float> master_;
  std::vector<float> gradient_;
  std::vector<uint16_t> weights_;
  optim::MomentArrays wide_;
  optim::MomentArrays narrow_;
  std::vector<std::unique_ptr<torch::optim::AdamW>> torch_;
  std::vector<Contender> contenders_;
  int64_t update_ = 1;
};

int64_t NumberOf(const char* text) {
  const std::string digits = text;
  int64_t value = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), value);
  return error == std::errc() && end == digits.data() + digits.size() ? value : 0;
}

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  const int64_t threads = argc > 1 ? heddle::NumberOf(argv[1]) : 0;
  const int64_t millions = argc > 2 ? heddle::NumberOf(argv[2]) : 64;
  const int64_t rounds = argc > 3 ? heddle::NumberOf(argv[3]) : 10;
  if (threads < 1 || millions < 1 || rounds < 1) {
    std::fprintf(stderr, "usage: bench_optimizer THREADS [MILLIONS] [ROUNDS]\n");
    return 2;
  }
  at::set_num_threads(static_cast<int>(threads));
  heddle::Bench bench(millions);
  bench.WarmUp();
  for (int64_t round = 0; round < rounds; ++round) bench.Round(static_cast<size_t>(round));
  bench.Print(static_cast<int>(threads));
  return 0;
}
