#include "model/hf/rope_json.h"

#include <algorithm>
#include <cmath>

#include "heddle/v1/config.pb.h"
#include "model/hf/json_values.h"

namespace heddle::hf {
namespace {

using heddle::v1::ModelConfig;
using heddle::v1::RopeScalingConfig;
using nlohmann::json;

double LogTenth(double factor) { return 0.1 * std::log(factor); }

// Transformers' factor of a context extension: 0.1 mscale ln(factor) + 1.
double Mscale(double factor, double mscale) {
  return factor <= 1.0 ? 1.0 : LogTenth(factor) * mscale + 1.0;
}

// The one object that holds the rotary keys, old or new.
json RopeObject(const json& object) {
  json rope = json::object();
  for (const char* key : {"rope_scaling", "rope_parameters"}) {
    if (object.contains(key) && object[key].is_object()) rope = object[key];
  }
  return rope;
}

StatusOr<RopeScalingConfig::Type> TypeOf(const std::string& type) {
  if (type == "default") return RopeScalingConfig::TYPE_NONE;
  if (type == "linear") return RopeScalingConfig::TYPE_LINEAR;
  if (type == "llama3") return RopeScalingConfig::TYPE_LLAMA3;
  if (type == "yarn") return RopeScalingConfig::TYPE_YARN;
  return InvalidArgument(Str("rope_scaling.rope_type: '", type, "' is not known"));
}

// yarn's correction as our mscale: the softmax scale gets (0.1 mscale ln(factor) + 1)^2. A factor A
// on cosines and sines of whole heads is a factor A^2 there.
StatusOr<double> YarnMscale(const json& rope, double factor, bool latent) {
  ASSIGN_OR_RETURN(const double mscale, Get<double>(rope, "mscale", 0.0));
  ASSIGN_OR_RETURN(const double all, Get<double>(rope, "mscale_all_dim", 0.0));
  const double otherwise = mscale != 0.0 && all != 0.0
                               ? Mscale(factor, mscale) / Mscale(factor, all)
                               : Mscale(factor, 1.0);
  ASSIGN_OR_RETURN(const double on_tables, Get<double>(rope, "attention_factor", otherwise));
  if (latent) {
    // Only part of a head is rotated: a factor on its tables is no factor of the scores.
    if (std::abs(on_tables - 1.0) > 1e-9) {
      return InvalidArgument(
          "rope_scaling.mscale: differs from mscale_all_dim, which heddle does not compute");
    }
    return factor <= 1.0 ? 1.0 : all;
  }
  if (factor <= 1.0) return 1.0;
  const double ours = (on_tables - 1.0) / LogTenth(factor);
  if (!(ours >= 0.0)) {
    return InvalidArgument("rope_scaling.attention_factor: below 1, which heddle does not compute");
  }
  return ours;
}

Status ReadScaling(const json& rope, bool latent, ModelConfig* config) {
  RopeScalingConfig* s = config->mutable_rope()->mutable_scaling();
  ASSIGN_OR_RETURN(const double factor, Get<double>(rope, "factor", 1.0));
  ASSIGN_OR_RETURN(const double low, Get<double>(rope, "low_freq_factor", 1.0));
  ASSIGN_OR_RETURN(const double high, Get<double>(rope, "high_freq_factor", 4.0));
  ASSIGN_OR_RETURN(const double fast, Get<double>(rope, "beta_fast", 32.0));
  ASSIGN_OR_RETURN(const double slow, Get<double>(rope, "beta_slow", 1.0));
  ASSIGN_OR_RETURN(const bool truncate, Get<bool>(rope, "truncate", true));
  const int32_t positions = config->max_position_embeddings();
  ASSIGN_OR_RETURN(const int32_t original,
                   Get<int32_t>(rope, "original_max_position_embeddings", positions));
  if (!(factor >= 1.0)) return InvalidArgument("rope_scaling.factor: must be >= 1");
  if (original < 1) {
    return InvalidArgument("rope_scaling.original_max_position_embeddings: must be >= 1");
  }
  s->set_factor(factor);
  s->set_low_freq_factor(low);
  s->set_high_freq_factor(high);
  s->set_beta_fast(fast);
  s->set_beta_slow(slow);
  s->set_original_max_position_embeddings(original);
  if (s->type() != RopeScalingConfig::TYPE_YARN) return OkStatus();
  if (!truncate) {
    return InvalidArgument("rope_scaling.truncate: false, which heddle does not compute");
  }
  ASSIGN_OR_RETURN(const double mscale, YarnMscale(rope, factor, latent));
  s->set_mscale(mscale);
  if (positions <= original && factor > 1.0) {
    const double longer = std::min(std::ceil(original * factor), 16777216.0);
    config->set_max_position_embeddings(static_cast<int32_t>(longer));
  }
  return OkStatus();
}

}  // namespace

bool KnowsRope(const ModelConfig& config) {
  const RopeScalingConfig& s = config.rope().scaling();
  if (s.type() == RopeScalingConfig::TYPE_NTK) return false;
  return s.type() != RopeScalingConfig::TYPE_YARN ||
         config.max_position_embeddings() > s.original_max_position_embeddings();
}

json RopeScalingJson(const ModelConfig& config, bool latent) {
  const RopeScalingConfig& s = config.rope().scaling();
  switch (s.type()) {
    case RopeScalingConfig::TYPE_LINEAR:
      return {{"rope_type", "linear"}, {"factor", s.factor()}};
    case RopeScalingConfig::TYPE_LLAMA3:
      return {{"rope_type", "llama3"},
              {"factor", s.factor()},
              {"low_freq_factor", s.low_freq_factor()},
              {"high_freq_factor", s.high_freq_factor()},
              {"original_max_position_embeddings", s.original_max_position_embeddings()}};
    case RopeScalingConfig::TYPE_YARN: {
      json yarn = {{"rope_type", "yarn"},
                   {"factor", s.factor()},
                   {"beta_fast", s.beta_fast()},
                   {"beta_slow", s.beta_slow()},
                   {"original_max_position_embeddings", s.original_max_position_embeddings()}};
      if (latent && s.mscale() != 0.0) {
        yarn["mscale"] = s.mscale();
        yarn["mscale_all_dim"] = s.mscale();
      } else if (latent || s.mscale() != 1.0) {
        yarn["attention_factor"] = latent ? 1.0 : Mscale(s.factor(), s.mscale());
      }
      return yarn;
    }
    default:
      return nullptr;
  }
}

Status ReadRope(const json& object, bool latent, ModelConfig* config) {
  const json rope = RopeObject(object);
  ASSIGN_OR_RETURN(const double old_theta,
                   Get<double>(object, "rope_theta", config->rope().theta()));
  ASSIGN_OR_RETURN(const double theta, Get<double>(rope, "rope_theta", old_theta));
  config->mutable_rope()->set_theta(theta);
  for (const json* where : {&object, &rope}) {
    ASSIGN_OR_RETURN(const double partial, Get<double>(*where, "partial_rotary_factor", 1.0));
    if (partial != 1.0) return InvalidArgument("partial_rotary_factor: not supported");
  }
  ASSIGN_OR_RETURN(const std::string old_type, Get<std::string>(rope, "type", "default"));
  ASSIGN_OR_RETURN(const std::string word, Get<std::string>(rope, "rope_type", old_type));
  ASSIGN_OR_RETURN(const RopeScalingConfig::Type type, TypeOf(word));
  if (type == RopeScalingConfig::TYPE_NONE) return OkStatus();
  config->mutable_rope()->mutable_scaling()->set_type(type);
  return ReadScaling(rope, latent, config);
}

}  // namespace heddle::hf
