// heddle-model recall: the quality of a model's indexers on a packed data set.
#include "model/recall.h"

#include <cstdio>
#include <nlohmann/json.hpp>

#include "data/pack/dataset.h"
#include "data/stream/sequence_stream.h"
#include "model/tool/model_source.h"
#include "model/tool/verbs.h"

namespace heddle::tool {
namespace {

// Whole sequences in stored order until there are enough tokens.
StatusOr<stream::PackedBatch> ReadTokens(const RecallOptions& options) {
  ASSIGN_OR_RETURN(std::shared_ptr<const pack::Dataset> dataset, pack::Dataset::Open(options.data));
  stream::StreamOptions order;
  order.max_seq_len = options.sequence_length;
  order.shuffle = false;
  ASSIGN_OR_RETURN(const std::unique_ptr<stream::SequenceStream> source,
                   stream::SequenceStream::Create(dataset, order));
  stream::PackedBatch batch;
  for (int64_t i = 0; static_cast<int64_t>(batch.tokens.size()) < options.tokens; ++i) {
    RETURN_IF_ERROR(source->Append(i, &batch));
  }
  return batch;
}

void Print(const RecallOptions& options, const std::vector<model::LayerRecall>& layers) {
  nlohmann::json reply;
  double recall = 0;
  double random = 0;
  double keys = 0;
  for (const model::LayerRecall& layer : layers) {
    recall += layer.recall / static_cast<double>(layers.size());
    random += layer.random / static_cast<double>(layers.size());
    keys += layer.keys / static_cast<double>(layers.size());
    reply["layers"].push_back({{"layer", layer.layer},
                               {"rows", layer.rows},
                               {"keys", layer.keys},
                               {"recall", layer.recall},
                               {"random", layer.random}});
  }
  reply["recall"] = recall;
  reply["random"] = random;
  reply["keys_mean"] = keys;
  if (options.json) {
    std::printf("%s\n", reply.dump().c_str());
    return;
  }
  std::printf("LAYER   ROWS    KEYS  RECALL  RANDOM  FACTOR\n");
  for (const model::LayerRecall& layer : layers) {
    std::printf("%5d %6lld %7.1f  %6.4f  %6.4f  %5.2fx\n", layer.layer,
                static_cast<long long>(layer.rows), layer.keys, layer.recall, layer.random,
                layer.recall / layer.random);
  }
  std::printf(" mean        %7.1f  %6.4f  %6.4f  %5.2fx\n", keys, recall, random, recall / random);
}

}  // namespace

Status RunRecall(const RecallOptions& options) {
  if (options.tokens < 1 || options.sequence_length < 2) {
    return InvalidArgument("--tokens must be >= 1 and --sequence-length >= 2");
  }
  ASSIGN_OR_RETURN(const ModelSource source, OpenSource(options.source, /*with_weights=*/true));
  ASSIGN_OR_RETURN(const stream::PackedBatch batch, ReadTokens(options));
  ASSIGN_OR_RETURN(const std::vector<model::LayerRecall> layers,
                   model::MeasureRecall(source.config, source.store.get(),
                                        {batch.tokens, {}, batch.cu_seqlens}, options.seed));
  Print(options, layers);
  return OkStatus();
}

}  // namespace heddle::tool
