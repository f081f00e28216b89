#include "model/attention/gsa_layer.h"

#include <utility>

#include "heddle/v1/config.pb.h"
#include "model/attention/gsa_indexer.h"

namespace heddle::attention {
namespace {

GateActivation ActivationOf(const heddle::v1::GsaConfig& gsa) {
  switch (gsa.gate_activation()) {
    case heddle::v1::GsaConfig::GATE_ACTIVATION_TANH:
      return GateActivation::kTanh;
    case heddle::v1::GsaConfig::GATE_ACTIVATION_SILU:
      return GateActivation::kSilu;
    default:
      return GateActivation::kSigmoid;
  }
}

}  // namespace

std::unique_ptr<IndexedLayer> MakeGsa(const heddle::v1::ModelConfig& config,
                                      const layers::LayerStorage& storage, layers::RopeSet* ropes) {
  const heddle::v1::GsaConfig& gsa = config.attention().gsa();
  IndexedLayer::Parts parts;
  parts.indexer = std::make_unique<GsaIndexer>(config, storage);
  if (gsa.use_value_gate()) {
    parts.value_gate.emplace(storage, "self_attn.value_gate", ActivationOf(gsa));
  }
  if (gsa.use_output_gate()) {
    parts.output_gate.emplace(storage, "self_attn.output_gate", ActivationOf(gsa));
  }
  parts.dense_share = gsa.dense_residual_alpha();
  return std::make_unique<IndexedLayer>(config, storage, ropes, std::move(parts));
}

}  // namespace heddle::attention
