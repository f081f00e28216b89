// Rotary embedding in config.json: `rope_theta` with `rope_scaling`, and the newer
// `rope_parameters` (formats.md F14). Internal to model/hf.
#pragma once

#include <nlohmann/json_fwd.hpp>

#include "base/status/status.h"

namespace heddle::v1 {
class ModelConfig;
}

namespace heddle::hf {

// Whether Transformers computes the scaling of this model.
bool KnowsRope(const heddle::v1::ModelConfig& config);

// The value of `rope_scaling`, null without a scaling. `latent`: a DeepSeek model, whose yarn
// correction is on the softmax scale instead of cosines and sines.
nlohmann::json RopeScalingJson(const heddle::v1::ModelConfig& config, bool latent);

// Sets rope.theta and rope.scaling. REQUIRES: max_position_embeddings is set; yarn raises it where
// it does not exceed the original length, because Transformers scales even so.
// INVALID_ARGUMENT names the key: an unknown type, or a form that heddle does not compute.
Status ReadRope(const nlohmann::json& object, bool latent, heddle::v1::ModelConfig* config);

}  // namespace heddle::hf
