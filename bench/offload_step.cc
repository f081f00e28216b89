// Training steps of a mixture of experts with its experts in memory, or in a bounded resident set:
//   bench_offload_step PRESET EXPERTS TOKENS STEPS PRECISION PERCENT BATCHES apart|together [DIR]
// EXPERTS: a layer's, 0 = the preset's. TOKENS: of a step, in BATCHES micro-batches that pass the
// model one after the other, or layer by layer together. PRECISION: bf16 or fp32. PERCENT: of the
// experts' memory, weights, gradients and optimizer state together, that the set may keep; 0 = no
// offloading. DIR: where the rest is spilled to; without it a host arena. One rank, AdamW with fp32
// moments, one document a micro-batch.
//
// Prints one JSON line: seconds of every step and of its update, parameters, what the set moved and
// waited in all steps but the first, and GB/s of the disk: DIR's, read and written block after
// block with O_DIRECT before the run.
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/rng/rng.h"
#include "base/settings/settings.h"
#include "base/units/units.h"
#include "model/language_model.h"
#include "model/model_plan.h"
#include "model/optim/gradient_norm.h"
#include "model/optim/optimizer.h"
#include "worker/comm/communicator.h"
#include "worker/offload/block_memory.h"
#include "worker/offload/spill_file.h"
#include "worker/shard/parameters.h"

namespace heddle {
namespace {

struct Options {
  std::string preset;
  int64_t experts = 0;
  int64_t tokens = 0;
  int64_t steps = 0;
  model::Precision precision = model::Precision::kBf16;
  int64_t percent = 0;
  int64_t batches = 1;
  bool together = false;
  std::string dir;
};

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

struct DiskRates {
  double read = 0;  // bytes per second
  double write = 0;
};

// One block at a time: less than a queue of requests would give, on most disks.
StatusOr<DiskRates> MeasureDisk(const std::string& dir) {
  constexpr int64_t kBytes = 4 * kMiB;
  constexpr int64_t kCount = 32;
  DiskRates rates;
  if (dir.empty()) return rates;
  ASSIGN_OR_RETURN(const offload::SpillFd file, offload::OpenSpillFile(dir));
  RETURN_IF_ERROR(offload::AllocateSpillFile(file, dir, kCount * kBytes));
  offload::BlockMemory memory(kBytes);
  std::byte* const data = memory.Take(kBytes);
  std::memset(data, 1, static_cast<size_t>(kBytes));
  bool whole = true;
  const auto pass = [&](auto transfer) {
    const double began = Now();
    for (int64_t i = 0; i < kCount; ++i) {
      whole =
          whole && transfer(file.value, data, static_cast<size_t>(kBytes), i * kBytes) == kBytes;
    }
    return static_cast<double>(kCount * kBytes) / (Now() - began);
  };
  for (int round = 0; round < 3; ++round) {
    rates.write = std::max(rates.write, pass(pwrite));
    rates.read = std::max(rates.read, pass(pread));
  }
  memory.Give(data, kBytes);
  if (!whole) return FromErrno("a transfer of 4 MiB in", dir);
  return rates;
}

// A run of the preset; its data set is never opened.
StatusOr<v1::ModelConfig> LoadModel(const Options& options) {
  const std::string path = std::string(P_tmpdir) + Str("/bench_offload_step.", getpid(), ".yaml");
  std::ofstream(path) << "defaults: [model: " << options.preset << "]\ndata: {path: none}\n";
  settings::LoadOptions load;
  load.search_path = settings::DefaultSearchPath();
  const StatusOr<settings::ResolvedConfig> resolved = settings::Load(path, {}, load);
  unlink(path.c_str());
  RETURN_IF_ERROR(resolved);
  v1::ModelConfig config = resolved->config.model();
  if (options.experts > 0) {
    config.mutable_moe()->set_n_experts(static_cast<int32_t>(options.experts));
  }
  return config;
}

struct ExpertSizes {
  int64_t parameters = 0;
  int64_t bytes = 0;    // of all blocks: the set that leaves nothing out
  int64_t largest = 0;  // of one expert's
};

// In fp32 the masters are the weights.
ExpertSizes SizesOf(const model::ModelPlan& plan, model::Precision precision) {
  const bool narrow = precision == model::Precision::kBf16;
  ExpertSizes sizes;
  for (size_t u = static_cast<size_t>(plan.dense_units); u < plan.units.size(); ++u) {
    const int64_t elements = plan.units[u].elements;
    const int64_t bytes = offload::BlockMemoryBytes((narrow ? 2 : 4) * elements) +
                          offload::BlockMemoryBytes(4 * elements) +
                          offload::BlockMemoryBytes((narrow ? 12 : 8) * elements);
    sizes.parameters += elements;
    sizes.bytes += bytes;
    sizes.largest = std::max(sizes.largest, bytes);
  }
  return sizes;
}

struct Batch {
  std::vector<int64_t> ids, labels;
  std::vector<int32_t> cu;
};

Batch RandomTokens(int64_t tokens, int64_t vocabulary, int64_t number) {
  RngCursor random(Rng(1, "bench.tokens").Child(static_cast<uint64_t>(number)));
  Batch batch;
  for (int64_t i = 0; i < tokens; ++i) {
    batch.ids.push_back(static_cast<int64_t>(random.Below(static_cast<uint64_t>(vocabulary))));
  }
  batch.labels.assign(batch.ids.begin() + 1, batch.ids.end());
  batch.labels.push_back(model::kIgnoredLabel);
  batch.cu = {0, static_cast<int32_t>(tokens)};
  return batch;
}

// The step loop of a trainer.
class Run {
 public:
  Run(const model::ModelPlan& plan, shard::Parameters* parameters, model::LanguageModel* model)
      : parameters_(parameters),
        model_(model),
        groups_(optim::GroupsOf(plan, hyper_)),
        m_(static_cast<size_t>(parameters->owned_elements()), 0.0f),
        v_(m_) {}

  // Returns the seconds of the update.
  StatusOr<double> Step(const std::vector<Batch>& batches, bool together, int step) {
    layers::StepInfo info;
    info.step = step;
    std::vector<model::PackedBatch> views;
    double tokens = 0;
    for (const Batch& batch : batches) {
      views.push_back({batch.ids, batch.labels, batch.cu});
      tokens += static_cast<double>(batch.ids.size());
    }
    info.loss_scale = info.row_scale = 1.0 / tokens;
    parameters_->BeginStep();
    const size_t at_once = together ? views.size() : 1;
    double loss = 0;
    for (size_t first = 0; first < views.size(); first += at_once) {
      const bool last = first + at_once >= views.size();
      ASSIGN_OR_RETURN(const model::LossSum sum,
                       model_->ForwardBackward(std::span(views).subspan(first, at_once), info,
                                               parameters_->Hooks({.train = true, .last = last})));
      loss += sum.loss * info.loss_scale;
    }
    losses.push_back(loss);
    RETURN_IF_ERROR(parameters_->FinishGradients());
    const double began = Now();
    double squares = 0;
    RETURN_IF_ERROR(parameters_->ForEachMeasured(
        [&](const shard::Measured& slice) { squares += slice.Stats().sum_of_squares; }));
    optim::StepArgs args;
    args.update = step + 1;
    args.learning_rate = 0.001;
    args.grad_scale = optim::ClipDivisor(std::sqrt(squares), 1.0);
    RETURN_IF_ERROR(parameters_->ForEachHeld(shard::Touch::kUpdate, [&](const shard::Held& held) {
      Update(held, args);
      return OkStatus();
    }));
    parameters_->Updated();
    return Now() - began;
  }
  std::vector<double> losses;

 private:
  void Update(const shard::Held& held, const optim::StepArgs& args) {
    const size_t size = held.master.size();
    optim::Shard shard = {.flat_offset = held.range.begin,
                          .master = held.master,
                          .gradient = held.gradient,
                          .compute_bf16 = held.compute_bf16};
    if (held.offloaded) {
      shard.m = {reinterpret_cast<float*>(held.moments[0]), size};
      shard.v = {reinterpret_cast<float*>(held.moments[1]), size};
    } else {
      shard.m = std::span<float>(m_).subspan(static_cast<size_t>(held.owned_offset), size);
      shard.v = std::span<float>(v_).subspan(static_cast<size_t>(held.owned_offset), size);
    }
    optim::OptimizerStep(hyper_, groups_, args, shard);
  }

  shard::Parameters* const parameters_;
  model::LanguageModel* const model_;
  const optim::Hyperparameters hyper_;
  const std::vector<optim::GroupRange> groups_;
  std::vector<float> m_;
  std::vector<float> v_;
};

void PrintList(const char* name, const std::vector<double>& values) {
  std::printf("\"%s\": [", name);
  for (size_t i = 0; i < values.size(); ++i) std::printf("%s%.6f", i == 0 ? "" : ", ", values[i]);
  std::printf("], ");
}

Status Measure(const Options& options) {
  ASSIGN_OR_RETURN(const DiskRates disk, MeasureDisk(options.dir));
  ASSIGN_OR_RETURN(v1::ModelConfig config, LoadModel(options));
  ASSIGN_OR_RETURN(const model::ModelPlan plan,
                   model::PlanModel(config, model::ExpertsOfRank(config, 0, 1)));
  const ExpertSizes sizes = SizesOf(plan, options.precision);
  shard::Options how;
  how.precision = options.precision;
  if (options.together) how.accumulation = shard::Accumulation::kLayerMajor;
  int64_t budget = 0;
  if (options.percent > 0) {
    // Never less than the two experts that an update needs.
    budget = std::max(sizes.bytes * options.percent / 100, 2 * sizes.largest);
    how.offload = {.enabled = true, .budget_bytes = budget, .spill_dir = options.dir};
  }
  ASSIGN_OR_RETURN(const std::unique_ptr<shard::Parameters> parameters,
                   shard::MakeParameters(plan, how));
  const std::unique_ptr<comm::Communicator> solo = comm::MakeSolo();
  parameters->Connect(solo.get());
  RETURN_IF_ERROR(shard::InitParameters(1, parameters.get()));
  ASSIGN_OR_RETURN(const std::unique_ptr<model::LanguageModel> model,
                   model::LanguageModel::Create(config, parameters->memory(), {}));
  Run run(plan, parameters.get(), model.get());
  std::vector<Batch> batches;
  for (int64_t i = 0; i < options.batches; ++i) {
    batches.push_back(RandomTokens(options.tokens / options.batches, config.vocab_size(), i));
  }
  std::vector<double> steps;
  std::vector<double> updates;
  for (int step = 0; step <= options.steps; ++step) {
    const double began = Now();
    ASSIGN_OR_RETURN(const double update, run.Step(batches, options.together, step));
    if (step == 0) {
      parameters->TakeOffloadStats();
      continue;
    }
    steps.push_back(Now() - began);
    updates.push_back(update);
  }
  const offload::ResidentSetStats stats =
      parameters->TakeOffloadStats().value_or(offload::ResidentSetStats{});
  std::printf("{");
  PrintList("step_seconds", steps);
  PrintList("update_seconds", updates);
  PrintList("losses", run.losses);
  std::printf(
      "\"parameters\": %lld, \"expert_parameters\": %lld, \"expert_bytes\": %lld, "
      "\"budget_bytes\": %lld, \"peak_bytes\": %lld, \"hits\": %lld, \"misses\": %lld, "
      "\"bytes_read\": %lld, \"bytes_written\": %lld, \"read_seconds\": %.6f, "
      "\"write_seconds\": %.6f, \"exposed_seconds\": %.6f, \"disk_read\": %.0f, "
      "\"disk_write\": %.0f}\n",
      static_cast<long long>(plan.flat_elements), static_cast<long long>(sizes.parameters),
      static_cast<long long>(sizes.bytes), static_cast<long long>(budget),
      static_cast<long long>(stats.peak_bytes), static_cast<long long>(stats.hits),
      static_cast<long long>(stats.misses), static_cast<long long>(stats.bytes_read),
      static_cast<long long>(stats.bytes_written), stats.read_seconds, stats.write_seconds,
      stats.exposed_seconds, disk.read, disk.write);
  return OkStatus();
}

bool Parse(int argc, char** argv, Options* options) {
  if (argc != 9 && argc != 10) return false;
  options->preset = argv[1];
  const std::pair<int, int64_t*> numbers[] = {{2, &options->experts},
                                              {3, &options->tokens},
                                              {4, &options->steps},
                                              {6, &options->percent},
                                              {7, &options->batches}};
  for (const auto& [at, number] : numbers) {
    const std::string_view text = argv[at];
    const auto parsed = std::from_chars(text.data(), text.data() + text.size(), *number);
    if (parsed.ec != std::errc() || parsed.ptr != text.data() + text.size()) return false;
  }
  const std::string_view precision = argv[5];
  if (precision != "bf16" && precision != "fp32") return false;
  if (precision == "fp32") options->precision = model::Precision::kFp32;
  const std::string_view way = argv[8];
  options->together = way == "together";
  if (argc == 10) options->dir = argv[9];
  return (options->together || way == "apart") && options->batches > 0 && options->experts >= 0 &&
         options->tokens > options->batches && options->steps > 0 && options->percent >= 0 &&
         options->percent <= 100;
}

int Main(int argc, char** argv) {
  Options options;
  if (!Parse(argc, argv, &options)) {
    std::fprintf(stderr,
                 "usage: bench_offload_step PRESET EXPERTS TOKENS STEPS bf16|fp32 PERCENT BATCHES "
                 "apart|together [DIR]\n");
    return 2;
  }
  const Status status = Measure(options);
  if (!status.ok()) std::fprintf(stderr, "bench_offload_step: %s\n", Message(status).c_str());
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) { return heddle::Main(argc, argv); }
