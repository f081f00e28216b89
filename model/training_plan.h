// What a training run needs of memory, time and disk, from its configuration and a few figures of
// the host: the numbers of `heddle plan` (training-runtime.md sections 4 and 18). Torch-free; of
// target model_plan.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "model/model_plan.h"
#include "model/rank_memory.h"
#include "model/step_estimate.h"

namespace heddle::v1 {
class PlanReply;
class RunConfig;
}  // namespace heddle::v1

namespace heddle::model {

// ---- memory ----

// What a trainer takes of its own, whatever the model: LibTorch, collectives, data, a save's
// buffers. 62 MiB of memory that is the process's alone, measured as worker_trainer_memory_test
// does for a model of next to nothing, and what the allocator holds between blocks.
inline constexpr int64_t kRuntimeBytes = int64_t{68} << 20;

struct NamedBytes {
  const char* name = "";
  int64_t bytes = 0;
};
// The estimate by category, without empty ones, and the runtime's own.
std::vector<NamedBytes> MemoryCategories(const RankMemory& memory);
// Their sum: what a rank takes at its peak. REQUIRES: PlanModel(config.model()).ok().
int64_t BytesPerRank(const heddle::v1::RunConfig& config);

// What the coordinator reserves for a rank where parallel.memory_per_rank leaves it open: the plan,
// a tenth of it for what no plan knows, and pages of libraries and data.
int64_t DefaultReservation(const heddle::v1::RunConfig& config);
// INVALID_ARGUMENT, with the changes that fit: parallel.memory_per_rank is given, and by more than
// the plan's error less than the run takes; or the error of CheckResidentBound.
Status CheckReservation(const heddle::v1::RunConfig& config);

// Settings that bring a rank below a limit, as key=value, with what a rank takes then.
struct Change {
  std::vector<std::string> settings;
  int64_t bytes = 0;
  std::string price;  // "about a third more computation"
};
// "training.moments=bf16 parallel.shard=full".
std::string SettingsText(const Change& change);
// Every single change that fits, cheapest first; if none does, the shortest row of cheapest ones
// that does; if that does not either, nothing. All leave the global batch and the mathematics of
// the run alone, but for rounding. The folder of spilled experts is the user's to choose: DIR.
// `without`: a key that is not to change ("training.moments").
std::vector<Change> ChangesThatFit(const heddle::v1::RunConfig& config, int64_t limit,
                                   const std::string& without = "");

// Tokens of divided experts go where routing sends them; the plan counts a quarter more than a
// rank's share, or what model.moe.capacity_factor allows. Without that, what all tokens on one
// rank's experts would take besides, as a sentence for the plan's warnings; empty where experts are
// not divided or routing is bounded.
std::string SkewWarning(const heddle::v1::RunConfig& config);
// What spilled experts cost that are read for each micro-batch, where passes layer by layer read
// them once; empty where that saves little.
std::string VisitsWarning(const heddle::v1::RunConfig& config);
// That untouched=skip changes what is computed; empty without it.
std::string UntouchedWarning(const heddle::v1::RunConfig& config);

// ---- disk ----

// Assumed where nothing was measured.
inline constexpr double kMeanTimeToFailureSeconds = 7.9 * 3600;

struct StorageEstimate {
  int64_t checkpoint_bytes = 0;  // one checkpoint, all ranks
  double save_seconds = 0;       // between saves; 0: unknown, where only steps are given
  int64_t save_steps = 0;        // 0: by time, and the time of a step is not known
  int64_t kept_bytes = 0;        // at the end of the run, one in the making included
  int64_t spill_bytes = 0;       // spill files and snapshots of all ranks
  // Terabytes (1e12) a day by spilled experts with their snapshots and by checkpoints, all ranks; 0
  // where the time of a step is not known.
  double spill_tb_per_day = 0;
  double checkpoint_tb_per_day = 0;
};
// `step`: of EstimateStep. Intervals of `auto` by formula (7).
StorageEstimate EstimateStorage(const heddle::v1::RunConfig& config, const StepEstimate& step,
                                double mean_time_to_failure = kMeanTimeToFailureSeconds);
// What to say of a disk that takes so much; empty where it is no matter. Drives are sold for about
// one filling a day over five years: a few terabytes.
std::string EnduranceWarning(const StorageEstimate& storage);

// ---- all together ----

// Memory, throughput and storage of `heddle plan`; fields that need a figure which is not known
// stay absent, and a warning says so. Placement and configuration are the caller's.
// REQUIRES: PlanModel(config.model()).ok().
void FillPlan(const heddle::v1::RunConfig& config, const HostFigures& host,
              heddle::v1::PlanReply* plan, double mean_time_to_failure = kMeanTimeToFailureSeconds);
// A rank must also fit into `limit` bytes, the largest node: sets memory.fits and the changes.
void LimitMemory(const heddle::v1::RunConfig& config, int64_t limit, heddle::v1::PlanReply* plan);

}  // namespace heddle::model
