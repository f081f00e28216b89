#include "model/attention/dsa_layer.h"

#include <utility>

#include "heddle/v1/config.pb.h"
#include "model/attention/dsa_indexer.h"

namespace heddle::attention {

std::unique_ptr<IndexedLayer> MakeDsa(const heddle::v1::ModelConfig& config,
                                      const layers::LayerStorage& storage, layers::RopeSet* ropes,
                                      SharedSelection* shared) {
  const int64_t rotary_dims = config.attention().dsa().d_indexer() / 2;
  IndexedLayer::Parts parts;
  parts.indexer = std::make_unique<DsaIndexer>(config, storage, ropes, rotary_dims, shared);
  return std::make_unique<IndexedLayer>(config, storage, ropes, std::move(parts));
}

}  // namespace heddle::attention
