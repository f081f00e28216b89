#include "coordinator/rpc/slow_offload.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>

#include "base/status/status.h"
#include "base/units/units.h"
#include "model/training_plan.h"

namespace heddle::rpc {
namespace {

// Of a step that it may wait for experts.
constexpr double kSlowShare = 0.25;

double Median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

// Sums over steps; `waited` and `step` are medians of one.
struct OffloadSteps {
  size_t steps = 0;
  v1::OffloadUse sum;
  double share = 0;
  double waited = 0;
  double step = 0;
};

OffloadSteps Collect(const std::vector<v1::MetricPoint>& points) {
  OffloadSteps all;
  std::vector<double> shares, waits, times;
  for (const v1::MetricPoint& point : points) {
    if (!point.has_offload() || point.step_seconds() <= 0) continue;
    const v1::OffloadUse& use = point.offload();
    shares.push_back(use.exposed_seconds() / point.step_seconds());
    waits.push_back(use.exposed_seconds());
    times.push_back(point.step_seconds());
    all.sum.set_hits(all.sum.hits() + use.hits());
    all.sum.set_misses(all.sum.misses() + use.misses());
    all.sum.set_bytes_read(all.sum.bytes_read() + use.bytes_read());
    all.sum.set_bytes_written(all.sum.bytes_written() + use.bytes_written());
    all.sum.set_read_seconds(all.sum.read_seconds() + use.read_seconds());
    all.sum.set_write_seconds(all.sum.write_seconds() + use.write_seconds());
  }
  all.steps = shares.size();
  if (all.steps == 0) return all;
  all.share = Median(std::move(shares));
  all.waited = Median(std::move(waits));
  all.step = Median(std::move(times));
  return all;
}

std::string Milliseconds(double seconds) {
  return Str(static_cast<int64_t>(std::llround(seconds * 1e3)));
}

// "read 180MiB a step at 1.20 GB/s".
std::string Moved(const char* what, uint64_t bytes, double seconds, size_t steps) {
  char rate[32];
  std::snprintf(rate, sizeof(rate), "%.2f",
                seconds > 0 ? static_cast<double>(bytes) / seconds / 1e9 : 0.0);
  return Str(what, " ", ApproximateBytes(static_cast<int64_t>(bytes / steps)), " a step at ", rate,
             " GB/s");
}

// What each setting would change, the surest first.
std::string Advice(const v1::RunConfig& config) {
  if (const std::string arena = model::ArenaWarning(config); !arena.empty()) return arena;
  const model::RankMemory memory = model::EstimateRank(config);
  std::string advice;
  const auto add = [&advice](const std::string& one) {
    advice += Str(advice.empty() ? "" : "; ", one);
  };
  if (memory.experts_resident < memory.ExpertBytes()) {
    add(Str("raise memory.expert_offloading.resident_mb from ",
            config.memory().expert_offloading().resident_mb(), " towards ",
            (memory.ExpertBytes() + kMiB - 1) / kMiB, ", which holds all experts of a rank"));
  }
  if (const std::string visits = model::VisitsWarning(config); !visits.empty()) add(visits);
  if (config.training().moments() != v1::TrainingConfig::MOMENTS_BF16) {
    v1::RunConfig less = config;
    less.mutable_training()->set_moments(v1::TrainingConfig::MOMENTS_BF16);
    add(Str("set training.moments=bf16: ", model::EstimateRank(less).bytes_per_expert_parameter,
            " bytes of a parameter of an expert instead of ", memory.bytes_per_expert_parameter));
  }
  add(
      Str("put memory.expert_offloading.spill_dir on a faster disk, and measure it with heddle "
          "bench-host --dir ",
          config.memory().expert_offloading().spill_dir()));
  return advice;
}

}  // namespace

std::optional<v1::Finding> SlowOffload(const v1::RunConfig& config,
                                       const std::vector<v1::MetricPoint>& points) {
  const OffloadSteps all = Collect(points);
  if (all.steps < kOffloadStepsLeast || all.share <= kSlowShare) return std::nullopt;
  v1::Finding finding;
  finding.set_kind("SLOW_OFFLOAD");
  finding.set_rank(0);  // whose steps the metrics are
  finding.set_step(points.back().step());
  finding.set_text(Str("steps wait for offloaded experts: ", Milliseconds(all.waited), " of ",
                       Milliseconds(all.step), " ms (", static_cast<int>(all.share * 100),
                       " %), median of the last ", all.steps, " steps"));
  const v1::OffloadUse& sum = all.sum;
  finding.add_evidence(Str(Moved("read", sum.bytes_read(), sum.read_seconds(), all.steps), ", ",
                           Moved("wrote", sum.bytes_written(), sum.write_seconds(), all.steps)));
  finding.add_evidence(Str(sum.hits() / all.steps, " of ", (sum.hits() + sum.misses()) / all.steps,
                           " uses of experts a step found them in memory, the others waited"));
  const model::RankMemory memory = model::EstimateRank(config);
  finding.add_evidence(Str("in memory at most ", ApproximateBytes(memory.experts_resident), " of ",
                           ApproximateBytes(memory.ExpertBytes()), " of experts"));
  finding.set_advice(Advice(config));
  return finding;
}

}  // namespace heddle::rpc
