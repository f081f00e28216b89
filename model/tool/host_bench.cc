#include "model/tool/host_bench.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/ones.h>
#include <unistd.h>

#include <algorithm>
#include <barrier>
#include <fstream>
#include <functional>
#include <span>
#include <thread>
#include <vector>

#include "base/clock/clock.h"
#include "model/layers/products.h"
#include "model/optim/moments.h"
#include "model/optim/optimizer.h"
#include "model/tool/disk_bench.h"

namespace heddle::tool {
namespace {

constexpr int kRounds = 9;
constexpr double kSecondsMax = 1;  // then no further round

double SecondsOf(const std::function<void()>& run) {
  const SystemClock clock;
  const int64_t start = clock.NowSteady();
  run();
  return static_cast<double>(std::max<int64_t>(1, clock.NowSteady() - start)) / 1e9;
}

// Of the least disturbed round: what the host can, whoever else uses it. One more fetches pages
// before.
double BestSeconds(const std::function<void()>& run) {
  run();
  double best = SecondsOf(run);
  double spent = best;
  for (int round = 1; round < kRounds && spent < kSecondsMax; ++round) {
    const double seconds = SecondsOf(run);
    best = std::min(best, seconds);
    spent += seconds;
  }
  return best;
}

// Puts the number of threads back.
class Threads {
 public:
  explicit Threads(int count) : before_(at::get_num_threads()) { at::set_num_threads(count); }
  ~Threads() { at::set_num_threads(before_); }
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  const int before_;
};

double ProductFlops(int64_t n, at::ScalarType type) {
  const at::Tensor a = at::ones({n, n}, type);
  const at::Tensor b = at::ones({n, n}, type);
  const at::Tensor out = at::empty({n, n}, type);
  const double size = static_cast<double>(n);
  return 2 * size * size * size / BestSeconds([&] { layers::Product(a, b, out); });
}

__attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3"))) void MixInPlace(
    float* __restrict__ a, float* __restrict__ b, float* __restrict__ c,
    const float* __restrict__ d, int64_t count) {
  for (int64_t i = 0; i < count; ++i) {
    a[i] = a[i] * 0.5f + d[i];
    b[i] = b[i] * 0.5f + d[i];
    c[i] = c[i] * 0.5f + d[i];
  }
}

// Arrays of the optimizer, for the bare streams too: the same pages.
class Arrays {
 public:
  explicit Arrays(int64_t elements)
      : elements_(elements),
        master_(Size(), 1.0f),
        gradient_(Size(), 1e-3f),
        weights_(Size(), uint16_t{0}) {
    hyper_.algorithm = optim::Algorithm::kAdamW;
    hyper_.moments = optim::Moments::kFp32;
    moments_.Allocate(hyper_, elements);
  }

  // Bytes a second.
  double Stream() {
    constexpr int64_t kGrain = 64 * 1024;
    auto* m = static_cast<float*>(moments_.At(false, 0));
    auto* v = static_cast<float*>(moments_.At(true, 0));
    const double seconds = BestSeconds([&] {
      at::parallel_for(0, elements_, kGrain, [&](int64_t from, int64_t to) {
        MixInPlace(master_.data() + from, m + from, v + from, gradient_.data() + from, to - from);
      });
    });
    return 28 * static_cast<double>(elements_) / seconds;
  }

  double UpdateSeconds() {
    optim::Shard shard;
    shard.master = master_;
    shard.gradient = gradient_;
    shard.compute_bf16 = weights_;
    moments_.Attach(0, &shard);
    const optim::GroupRange all = {.begin = 0, .end = elements_, .weight_decay = 0.1};
    optim::StepArgs args;
    args.learning_rate = 1e-4;
    return BestSeconds([&] {
             optim::OptimizerStep(hyper_, std::span(&all, 1), args, shard);
             ++args.update;
           }) /
           static_cast<double>(elements_);
  }

 private:
  size_t Size() const { return static_cast<size_t>(elements_); }

  const int64_t elements_;
  optim::Hyperparameters hyper_;
  std::vector<float> master_;
  std::vector<float> gradient_;
  std::vector<uint16_t> weights_;
  optim::MomentArrays moments_;
};

__attribute__((target_clones("avx512f", "avx2", "default"), optimize("O3"))) void AddTo(
    float* __restrict__ own, const float* __restrict__ other, int64_t count) {
  for (int64_t i = 0; i < count; ++i) own[i] += other[i];
}

double ExchangeBytes(int64_t elements) {
  const int64_t half = elements / 2;
  std::vector<float> arrays[2];
  for (std::vector<float>& array : arrays) array.assign(static_cast<size_t>(2 * half), 1e-9f);
  std::barrier meet(2);
  const auto rank = [&](int own) {
    float* mine = arrays[own].data();
    float* other = arrays[1 - own].data();
    meet.arrive_and_wait();
    AddTo(mine + own * half, other + own * half, half);
    meet.arrive_and_wait();
    std::copy_n(other + (1 - own) * half, half, mine + (1 - own) * half);
  };
  const auto both = [&] {
    std::thread second(rank, 1);
    rank(0);
    second.join();
  };
  // Half of the array to the other one in each of the two phases.
  return 2 * 4 * static_cast<double>(half) / BestSeconds(both);
}

std::string CpuName() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);) {
    const size_t colon = line.find(':');
    if (line.rfind("model name", 0) == 0 && colon != std::string::npos) {
      return line.substr(std::min(line.size(), colon + 2));
    }
  }
  return "unknown";
}

std::string HostName() {
  char name[256] = {};
  return gethostname(name, sizeof(name) - 1) == 0 ? name : "unknown";
}

void MeasureMemory(const HostBenchSizes& sizes, HostBench* bench) {
  Arrays arrays(sizes.elements);
  bench->dram_bytes = arrays.Stream();
  const double all = arrays.UpdateSeconds();
  bench->update_ns = all * 1e9;
  bench->update_bytes = 30 / all;
  const Threads one(1);
  bench->dram_thread_bytes = arrays.Stream();
  bench->update_thread_ns = arrays.UpdateSeconds() * 1e9;
}

}  // namespace

StatusOr<HostBench> MeasureHost(const std::string& dir, const HostBenchSizes& sizes) {
  HostBench bench;
  bench.host = HostName();
  bench.cpu = CpuName();
  const SystemClock clock;
  bench.measured_at_ms = clock.NowWallMs();
  const int64_t start = clock.NowSteady();
  // First: it is what may fail.
  ASSIGN_OR_RETURN(const DiskBench disk, MeasureDisk(dir, sizes.file_bytes));
  bench.disk_dir = dir;
  bench.disk_direct = disk.direct;
  bench.disk_read_bytes = disk.read_bytes;
  bench.disk_write_bytes = disk.write_bytes;
  const int count = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  const Threads all(count);
  bench.threads = count;
  bench.bf16_flops = ProductFlops(sizes.matrix, at::kBFloat16);
  bench.fp32_flops = ProductFlops(sizes.matrix, at::kFloat);
  MeasureMemory(sizes, &bench);
  if (count > 1) bench.exchange_bytes = ExchangeBytes(sizes.elements);
  bench.seconds = static_cast<double>(clock.NowSteady() - start) / 1e9;
  return bench;
}

}  // namespace heddle::tool
