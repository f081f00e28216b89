#include "worker/trainer/restore.h"

#include <array>
#include <span>
#include <utility>

#include "base/log/log.h"
#include "data/pack/dataset.h"
#include "kernels/common/isa.h"
#include "worker/trainer/threads.h"

namespace heddle::trainer {

namespace {

using heddle::v1::CheckpointRecord;
using heddle::v1::RankSpec;
using heddle::v1::TrainState;

// The data order must be the saved one, or the run would repeat or miss sequences.
Status CheckSame(const TrainState& saved, const TrainState& now, const RankSpec& spec,
                 const RunPlan& plan, int64_t position) {
  // Other data are a choice, other words behind the same ids never are.
  if (!saved.tokenizer_sha256().empty() && !now.tokenizer_sha256().empty() &&
      saved.tokenizer_sha256() != now.tokenizer_sha256()) {
    return FailedPrecondition(
        Str("the data were made with another tokenizer than the checkpoint's (sha256 ",
            now.tokenizer_sha256(), " instead of ", saved.tokenizer_sha256(),
            "): prepare them with that one; data.allow_changed does not allow this"));
  }
  if (saved.manifest_hash() != now.manifest_hash()) {
    if (!spec.config().data().allow_changed()) {
      return FailedPrecondition(
          "the data differ from the checkpoint's (set, seed, packing or sequence length); "
          "data.allow_changed: true goes on with them");
    }
    HEDDLE_WARN("the data differ from the checkpoint's", {"saved", saved.manifest_hash()},
                {"now", now.manifest_hash()});
  }
  if (position % plan.global_batch != 0) {
    return FailedPrecondition(Str("data position ", saved.data_position(), ", ", position,
                                  " without what was skipped, is no multiple of the global batch ",
                                  "of ", plan.global_batch));
  }
  return OkStatus();
}

Status LoadOne(const CheckpointRecord& record, const RankSpec& spec, const RunPlan& plan,
               const RunData& data, RunState* state) {
  const TrainState& saved = record.train_state();
  const std::vector<stream::Window> skipped = SkippedWindows(spec, saved);
  const int64_t position = stream::LocalIndex(skipped, static_cast<int64_t>(saved.data_position()));
  RETURN_IF_ERROR(CheckSame(saved, DescribeRun(spec, plan, data), spec, plan, position));
  RETURN_IF_ERROR(state->Load(record, spec.checkpoint_root()));
  Counters& counters = state->counters();
  counters.step = static_cast<int64_t>(saved.step());
  counters.updates = static_cast<int64_t>(saved.updates());
  counters.frozen_updates = static_cast<int64_t>(saved.frozen_updates());
  counters.data_position = position;
  counters.tokens = static_cast<int64_t>(saved.tokens_seen());
  state->numeric().Load(saved);
  state->skipped() = skipped;
  return OkStatus();
}

void LogExactness(const TrainState& saved, const TrainState& now) {
  std::string reasons;
  for (const std::string& reason : InexactReasons(saved, now)) {
    reasons += Str(reasons.empty() ? "" : "; ", reason);
  }
  HEDDLE_INFO("restored", {"step", saved.step()}, {"exact", reasons.empty()}, {"why", reasons});
}

}  // namespace

Status CheckSameTokenizer(const std::string& model_dir, const RunData& data) {
  ASSIGN_OR_RETURN(const std::string sha, pack::TokenizerSha256(model_dir));
  if (sha.empty() || data.tokenizer_sha256.empty() || sha == data.tokenizer_sha256) {
    return OkStatus();
  }
  return FailedPrecondition(
      Str("checkpoint.init_from: the data were made with another tokenizer (sha256 ",
          data.tokenizer_sha256, ") than the model in ", model_dir, " (", sha,
          "): prepare them with the model's tokenizer"));
}

std::vector<std::string> InexactReasons(const TrainState& saved, const TrainState& now) {
  std::vector<std::string> reasons;
  const auto differ = [&](bool differs, const std::string& what) {
    if (differs) {
      reasons.push_back(what);
    }
  };
  differ(saved.world_size() != now.world_size(),
         Str(now.world_size(), " ranks instead of ", saved.world_size()));
  differ(saved.threads_per_rank() != now.threads_per_rank(),
         Str(now.threads_per_rank(), " threads instead of ", saved.threads_per_rank()));
  differ(saved.isa() != now.isa(), Str(now.isa(), " instead of ", saved.isa()));
  differ(saved.torch_version() != now.torch_version(),
         Str("LibTorch ", now.torch_version(), " instead of ", saved.torch_version()));
  differ(saved.manifest_hash() != now.manifest_hash(), "other data");
  return reasons;
}

TrainState DescribeRun(const RankSpec& spec, const RunPlan& plan, const RunData& data) {
  TrainState state;
  state.set_manifest_hash(data.fingerprint);
  state.set_seed(plan.seed);
  state.set_config_hash(plan.config_hash);
  state.set_resolved_config(spec.config().SerializeAsString());
  state.set_world_size(spec.world_size());
  state.set_threads_per_rank(spec.threads());
  state.set_isa(kernels::IsaName(kernels::SelectedIsa()));
  state.set_torch_version(TorchVersion());
  state.set_tokenizer_sha256(data.tokenizer_sha256);
  return state;
}

std::vector<stream::Window> SkippedWindows(const RankSpec& spec, const TrainState& saved) {
  std::vector<stream::Window> windows;
  for (const auto* list : {&spec.skipped(), &saved.skipped()}) {
    for (const heddle::v1::DataWindow& window : *list) {
      windows.push_back({.first = static_cast<int64_t>(window.first()),
                         .count = static_cast<int64_t>(window.count())});
    }
  }
  return stream::MergeWindows(std::move(windows));
}

StatusOr<Restored> Restore(const RankSpec& spec, const RunPlan& plan, const RunData& data,
                           comm::Communicator* group, RankControl* control, RunState* state) {
  for (const CheckpointRecord& record : spec.restore()) {
    control->NoteProgress(record.step(), Phase::kRestoring);
    const Status loaded = LoadOne(record, spec, plan, data, state);
    // Nobody goes on alone: damage on one rank sends all to the next checkpoint.
    const bool fatal = !loaded.ok() && loaded.code() == StatusCode::kFailedPrecondition;
    // The disk of offloaded experts failed, not the checkpoint's: this attempt ends, and it stays
    // good.
    const Status healthy = state->parameters()->Healthy();
    std::array<double, 3> verdict = {loaded.ok() ? 0.0 : 1.0, fatal ? 1.0 : 0.0,
                                     healthy.ok() ? 0.0 : 1.0};
    RETURN_IF_ERROR(group->AllReduceSum(std::span<double>(verdict)));
    RETURN_IF_ERROR(healthy);
    if (verdict[2] > 0) return Unavailable("another rank lost its offloaded experts");
    if (verdict[0] == 0) {
      LogExactness(record.train_state(), DescribeRun(spec, plan, data));
      return Restored{.from_checkpoint = true, .fence = record.fence(), .step = record.step()};
    }
    if (verdict[1] > 0) {
      return fatal ? loaded
                   : FailedPrecondition("another rank finds the checkpoint unfit for this run");
    }
    HEDDLE_WARN("checkpoint is damaged, falling back", {"step", record.step()},
                {"why", loaded.ok() ? "seen by another rank" : Message(loaded)});
    // The rank that saw it names file and block; the coordinator takes the first report.
    if (!loaded.ok()) {
      heddle::v1::DamageReport damage;
      damage.set_checkpoint_fence(record.fence());
      damage.set_checkpoint_step(record.step());
      damage.set_detail(Message(loaded));
      control->ReportDamage(damage);
    }
    RETURN_IF_ERROR(state->Reset());
  }
  if (spec.restore_size() > 0) {
    return DataLoss(Str("none of ", spec.restore_size(), " checkpoints can be loaded"));
  }
  state->skipped() = SkippedWindows(spec, TrainState());
  return Restored{};
}

}  // namespace heddle::trainer
