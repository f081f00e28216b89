// Times forward and backward of one micro-batch of a model preset, and its peak memory:
//   bench_model_step PRESET LENGTH [REPEATS] [PRECISION] [RECOMPUTE]
// One document of LENGTH random tokens; stage 2 of indexers. Prints one JSON line; peak_bytes is
// what the step needs beside the parameters and their gradients.
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "base/rng/rng.h"
#include "base/settings/settings.h"
#include "model/language_model.h"
#include "model/model_plan.h"
#include "model/parameter_store.h"

namespace heddle {
namespace {

int64_t PeakBytes() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} << 10;
}

struct Options {
  std::string preset;
  int64_t length = 0;
  int repeats = 3;
  model::Precision precision = model::Precision::kBf16;
  model::Recompute recompute = model::Recompute::kNone;
};

// 0 for text that is no number.
int64_t NumberOf(const std::string& text) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size() ? value : 0;
}

model::Recompute RecomputeOf(const std::string& text) {
  if (text == "full") return model::Recompute::kFull;
  return text == "selective" ? model::Recompute::kSelective : model::Recompute::kNone;
}

// A run of the preset; its data set is never opened.
StatusOr<v1::RunConfig> LoadPreset(const std::string& preset) {
  const std::string path = std::string(P_tmpdir) + Str("/bench_model_step.", getpid(), ".yaml");
  std::ofstream(path) << "defaults: [model: " << preset << "]\ndata: {path: none}\n";
  settings::LoadOptions options;
  options.search_path = settings::DefaultSearchPath();
  const StatusOr<settings::ResolvedConfig> resolved = settings::Load(path, {}, options);
  unlink(path.c_str());
  RETURN_IF_ERROR(resolved);
  return resolved->config;
}

Status Run(const Options& options) {
  ASSIGN_OR_RETURN(v1::RunConfig config, LoadPreset(options.preset));
  config.mutable_model()->set_max_position_embeddings(std::max<int32_t>(
      config.model().max_position_embeddings(), static_cast<int32_t>(options.length)));
  ASSIGN_OR_RETURN(const model::ModelPlan plan, model::PlanModel(config.model()));
  ASSIGN_OR_RETURN(std::unique_ptr<model::ParameterStore> store,
                   model::ParameterStore::Create(plan, options.precision));
  model::InitParameters(1, store.get());
  ASSIGN_OR_RETURN(
      std::unique_ptr<model::LanguageModel> model,
      model::LanguageModel::Create(config.model(), store.get(), {.recompute = options.recompute}));
  RngCursor random(Rng(1, "bench.tokens"));
  std::vector<int64_t> ids(static_cast<size_t>(options.length));
  for (int64_t& id : ids) {
    id = static_cast<int64_t>(random.Below(static_cast<uint64_t>(config.model().vocab_size())));
  }
  std::vector<int64_t> labels(ids.begin() + 1, ids.end());
  labels.push_back(model::kIgnoredLabel);
  const std::vector<int32_t> cu = {0, static_cast<int32_t>(options.length)};
  store->ZeroGradients();
  const int64_t before = PeakBytes();
  layers::StepInfo step;
  step.loss_scale = step.row_scale = 1.0 / static_cast<double>(options.length);
  std::vector<double> seconds;
  double loss = 0;
  for (int i = 0; i < options.repeats; ++i) {
    const auto start = std::chrono::steady_clock::now();
    ASSIGN_OR_RETURN(const model::LossSum sum, model->ForwardBackward({ids, labels, cu}, step));
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    loss = sum.loss / static_cast<double>(sum.tokens);
  }
  std::sort(seconds.begin(), seconds.end());
  std::printf(
      "{\"preset\": \"%s\", \"length\": %lld, \"seconds\": %.6f, \"tokens_per_second\": %.1f, "
      "\"peak_bytes\": %lld, \"loss\": %.6f}\n",
      options.preset.c_str(), static_cast<long long>(options.length), seconds[seconds.size() / 2],
      static_cast<double>(options.length) / seconds[seconds.size() / 2],
      static_cast<long long>(PeakBytes() - before), loss);
  return OkStatus();
}

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  if (argc < 3) {
    std::fprintf(stderr,
                 "usage: bench_model_step PRESET LENGTH [REPEATS] [fp32|bf16] "
                 "[none|selective|full]\n");
    return 2;
  }
  heddle::Options options;
  options.preset = argv[1];
  options.length = heddle::NumberOf(argv[2]);
  if (argc > 3) options.repeats = static_cast<int>(std::max<int64_t>(1, heddle::NumberOf(argv[3])));
  if (argc > 4 && std::string(argv[4]) == "fp32")
    options.precision = heddle::model::Precision::kFp32;
  if (argc > 5) options.recompute = heddle::RecomputeOf(argv[5]);
  const heddle::Status status =
      options.length < 2 ? heddle::InvalidArgument("LENGTH must be at least 2") : Run(options);
  if (!status.ok()) {
    std::fprintf(stderr, "bench_model_step: %s\n", heddle::Message(status).c_str());
    return 1;
  }
  return 0;
}
