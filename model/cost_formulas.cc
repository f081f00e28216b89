#include "model/cost_formulas.h"

#include <algorithm>
#include <cmath>

namespace heddle::model {
namespace {

constexpr double kBf16Bytes = 2;
constexpr double kFp32Bytes = 4;
constexpr double kSecondsADay = 86'400;

}  // namespace

double ShardedBytes(double parameters, double reduce_bytes, int64_t ranks) {
  const double others = static_cast<double>(ranks - 1) / static_cast<double>(ranks);
  return (2 * kBf16Bytes + reduce_bytes) * parameters * others;
}

double TokensThatHideCollectives(double reduce_bytes, const LinkRates& rates) {
  return (2 * kBf16Bytes + reduce_bytes) * rates.flops / (kTrainingFlops * rates.link);
}

double StreamedBytes(bool full_duplex, double resident) {
  const double bytes = 2 * kBf16Bytes + (full_duplex ? 0 : kBf16Bytes);
  return bytes * (1 - resident);
}

double TokensThatHideStreaming(double streamed_bytes, const LinkRates& rates) {
  return streamed_bytes * rates.flops / (kTrainingFlops * rates.link);
}

double TokensPerExpert(const Routing& routing, double visits) {
  return routing.tokens * routing.top_k / routing.experts * visits;
}

double ExpectedExpertsHit(const Routing& routing) {
  return routing.experts * (1 - std::pow(1 - routing.top_k / routing.experts, routing.tokens));
}

double MergedVisitBytes(double micro_batches, double tokens, double width) {
  return micro_batches * tokens * width * kBf16Bytes;
}

int64_t ZigZagLoads(int64_t layers, int64_t resident) { return 2 * (layers - resident); }

double TokensBelowWhichTheCpuWins(const ExpertOnCpu& expert) {
  // A row goes to the CPU in bf16 and back, forward and backward.
  constexpr double kBytesAcross = 8;
  const double compute = kTrainingFlops / expert.cpu_flops;
  const double rows = kBytesAcross * expert.width / (expert.parameters * expert.link);
  return expert.streamed_bytes / (expert.link * (compute + rows));
}

double BytesPerUpdate(const UpdateBytes& update) {
  return 2 * (kFp32Bytes + update.moments * update.moment_bytes) + update.gradient + update.weights;
}

double UpdateSeconds(double parameters, double bytes, double dram) {
  return parameters * bytes / dram;
}

double ThreadsThatSaturate(double dram, double thread) { return std::ceil(dram / thread); }

double BytesPerParameter(const StateBytes& state) {
  return state.weights + kFp32Bytes + state.moments * state.moment_bytes + state.gradient;
}

DiskTraffic SpillTraffic(double state_bytes, bool weights) {
  DiskTraffic traffic{.read = state_bytes, .written = state_bytes};
  if (weights) {
    traffic.read += 2 * kBf16Bytes;
    traffic.written += kBf16Bytes;
  }
  return traffic;
}

DiskSeconds SpillSeconds(double parameters, const DiskTraffic& traffic, const DiskRates& disk) {
  DiskSeconds seconds{.read = parameters * traffic.read / disk.read,
                      .write = parameters * traffic.written / disk.write};
  seconds.both = std::max(seconds.read, seconds.write);
  return seconds;
}

double TokensThatHideDisk(double bytes, double flops, double disk) {
  return bytes * flops / (kTrainingFlops * disk);
}

double TerabytesADay(double bytes, double step_seconds) {
  return bytes / 1e12 * (kSecondsADay / step_seconds);
}

double SaveIntervalSeconds(double blocking, double mean_time_to_failure) {
  return std::sqrt(2 * blocking * mean_time_to_failure);
}

StreamedStep StreamExperts(const StreamedExperts& experts) {
  StreamedStep step;
  step.tokens_per_expert = TokensPerExpert(experts.routing, experts.visits);
  step.transfer_seconds = experts.parameters * StreamedBytes(true) / experts.rates.link;
  step.compute_seconds = experts.flops_per_parameter * step.tokens_per_expert * experts.parameters /
                         experts.rates.flops;
  step.exposed_seconds = std::max(0.0, step.transfer_seconds - step.compute_seconds);
  return step;
}

}  // namespace heddle::model
