#include "coordinator/rpc/resume_fit.h"

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "base/ids/ids.h"
#include "checkpoint/catalog/tensors.h"
#include "model/model_plan.h"
#include "model/saved_tensors.h"

namespace heddle::rpc {

namespace v1 = heddle::v1;

namespace {

using Shape = std::vector<int64_t>;
using Classes = std::vector<int>;

std::string ToText(const Shape& shape) {
  std::string text;
  for (const int64_t size : shape) text += Str(text.empty() ? "" : ", ", size);
  return Str("[", text, "]");
}

std::string ToText(const Classes& classes) {
  std::string text;
  for (const int one : classes) {
    text += Str(text.empty() ? "" : ", ", checkpoint::ToText(static_cast<v1::TensorClass>(one)));
  }
  return text;
}

Shape ShapeOf(const v1::TensorInfo& info) { return {info.shape().begin(), info.shape().end()}; }

Classes ClassesOf(const v1::TensorInfo& info) {
  Classes classes(info.classes().begin(), info.classes().end());
  std::sort(classes.begin(), classes.end());
  return classes;
}

bool HasMoments(const v1::TensorInfo& info) {
  return std::find(info.classes().begin(), info.classes().end(), v1::TENSOR_CLASS_MOMENT1) !=
         info.classes().end();
}

// What the trainer of this run saves.
std::vector<v1::TensorInfo> TensorsOf(const v1::RunConfig& config) {
  const v1::TrainingConfig& training = config.training();
  model::SavedMoments moments;
  moments.second = training.optimizer() != v1::TrainingConfig::OPTIMIZER_LION;
  if (training.moments() == v1::TrainingConfig::MOMENTS_BF16) {
    moments.type = v1::ELEMENT_TYPE_BF16;
  }
  return model::SavedTensors(*model::PlanModel(config.model()), moments);
}

constexpr char kOtherModel[] =
    "give the run the model of the checkpoint's job, or train the other model from its own start "
    "(without resume_from)";

// What differs, and what to do. Empty: nothing. One of the two may be null.
std::string Misfit(const std::string& name, const v1::TensorInfo* wanted,
                   const v1::TensorInfo* saved) {
  if (saved == nullptr) {
    return Str("tensor ", name, ": the run has it with shape ", ToText(ShapeOf(*wanted)),
               ", the checkpoint lacks it: ", kOtherModel);
  }
  const Shape shape = ShapeOf(*saved);
  if (wanted == nullptr) {
    return Str("tensor ", name, ": the checkpoint has it with shape ", ToText(shape),
               ", the run lacks it: ", kOtherModel);
  }
  if (shape != ShapeOf(*wanted)) {
    return Str("tensor ", name, ": the run needs shape ", ToText(ShapeOf(*wanted)),
               ", the checkpoint has ", ToText(shape), ": ", kOtherModel);
  }
  if (ClassesOf(*saved) != ClassesOf(*wanted)) {
    return Str("tensor ", name, " of shape ", ToText(shape), ": training.optimizer needs ",
               ToText(ClassesOf(*wanted)), ", the checkpoint has ", ToText(ClassesOf(*saved)),
               ": set training.optimizer to that of the checkpoint's job");
  }
  if (HasMoments(*saved) && wanted->moment_type() == v1::ELEMENT_TYPE_BF16 &&
      saved->moment_type() != v1::ELEMENT_TYPE_BF16) {
    return Str("tensor ", name,
               ": training.moments is bf16, the checkpoint keeps its moments in fp32, and "
               "rounding them would not go on with the same run: set training.moments: fp32");
  }
  return "";
}

}  // namespace

Status CheckFits(const v1::CheckpointRecord& record, const v1::RunConfig& config) {
  if (config.kind() != v1::RunConfig::KIND_TRAIN) return OkStatus();
  struct Pair {
    const v1::TensorInfo* wanted = nullptr;
    const v1::TensorInfo* saved = nullptr;
  };
  const std::vector<v1::TensorInfo> tensors = TensorsOf(config);
  std::map<std::string, Pair> both;  // every name of the two, in order
  for (const v1::TensorInfo& info : tensors) both[info.name()].wanted = &info;
  for (const v1::TensorInfo& info : record.tensors()) both[info.name()].saved = &info;
  for (const auto& [name, pair] : both) {
    const std::string what = Misfit(name, pair.wanted, pair.saved);
    if (!what.empty()) {
      return InvalidArgument(Str("checkpoint.resume_from: checkpoint ", JobId{record.job()}, "@",
                                 record.step(), " does not fit this run: ", what));
    }
  }
  return OkStatus();
}

}  // namespace heddle::rpc
