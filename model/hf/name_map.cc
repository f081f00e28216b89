#include "model/hf/name_map.h"

#include <utility>
#include <vector>

namespace heddle::hf {
namespace {

using Pairs = std::vector<std::pair<std::string, std::string>>;  // (file's, ours)

// Parts of names that differ; each stands at most once in a name.
const Pairs& MixtralParts() {
  static const Pairs parts = {{".block_sparse_moe.gate.", ".mlp.gate."},
                              {".block_sparse_moe.experts.", ".mlp.experts."},
                              {".w1.weight", ".gate_proj.weight"},
                              {".w3.weight", ".up_proj.weight"},
                              {".w2.weight", ".down_proj.weight"}};
  return parts;
}

const Pairs& IndexerParts() {
  static const Pairs parts = {{".self_attn.indexer.wq_b.", ".self_attn.indexer.q_proj."},
                              {".self_attn.indexer.wk.", ".self_attn.indexer.k_proj."}};
  return parts;
}

void Replace(const std::string& from, const std::string& to, std::string* name) {
  const size_t at = name->find(from);
  if (at != std::string::npos) name->replace(at, from.size(), to);
}

}  // namespace

std::string OurName(const std::string& file_name, Architecture architecture) {
  std::string name = file_name;
  if (architecture == Architecture::kMixtral &&
      name.find(".block_sparse_moe.") != std::string::npos) {
    for (const auto& [theirs, ours] : MixtralParts()) Replace(theirs, ours, &name);
  }
  if (architecture == Architecture::kDeepseekV32) {
    for (const auto& [theirs, ours] : IndexerParts()) Replace(theirs, ours, &name);
  }
  return name;
}

std::string FileName(const std::string& our_name, Architecture architecture) {
  std::string name = our_name;
  if (architecture == Architecture::kMixtral && name.find(".mlp.") != std::string::npos) {
    for (const auto& [theirs, ours] : MixtralParts()) Replace(ours, theirs, &name);
  }
  if (architecture == Architecture::kDeepseekV32) {
    for (const auto& [theirs, ours] : IndexerParts()) Replace(ours, theirs, &name);
  }
  return name;
}

bool CarriesNothing(const std::string& file_name) {
  const std::string tail = ".rotary_emb.inv_freq";
  return file_name.size() > tail.size() &&
         file_name.compare(file_name.size() - tail.size(), tail.size(), tail) == 0;
}

}  // namespace heddle::hf
