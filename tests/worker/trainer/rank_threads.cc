#include "tests/worker/trainer/rank_threads.h"

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <utility>

#include "base/clock/clock.h"
#include "base/ids/ids.h"
#include "checkpoint/catalog/coverage.h"
#include "checkpoint/format/shard_writer.h"
#include "tests/worker/comm/fake_rendezvous.h"
#include "worker/comm/communicator.h"
#include "worker/comm/shared_memory.h"
#include "worker/trainer/checkpointer.h"
#include "worker/trainer/data_source.h"
#include "worker/trainer/restore.h"

namespace heddle::trainer {

namespace {

using heddle::v1::CheckpointRecord;
using heddle::v1::CheckpointReply;
using heddle::v1::RankSpec;

constexpr uint64_t kJob = 7;

std::string AttemptDir(uint64_t fence) { return Str(ToText(JobId{kJob}), "/f", fence); }

// What the ranks share: the other end of their control.
class Other {
 public:
  Other(int ranks, uint64_t fence) : ranks_(ranks), fence_(fence) {}

  CheckpointReply Seal(const heddle::v1::SealShard& seal) {
    const std::lock_guard<std::mutex> lock(mutex_);
    CheckpointRecord& record = open_[seal.step()];
    record.set_job(kJob);
    record.set_fence(fence_);
    record.set_step(seal.step());
    record.set_world_size(static_cast<uint32_t>(ranks_));
    record.set_dir(checkpoint::StepDir(AttemptDir(fence_), seal.step()));
    heddle::v1::RankSeal* part = record.add_seals();
    part->set_rank(seal.rank());
    *part->mutable_files() = seal.files();
    if (seal.has_train_state()) {
      *record.mutable_tensors() = seal.tensors();
      *record.mutable_train_state() = seal.train_state();
    }
    CheckpointReply reply;
    reply.set_step(seal.step());
    reply.set_verdict(heddle::v1::CHECKPOINT_VERDICT_OK);
    if (record.seals_size() == ranks_) {
      const Status whole = checkpoint::CheckCoverage(record);
      HEDDLE_CHECK(whole.ok(), Message(whole));
      record.set_state(heddle::v1::CHECKPOINT_STATE_COMMITTED);
      committed.push_back(record);
      reply.set_verdict(heddle::v1::CHECKPOINT_VERDICT_COMMITTED);
      changed_.notify_all();
    }
    return reply;
  }

  StatusOr<CheckpointReply> AwaitCommit(uint64_t step) {
    std::unique_lock<std::mutex> lock(mutex_);
    const auto done = [&] {
      return std::any_of(committed.begin(), committed.end(),
                         [step](const CheckpointRecord& one) { return one.step() == step; });
    };
    if (!changed_.wait_for(lock, std::chrono::milliseconds(50), done)) {
      return DeadlineExceeded("not yet");
    }
    CheckpointReply reply;
    reply.set_step(step);
    reply.set_verdict(heddle::v1::CHECKPOINT_VERDICT_COMMITTED);
    return reply;
  }

  comm::FakeRendezvous rendezvous;
  std::vector<CheckpointRecord> committed;

 private:
  const int ranks_;
  const uint64_t fence_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<uint64_t, CheckpointRecord> open_;
};

class Control : public RankControl {
 public:
  explicit Control(Other* other) : other_(other) {}

  StatusOr<RankSpec> Hello(const heddle::v1::RankHello&) override { return Internal("unused"); }
  StatusOr<heddle::v1::StartRank> Ready(const heddle::v1::RankReady&) override {
    return Internal("unused");
  }
  Status Joined(const heddle::v1::RankJoined&) override { return OkStatus(); }
  StatusOr<heddle::v1::RendezvousReply> Rendezvous(const heddle::v1::RendezvousRequest&) override {
    return Internal("unused");
  }
  void Report(const heddle::v1::RankProgress& progress) override {
    for (const heddle::v1::MetricPoint& point : progress.points()) points[point.step()] = point;
  }
  void ReportDamage(const heddle::v1::DamageReport&) override {}
  StatusOr<CheckpointReply> Open(heddle::v1::OpenCheckpoint open) override {
    CheckpointReply reply;
    reply.set_step(open.step());
    reply.set_verdict(heddle::v1::CHECKPOINT_VERDICT_OK);
    return reply;
  }
  StatusOr<CheckpointReply> Seal(heddle::v1::SealShard seal) override { return other_->Seal(seal); }
  StatusOr<CheckpointReply> AwaitCommit(uint64_t step) override {
    return other_->AwaitCommit(step);
  }
  std::optional<heddle::v1::StopRank> StopRequest() override { return std::nullopt; }
  Status WritePermit() override { return OkStatus(); }
  void NoteProgress(uint64_t step, Phase phase) override {
    if (on_phase) on_phase(static_cast<int64_t>(step), phase);
  }
  control::RankPage* page() override { return nullptr; }
  void Exit(const heddle::v1::RankExit&) override {}

  std::map<uint64_t, heddle::v1::MetricPoint> points;
  std::function<void(int64_t step, Phase phase)> on_phase;

 private:
  Other* const other_;
};

// Shows gradients to the injection before they are summed.
class Injecting : public comm::Communicator {
 public:
  Injecting(std::unique_ptr<comm::Communicator> group,
            std::function<void(std::span<float>)> gradients)
      : group_(std::move(group)), gradients_(std::move(gradients)) {}

  int rank() const override { return group_->rank(); }
  int world_size() const override { return group_->world_size(); }
  std::string backend() const override { return group_->backend(); }
  Status AllReduceSum(std::span<float> values, int unit) override {
    gradients_(values);
    return group_->AllReduceSum(values, unit);
  }
  Status AllReduceSum(std::span<double> values) override { return group_->AllReduceSum(values); }
  StatusOr<std::unique_ptr<comm::Pending>> StartAllGather(std::span<const std::byte> mine,
                                                          std::span<std::byte> all,
                                                          int unit) override {
    return group_->StartAllGather(mine, all, unit);
  }
  StatusOr<std::unique_ptr<comm::Pending>> StartReduceScatterSum(std::span<const float> all,
                                                                 std::span<float> sum,
                                                                 comm::Wire wire,
                                                                 int unit) override {
    gradients_({const_cast<float*>(all.data()), all.size()});
    return group_->StartReduceScatterSum(all, sum, wire, unit);
  }
  StatusOr<std::unique_ptr<comm::Pending>> StartAllToAll(std::span<const std::byte> sent,
                                                         std::span<const size_t> sent_bytes,
                                                         std::span<std::byte> received,
                                                         std::span<const size_t> received_bytes,
                                                         int unit) override {
    return group_->StartAllToAll(sent, sent_bytes, received, received_bytes, unit);
  }
  void SetTimeout(std::chrono::milliseconds timeout) override { group_->SetTimeout(timeout); }
  void Abort() override { group_->Abort(); }

 private:
  const std::unique_ptr<comm::Communicator> group_;
  const std::function<void(std::span<float>)> gradients_;
};

// Tells which global sequence is read.
class Watching : public stream::SequenceSource {
 public:
  Watching(std::shared_ptr<const stream::SequenceSource> source,
           std::function<void(int64_t)> on_read)
      : source_(std::move(source)), on_read_(std::move(on_read)) {}
  Status AppendAs(int64_t index, int64_t global_index, stream::PackedBatch* batch) const override {
    on_read_(index);
    return source_->AppendAs(index, global_index, batch);
  }
  stream::SequenceShape Shape(int64_t index) const override { return source_->Shape(index); }
  std::string fingerprint() const override { return source_->fingerprint(); }

 private:
  const std::shared_ptr<const stream::SequenceSource> source_;
  const std::function<void(int64_t)> on_read_;
};

StatusOr<std::unique_ptr<comm::Communicator>> Connect(Other* other, const RankSpec& spec) {
  if (spec.world_size() == 1) return comm::MakeSolo();
  comm::GroupOptions options;
  options.rank = static_cast<int>(spec.rank());
  options.world_size = static_cast<int>(spec.world_size());
  options.data_address = "127.0.0.1";
  options.key_prefix = Str("f", spec.fence(), "/");
  options.rendezvous = [other, rank = spec.rank()](const heddle::v1::RendezvousRequest& request)
      -> StatusOr<heddle::v1::RendezvousReply> { return other->rendezvous.Answer(rank, request); };
  options.init_timeout = std::chrono::milliseconds(20'000);
  options.step_timeout = std::chrono::milliseconds(20'000);
  ASSIGN_OR_RETURN(std::unique_ptr<comm::Communicator> group, comm::ConnectGloo(options));
  std::string why_not;
  ASSIGN_OR_RETURN(group, comm::OverSharedMemory(std::move(group), &why_not));
  if (!why_not.empty()) return FailedPrecondition(why_not);
  return group;
}

// As run_rank.cc puts a rank together, with the decorators in between.
StatusOr<LoopEnd> RunRank(const AttemptInput& input, const RankSpec& spec, Other* other,
                          AttemptResult* result) {
  const int rank = static_cast<int>(spec.rank());
  const SystemClock clock;
  ASSIGN_OR_RETURN(const RunPlan plan, PlanRun(spec.config()));
  ASSIGN_OR_RETURN(RunData data, OpenData(spec.config()));
  ASSIGN_OR_RETURN(
      const std::unique_ptr<RunState> state,
      RunState::Create(spec.config().model(), plan, rank, static_cast<int>(spec.world_size())));
  ASSIGN_OR_RETURN(
      const std::unique_ptr<model::LanguageModel> model,
      model::LanguageModel::Create(spec.config().model(), state->parameters()->memory(), {}));
  ASSIGN_OR_RETURN(std::unique_ptr<comm::Communicator> plain, Connect(other, spec));
  Injecting group(std::move(plain), [&](std::span<float> gradients) {
    if (input.injection.gradients) {
      input.injection.gradients(rank, state->counters().step, gradients);
    }
  });
  if (input.injection.sequence) {
    data.train = std::make_shared<Watching>(
        data.train, [&](int64_t index) { input.injection.sequence(rank, index, state.get()); });
  }
  Control control(other);
  control.on_phase = [&](int64_t step, Phase phase) {
    if (phase == Phase::kData && input.injection.parameters) {
      input.injection.parameters(rank, step, state.get());
    }
  };
  state->parameters()->Connect(&group);
  ASSIGN_OR_RETURN(const Restored restored,
                   Restore(spec, plan, data, &group, &control, state.get()));
  RETURN_IF_ERROR(SkipData(state->skipped(), &data));
  CheckpointerOptions options;
  options.root = spec.checkpoint_root();
  options.attempt_dir = spec.attempt_dir();
  options.job = kJob;
  options.fence = spec.fence();
  options.rank = spec.rank();
  options.world_size = spec.world_size();
  options.config_hash = plan.config_hash;
  options.tensors = state->tensors();
  Checkpointer checkpointer(&control, &clock, std::move(options));
  TrainLoop loop({.spec = &spec,
                  .plan = &plan,
                  .data = &data,
                  .group = &group,
                  .control = &control,
                  .model = model.get(),
                  .state = state.get(),
                  .checkpointer = &checkpointer,
                  .clock = &clock});
  StatusOr<LoopEnd> end = loop.Run();
  if (!end.ok()) group.Abort();
  if (rank == 0) {
    result->points = control.points;
    result->start_step = restored.step;
  }
  return end;
}

}  // namespace

AttemptResult RunAttempt(const AttemptInput& input) {
  const int ranks = input.config.parallel().ranks().max();
  Other other(ranks, input.fence);
  AttemptResult result;
  result.ends.assign(static_cast<size_t>(ranks), Internal("did not run"));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < ranks; ++rank) {
    threads.emplace_back([&, rank] {
      RankSpec spec;
      *spec.mutable_config() = input.config;
      spec.set_job(ToText(JobId{kJob}));
      spec.set_attempt(static_cast<uint32_t>(input.fence));
      spec.set_fence(input.fence);
      spec.set_rank(static_cast<uint32_t>(rank));
      spec.set_world_size(static_cast<uint32_t>(ranks));
      spec.set_checkpoint_root(input.root);
      spec.set_attempt_dir(AttemptDir(input.fence));
      spec.set_threads(1);
      for (const CheckpointRecord& record : input.restore) *spec.add_restore() = record;
      for (const heddle::v1::DataWindow& window : input.skipped) *spec.add_skipped() = window;
      result.ends[static_cast<size_t>(rank)] = RunRank(input, spec, &other, &result);
    });
  }
  for (std::thread& thread : threads) thread.join();
  result.committed = other.committed;
  return result;
}

}  // namespace heddle::trainer
