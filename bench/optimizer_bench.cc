// Times one update of flat parameters, ours against LibTorch's, and the memory's bandwidth for
// reading and writing in place:
//   bench_optimizer THREADS [MILLIONS] [ROUNDS]
// Every round runs every contender once, so that figures of a round may be compared. Prints one
// JSON line: seconds of every round by contender, and bytes a parameter that each must move.
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

struct Contender {
  std::string name;
  double bytes;  // read and written, a parameter
  std::function<void()> run;
  std::vector<double> seconds;
};

class Bench {
 public:
  explicit Bench(int64_t size)
      : size_(size), master_(Count()), gradient_(Count()), weights_(Count()), groups_(1) {
    groups_[0] = {.begin = 0, .end = size, .weight_decay = 0.1};
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
    contenders_.push_back({"gradient_norm", 4, [this] { optim::MeasureGradients(gradient_); }, {}});
    AddFused();
    AddTorch();
    AddMemory();
  }

  void Round() {
    ++update_;
    for (Contender& contender : contenders_) {
      const auto start = std::chrono::steady_clock::now();
      contender.run();
      contender.seconds.push_back(
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
  }

  void Print(int threads) const {
    std::printf("{\"threads\": %d, \"parameters\": %lld", threads, static_cast<long long>(size_));
    for (const Contender& contender : contenders_) {
      std::printf(", \"%s\": {\"bytes\": %g, \"seconds\": [", contender.name.c_str(),
                  contender.bytes);
      // The first round grows buffers.
      for (size_t i = 1; i < contender.seconds.size(); ++i) {
        std::printf("%s%.6f", i == 1 ? "" : ", ", contender.seconds[i]);
      }
      std::printf("]}");
    }
    std::printf("}\n");
  }

 private:
  size_t Count() const { return static_cast<size_t>(size_); }

  void AddOurs(const std::string& name, optim::Algorithm algorithm, optim::Moments moments,
               bool weights, double bytes) {
    optim::Hyperparameters hyper;
    hyper.algorithm = algorithm;
    hyper.moments = moments;
    hyper.seed = 1;
    // Both algorithms share the arrays: the wider one makes them.
    optim::MomentArrays& arrays = moments == optim::Moments::kBf16 ? narrow_ : wide_;
    if (!arrays.has_second()) arrays.Allocate(hyper, size_);
    contenders_.push_back({name,
                           bytes,
                           [this, hyper, weights, &arrays] {
                             optim::Shard shard;
                             shard.master = master_;
                             shard.gradient = gradient_;
                             if (weights) shard.compute_bf16 = weights_;
                             arrays.Attach(0, &shard);
                             optim::StepArgs args;
                             args.update = update_;
                             args.learning_rate = kLearningRate;
                             optim::OptimizerStep(hyper, groups_, args, shard);
                           },
                           {}});
  }

  at::Tensor Over(float* values) const { return at::from_blob(values, {size_}, at::kFloat); }

  // On our own arrays: the same pages.
  void AddFused() {
    const at::Tensor p = Over(master_.data());
    const at::Tensor g = Over(gradient_.data());
    const at::Tensor m = Over(static_cast<float*>(wide_.At(false, 0)));
    const at::Tensor v = Over(static_cast<float*>(wide_.At(true, 0)));
    contenders_.push_back({"fused_adamw",
                           28,
                           [this, p, g, m, v] {
                             const at::Tensor step =
                                 at::full({}, static_cast<double>(update_), at::kFloat);
                             at::_fused_adamw_({p}, {g}, {m}, {v}, {}, {step}, kLearningRate, 0.9,
                                               0.95, 0.1, 1e-8, /*amsgrad=*/false,
                                               /*maximize=*/false);
                           },
                           {}});
  }

  void AddTorch() {
    at::Tensor p = Over(master_.data());
    p.set_requires_grad(true);
    p.mutable_grad() = Over(gradient_.data());
    auto options = torch::optim::AdamWOptions(kLearningRate);
    options.betas({0.9, 0.95}).weight_decay(0.1);
    auto optimizer =
        std::make_shared<torch::optim::AdamW>(std::vector<at::Tensor>{p}, std::move(options));
    contenders_.push_back({"torch_adamw", 28, [optimizer] { optimizer->step(); }, {}});
  }

  void AddMemory() {
    float* p = master_.data();
    float* m = static_cast<float*>(wide_.At(false, 0));
    float* v = static_cast<float*>(wide_.At(true, 0));
    const float* g = gradient_.data();
    contenders_.push_back({"memory_scale",
                           8,
                           [this, p] {
                             at::parallel_for(0, size_, kGrain, [&](int64_t from, int64_t to) {
                               ScaleInPlace(p + from, to - from, 0.999f);
                             });
                           },
                           {}});
    contenders_.push_back({"memory_mix",
                           28,
                           [this, p, m, v, g] {
                             at::parallel_for(0, size_, kGrain, [&](int64_t from, int64_t to) {
                               MixInPlace(p + from, m + from, v + from, g + from, to - from);
                             });
                           },
                           {}});
  }

  const int64_t size_;
  std::vector<float> master_;
  std::vector<float> gradient_;
  std::vector<uint16_t> weights_;
  std::vector<optim::GroupRange> groups_;
  optim::MomentArrays wide_;
  optim::MomentArrays narrow_;
  std::vector<Contender> contenders_;
  int64_t update_ = 0;
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
  const int64_t rounds = argc > 3 ? heddle::NumberOf(argv[3]) : 7;
  if (threads < 1 || millions < 1 || rounds < 2) {
    std::fprintf(stderr, "usage: bench_optimizer THREADS [MILLIONS] [ROUNDS >= 2]\n");
    return 2;
  }
  at::set_num_threads(static_cast<int>(threads));
  heddle::Bench bench(millions << 20);
  for (int64_t round = 0; round < rounds; ++round) bench.Round();
  bench.Print(static_cast<int>(threads));
  return 0;
}
