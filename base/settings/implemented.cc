// The one table of options that are part of the schema but not of this version. Whoever implements
// one deletes its row; nothing else refuses options for that reason.
#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <algorithm>

#include "base/settings/bind.h"
#include "base/settings/checks.h"
#include "base/settings/schema.h"

namespace heddle::settings {
namespace {

struct Row {
  const char* key;
  // Words that work; for a list, of its elements. Empty: the key must stay unset.
  std::vector<std::string> works;
  const char* what;
};

const std::vector<Row>& Table() {
  static const std::vector<Row> rows = {
      {"model.attention.logit_scale", {}, "the query temperature"},
      {"model.dropout", {"0"}, "dropout"},
      {"training.precision", {"bf16", "fp32"}, "fp8 arithmetic"},
      {"memory.expert_offloading.policy",
       {"auto", "compute"},
       "streaming experts to a device, since models are computed on the CPU"},
      {"checkpoint.async", {"true"}, "saving in the foreground"},
      {"schedule.constraints", {}, "placement constraints"},
      {"logging.tensorboard", {"false"}, "TensorBoard files"},
      {"logging.wandb", {}, "W&B logging"},
      {"logging.profiling.enabled", {"false"}, "profiling"},
  };
  return rows;
}

constexpr const char* kGpusKey = "parallel.gpus_per_rank";
constexpr const char* kGpusLimit =
    "this version computes the model on the CPU only; parallel.backend=nccl sums gradients over "
    "the GPUs' links, a job of kind command may use them freely";

std::string Sentence(const Row& row) {
  std::string words;
  for (const std::string& word : row.works) {
    words += (words.empty() ? "" : ", ") + word;
  }
  return Str("this version does not implement ", row.what,
             words.empty() ? "; leave it out" : " (works: ", words, words.empty() ? "" : ")");
}

bool Works(const Row& row, const std::string& text) {
  return std::find(row.works.begin(), row.works.end(), text) != row.works.end();
}

// The first word of the field that does not work; empty if all do.
std::string BadWord(const Row& row, const KeyRef& key, const google::protobuf::Message& config) {
  const google::protobuf::Message* parent = FindParent(key, config);
  if (parent == nullptr) {
    return "";
  }
  const google::protobuf::FieldDescriptor& field = *key.leaf();
  const google::protobuf::Reflection& reflection = *parent->GetReflection();
  if (field.is_repeated()) {
    for (int i = 0; i < reflection.FieldSize(*parent, &field); ++i) {
      std::string text = ScalarText(*parent, field, i);
      if (!Works(row, text)) {
        return text;
      }
    }
    return "";
  }
  if (row.works.empty()) {
    return reflection.HasField(*parent, &field) ? "set" : "";
  }
  const std::string text = ScalarText(*parent, field, -1);
  return Works(row, text) ? "" : text;
}

}  // namespace

namespace {

// The place of each row of Table() in the message, in its order.
std::vector<KeyRef> KeysOfTable() {
  const Schema schema(*v1::RunConfig::descriptor());
  std::vector<KeyRef> keys;
  for (const Row& row : Table()) {
    const StatusOr<KeyRef> key = schema.Find(row.key);
    HEDDLE_CHECK(key.ok() && key->canonical == row.key, row.key);
    keys.push_back(*key);
  }
  return keys;
}

}  // namespace

void CheckTable(const v1::RunConfig& config, Problems& problems) {
  // Derived from constants and dear: a coordinator checks thousands of submits a second.
  static const std::vector<KeyRef> keys = KeysOfTable();
  auto key = keys.begin();
  for (auto at = Table().begin(); at != Table().end(); ++at, ++key) {
    const Row& row = *at;
    const bool is_group = row.works.empty();
    const std::string bad = BadWord(row, *key, config);
    if (!bad.empty()) {
      problems.Add("", row.key, is_group ? Sentence(row) : Str(bad, ": ", Sentence(row)));
    }
  }
  // Reserved GPUs that nothing uses would pass for training on them.
  const v1::ParallelConfig& parallel = config.parallel();
  if (config.kind() != v1::RunConfig::KIND_COMMAND && parallel.gpus_per_rank() > 0 &&
      parallel.backend() != v1::ParallelConfig::BACKEND_NCCL) {
    problems.Add("", kGpusKey, Str(parallel.gpus_per_rank(), ": ", kGpusLimit));
  }
  const v1::Ranks& ranks = parallel.ranks();
  if (ranks.min() != ranks.max()) {
    problems.Add("", "parallel.ranks",
                 Str(ranks.min(), " to ", ranks.max(),
                     ": this version does not implement elastic jobs; give one number"));
  }
}

std::string LimitationOf(const std::string& canonical) {
  for (const Row& row : Table()) {
    const std::string key = row.key;
    const bool inside = canonical.compare(0, key.size() + 1, key + ".") == 0;
    if (key == canonical || inside) {
      return Sentence(row);
    }
  }
  if (canonical == kGpusKey) {
    return kGpusLimit;
  }
  return canonical == "parallel.ranks"
             ? "this version does not implement elastic jobs; give one number"
             : "";
}

}  // namespace heddle::settings
