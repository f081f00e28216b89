// What training costs, in closed form: the formulas of training-runtime.md section 4, by number.
// Pure functions of sizes and rates; no configuration, no measuring, no LibTorch. Rates are bytes
// or floating point operations a second, times are seconds. Rates and divisors must be > 0.
// Of target model_plan.
#pragma once

#include <cstdint>

namespace heddle::model {

// Operations of training per parameter and token; with every block computed twice 8.
inline constexpr double kTrainingFlops = 6;
inline constexpr double kRecomputeFlops = 8;

// ---- (1) sharded communication ----

// Bytes that a rank sends in a micro-batch under parallel.shard=full: two gathers of bf16 weights
// and a reduce-scatter of `reduce_bytes` (4 or 2) an element.
double ShardedBytes(double parameters, double reduce_bytes, int64_t ranks);
// Tokens per rank and micro-batch from which they are hidden behind the computation, for many
// ranks.
struct LinkRates {
  double flops = 0;
  double link = 0;
};
double TokensThatHideCollectives(double reduce_bytes, const LinkRates& rates);

// ---- (2) expert weights streamed from the host ----

// Bytes per parameter and visit that the link must carry before the computation waits no more: 4
// (weights in, forward and backward) where gradients (2 more) travel the other way at the same
// time, else 6. Of a fraction `resident` nothing is carried.
double StreamedBytes(bool full_duplex, double resident = 0);
// Tokens per expert and visit from which streaming is hidden.
double TokensThatHideStreaming(double streamed_bytes, const LinkRates& rates);
struct Routing {
  double tokens = 0;  // of a micro-batch
  double top_k = 0;
  double experts = 0;
};
// Rows that an expert gets of `visits` micro-batches.
double TokensPerExpert(const Routing& routing, double visits = 1);
// Experts that a micro-batch needs at all, each token choosing as if by chance.
double ExpectedExpertsHit(const Routing& routing);
// Bytes of stored block inputs, bf16, with which layer-major accumulation pays for merged visits.
double MergedVisitBytes(double micro_batches, double tokens, double width);
// Loads a step of `layers` visited forward and then backward, with `resident` of them kept, least
// recently used out first: the backward begins with what the forward left, and the next step with
// what the backward left. REQUIRES: 0 <= resident <= layers.
int64_t ZigZagLoads(int64_t layers, int64_t resident);

// ---- (3) an expert computed on the CPU instead ----

struct ExpertOnCpu {
  double streamed_bytes = 6;  // a parameter
  double parameters = 0;      // of the expert
  double width = 0;           // of the model: its rows cross the link instead
  double cpu_flops = 0;
  double link = 0;
};
// Rows below which the CPU is done before the link would be.
double TokensBelowWhichTheCpuWins(const ExpertOnCpu& expert);

// ---- (4) AdamW on the host ----

struct UpdateBytes {
  double moments = 2;       // arrays: AdamW 2, Lion 1
  double moment_bytes = 4;  // 4 or 2
  double gradient = 2;      // as it arrives: bf16 2, fp32 4
  double weights = 2;       // bf16 copy written; 0 in fp32
};
// Bytes moved per parameter and update: master and moments read and written, gradient read, weights
// written. 28 and, with bf16 moments, 20.
double BytesPerUpdate(const UpdateBytes& update);
double UpdateSeconds(double parameters, double bytes, double dram);
// Threads that saturate a memory of which one thread takes `thread`.
double ThreadsThatSaturate(double dram, double thread);

// ---- (5) host memory of experts ----

struct StateBytes {
  double weights = 2;  // bf16 copy; 0 in fp32
  double moments = 2;
  double moment_bytes = 4;
  double gradient = 4;  // kept: fp32 4, bf16 2
};
// Bytes kept per parameter: 16 to 18, with bf16 moments 12 to 14.
double BytesPerParameter(const StateBytes& state);

// ---- (6) spilling to disk ----

struct DiskRates {
  double read = 0;
  double write = 0;
};
struct DiskTraffic {
  double read = 0;
  double written = 0;
};
// Bytes per spilled parameter and update; `weights`: they are spilled too, read in forward and
// backward and written once.
DiskTraffic SpillTraffic(double state_bytes, bool weights);
struct DiskSeconds {
  double read = 0;
  double write = 0;
  double both = 0;  // the streams run side by side
};
DiskSeconds SpillSeconds(double parameters, const DiskTraffic& traffic, const DiskRates& disk);
// Tokens per expert and step from which `bytes` a parameter hide behind the computation.
double TokensThatHideDisk(double bytes, double flops, double disk);
// Terabytes (1e12) that a disk takes a day at `bytes` a step.
double TerabytesADay(double bytes, double step_seconds);

// ---- (7) checkpoint interval ----

// Seconds between saves of which each blocks training for `blocking` seconds.
double SaveIntervalSeconds(double blocking, double mean_time_to_failure);

// ---- (8) a step of streamed experts ----

struct StreamedExperts {
  double parameters = 0;  // of all experts
  Routing routing;
  double visits = 1;  // micro-batches of a visit: layer-major accumulation
  double flops_per_parameter = kRecomputeFlops;
  LinkRates rates;
};
struct StreamedStep {
  double tokens_per_expert = 0;  // a visit
  double transfer_seconds = 0;   // to the device, a visit
  double compute_seconds = 0;    // of the experts, a visit
  double exposed_seconds = 0;    // of the transfer
};
StreamedStep StreamExperts(const StreamedExperts& experts);

}  // namespace heddle::model
