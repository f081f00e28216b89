// What a checkpoint of a run holds of its model (training-runtime.md 14.1): the trainer writes it,
// the coordinator compares with it before a run goes on from a checkpoint. Torch-free; of target
// model_plan.
#pragma once

#include <vector>

#include "heddle/v1/checkpoints.pb.h"
#include "model/model_plan.h"

namespace heddle::model {

struct SavedMoments {
  bool second = true;  // AdamW has two, Lion one
  heddle::v1::ElementType type = heddle::v1::ELEMENT_TYPE_F32;
};
// Every tensor and buffer of the plan, in its order, with the classes that are saved of it in
// ascending order. Without ids: checkpoint::NumberTensors gives them.
std::vector<heddle::v1::TensorInfo> SavedTensors(const ModelPlan& plan,
                                                 const SavedMoments& moments);

}  // namespace heddle::model
