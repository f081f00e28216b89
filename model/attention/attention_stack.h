// The attention layers of one model, made by kind, with what layers of a kind share: rotary tables
// and the cores of dense and window layers.
#pragma once

#include <memory>
#include <vector>

#include "model/attention/attention.h"
#include "model/attention/token_indexer.h"
#include "model/layers/rope.h"
#include "model/layers/sublayer.h"

namespace heddle::v1 {
class ModelConfig;
}

namespace heddle::attention {

// What dense and window layers run: the fastest core for their type, or MakeReferenceCore.
enum class Cores { kFast, kReference };

class AttentionStack {
 public:
  // One layer per storage. REQUIRES: PlanModel(config) is OK and made the storages' plan; `config`
  // outlives the stack.
  AttentionStack(const heddle::v1::ModelConfig& config,
                 const std::vector<layers::LayerStorage>& storages, Cores cores = Cores::kFast);
  ~AttentionStack();

  // Once per micro-batch, before its first Forward. `documents` outlives the micro-batch.
  void Begin(const layers::Documents& documents);
  layers::Sublayer* layer(int index) { return layers_[static_cast<size_t>(index)].get(); }
  layers::RopeSet* ropes() { return &ropes_; }

 private:
  std::unique_ptr<layers::Sublayer> Make(const layers::LayerStorage& storage);

  const heddle::v1::ModelConfig& config_;
  const Cores cores_;
  layers::RopeSet ropes_;
  std::unique_ptr<AttentionCore> dense_;  // null: no layer needs it
  std::unique_ptr<AttentionCore> window_;
  SharedSelection shared_;  // of DSA layers with index_share_every
  std::vector<std::unique_ptr<layers::Sublayer>> layers_;
};

}  // namespace heddle::attention
