#include "coordinator/rpc/resume_fit.h"

#include <algorithm>
#include <map>
#include <string>
#include <vector>

#include "base/ids/ids.h"
#include "checkpoint/catalog/tensors.h"
#include "model/model_plan.h"

namespace heddle::rpc {

namespace v1 = heddle::v1;

namespace {

using Shape = std::vector<int64_t>;
using Classes = std::vector<int>;

struct Wanted {
  Shape shape;
  Classes classes;
};

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

// What the trainer saves of each tensor, by name.
std::map<std::string, Wanted> TensorsOf(const v1::RunConfig& config) {
  const model::ModelPlan plan = *model::PlanModel(config.model());
  Classes trained = {v1::TENSOR_CLASS_MASTER, v1::TENSOR_CLASS_MOMENT1};
  if (config.training().optimizer() != v1::TrainingConfig::OPTIMIZER_LION) {
    trained.push_back(v1::TENSOR_CLASS_MOMENT2);
  }
  std::map<std::string, Wanted> wanted;
  for (const model::TensorSpec& spec : plan.tensors) wanted[spec.name] = {spec.shape, trained};
  for (const model::TensorSpec& spec : plan.buffers) {
    wanted[spec.name] = {spec.shape, {v1::TENSOR_CLASS_BUFFER}};
  }
  return wanted;
}

constexpr char kOtherModel[] =
    "give the run the model of the checkpoint's job, or train the other model from its own start "
    "(without resume_from)";

// What differs, and what to do. Empty: nothing.
std::string Misfit(const std::string& name, const Wanted* wanted, const v1::TensorInfo* saved) {
  if (saved == nullptr) {
    return Str("tensor ", name, ": the run has it with shape ", ToText(wanted->shape),
               ", the checkpoint lacks it: ", kOtherModel);
  }
  const Shape shape(saved->shape().begin(), saved->shape().end());
  if (wanted == nullptr) {
    return Str("tensor ", name, ": the checkpoint has it with shape ", ToText(shape),
               ", the run lacks it: ", kOtherModel);
  }
  if (shape != wanted->shape) {
    return Str("tensor ", name, ": the run needs shape ", ToText(wanted->shape),
               ", the checkpoint has ", ToText(shape), ": ", kOtherModel);
  }
  Classes classes(saved->classes().begin(), saved->classes().end());
  std::sort(classes.begin(), classes.end());
  if (classes != wanted->classes) {
    return Str("tensor ", name, " of shape ", ToText(shape), ": training.optimizer needs ",
               ToText(wanted->classes), ", the checkpoint has ", ToText(classes),
               ": set training.optimizer to that of the checkpoint's job");
  }
  return "";
}

bool HasMoments(const v1::TensorInfo& info) {
  return std::find(info.classes().begin(), info.classes().end(), v1::TENSOR_CLASS_MOMENT1) !=
         info.classes().end();
}

}  // namespace

Status CheckFits(const v1::CheckpointRecord& record, const v1::RunConfig& config) {
  if (config.kind() != v1::RunConfig::KIND_TRAIN) return OkStatus();
  const std::map<std::string, Wanted> wanted = TensorsOf(config);
  std::map<std::string, const v1::TensorInfo*> both;  // every name of the two, in order
  for (const auto& [name, spec] : wanted) both[name] = nullptr;
  for (const v1::TensorInfo& info : record.tensors()) both[info.name()] = &info;
  const bool narrow = config.training().moments() == v1::TrainingConfig::MOMENTS_BF16;
  for (const auto& [name, saved] : both) {
    const auto own = wanted.find(name);
    std::string what = Misfit(name, own == wanted.end() ? nullptr : &own->second, saved);
    if (what.empty() && narrow && HasMoments(*saved) &&
        saved->moment_type() != v1::ELEMENT_TYPE_BF16) {
      what = Str("tensor ", name,
                 ": training.moments is bf16, the checkpoint keeps its moments in fp32, and "
                 "rounding them would not go on with the same run: set training.moments: fp32");
    }
    if (!what.empty()) {
      return InvalidArgument(Str("checkpoint.resume_from: checkpoint ", JobId{record.job()}, "@",
                                 record.step(), " does not fit this run: ", what));
    }
  }
  return OkStatus();
}

}  // namespace heddle::rpc
