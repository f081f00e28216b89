#include "model/tool/model_source.h"

#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <utility>

#include "checkpoint/tensor_io/load.h"
#include "data/tokenizer/tokenizer.h"
#include "heddle/v1/checkpoints.pb.h"
#include "model/hf/model_dir.h"
#include "model/model_plan.h"

namespace heddle::tool {
namespace {

namespace fs = std::filesystem;

StatusOr<model::Precision> PrecisionOf(const std::string& word) {
  if (word == "fp32") return model::Precision::kFp32;
  if (word == "bf16") return model::Precision::kBf16;
  return InvalidArgument(Str("--precision: '", word, "' is neither fp32 nor bf16"));
}

Status MakeStore(const SourceOptions& options, ModelSource* source) {
  ASSIGN_OR_RETURN(const model::Precision precision, PrecisionOf(options.precision));
  ASSIGN_OR_RETURN(model::ModelPlan plan, model::PlanModel(source->config));
  ASSIGN_OR_RETURN(source->store, model::ParameterStore::Create(std::move(plan), precision));
  return OkStatus();
}

StatusOr<ModelSource> OpenFolder(const SourceOptions& options, bool with_weights) {
  ModelSource source;
  source.name = options.dir;
  ASSIGN_OR_RETURN(source.config, hf::ReadModelConfig(options.dir));
  ASSIGN_OR_RETURN(source.eos, hf::ReadEosIds(options.dir, source.config.vocab_size()));
  const std::string tokenizer = options.dir + "/tokenizer.json";
  if (fs::exists(tokenizer)) source.tokenizer_path = tokenizer;
  if (!with_weights) return source;
  RETURN_IF_ERROR(MakeStore(options, &source));
  RETURN_IF_ERROR(hf::ReadWeights(options.dir, source.store.get(), {options.allow_nonfinite}));
  return source;
}

StatusOr<heddle::v1::CheckpointRecord> ReadRecord(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  if (!in) return FromErrno("open", path);
  const std::string bytes(std::istreambuf_iterator<char>(in), {});
  heddle::v1::CheckpointRecord record;
  if (!record.ParseFromString(bytes)) return DataLoss(Str(path, ": not a checkpoint record"));
  return record;
}

// Every tensor and buffer of the plan once, none besides.
Status FillStore(const std::vector<checkpoint::Weight>& weights, model::ParameterStore* store) {
  const model::ModelPlan& plan = store->plan();
  for (const checkpoint::Weight& weight : weights) {
    const model::TensorSpec* tensor = plan.Find(weight.name);
    const model::TensorSpec* spec = tensor != nullptr ? tensor : plan.FindBuffer(weight.name);
    if (spec == nullptr) return DataLoss(Str("unexpected tensor '", weight.name, "'"));
    if (spec->shape != weight.shape) return DataLoss(Str("shape of tensor '", weight.name, "'"));
    const std::span<float> to = tensor != nullptr ? store->master(*spec) : store->buffer(*spec);
    std::copy(weight.values.begin(), weight.values.end(), to.begin());
  }
  const size_t wanted = plan.tensors.size() + plan.buffers.size();
  if (weights.size() != wanted) {
    return DataLoss(Str("checkpoint holds ", weights.size(), " of ", wanted, " tensors"));
  }
  store->RefreshComputeWeights();
  return OkStatus();
}

StatusOr<ModelSource> OpenCheckpoint(const SourceOptions& options, bool with_weights) {
  ASSIGN_OR_RETURN(const heddle::v1::CheckpointRecord record, ReadRecord(options.record));
  heddle::v1::RunConfig run;
  if (!run.ParseFromString(record.train_state().resolved_config())) {
    return DataLoss(Str(options.record, ": no run configuration"));
  }
  ModelSource source;
  source.name = record.dir();
  source.config = run.model();
  source.kv_cache = run.memory().kv_cache();
  source.tokenizer_sha256 = record.train_state().tokenizer_sha256();
  std::string data = run.data().path();
  if (data.empty() && run.data().mixture_size() > 0) data = run.data().mixture(0).path();
  if (!data.empty() && fs::exists(data + "/tokenizer.json")) {
    source.tokenizer_path = data + "/tokenizer.json";
  }
  if (!with_weights) return source;
  RETURN_IF_ERROR(MakeStore(options, &source));
  ASSIGN_OR_RETURN(const std::vector<checkpoint::Weight> weights,
                   checkpoint::ReadModelWeights(record, options.root));
  const Status filled = FillStore(weights, source.store.get());
  if (!filled.ok()) return Annotate(filled, source.name);
  return source;
}

}  // namespace

StatusOr<ModelSource> OpenSource(const SourceOptions& options, bool with_weights) {
  if (options.dir.empty() == options.record.empty()) {
    return InvalidArgument("give a model folder, or --record and --root");
  }
  if (!options.record.empty() && options.root.empty()) {
    return InvalidArgument("--record needs --root");
  }
  StatusOr<ModelSource> source = options.record.empty() ? OpenFolder(options, with_weights)
                                                        : OpenCheckpoint(options, with_weights);
  if (source.ok() && !options.tokenizer.empty()) source->tokenizer_path = options.tokenizer;
  return source;
}

StatusOr<std::unique_ptr<tokenizer::Tokenizer>> OpenTokenizer(const ModelSource& source) {
  if (source.tokenizer_path.empty()) {
    return NotFound(Str(source.name, ": no tokenizer.json; use --ids, or give --tokenizer FILE"));
  }
  ASSIGN_OR_RETURN(std::unique_ptr<tokenizer::Tokenizer> tokenizer,
                   tokenizer::Tokenizer::Load(source.tokenizer_path));
  if (!source.tokenizer_sha256.empty() && tokenizer->sha256() != source.tokenizer_sha256) {
    return FailedPrecondition(
        Str(source.tokenizer_path, ": not the tokenizer of the training run"));
  }
  return tokenizer;
}

std::vector<int64_t> EosIds(const ModelSource& source, const tokenizer::Tokenizer* tokenizer) {
  if (!source.eos.empty() || tokenizer == nullptr) return source.eos;
  const std::optional<uint32_t> id = tokenizer->eos_id();
  // A tokenizer may know more ids than the model.
  if (!id.has_value() || int64_t{*id} >= source.config.vocab_size()) return {};
  return {int64_t{*id}};
}

}  // namespace heddle::tool
