#include "data/tokenizer/bpe_model.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <queue>

namespace heddle::tokenizer {
namespace {

// Up to this length scanning all ranks for each merge beats a heap.
constexpr size_t kShortWordBytes = 48;

// One adjacent pair of a long word that may be merged.
struct Candidate {
  uint32_t rank;
  uint32_t left;  // index of the left symbol
  uint32_t left_id;
  uint32_t right_id;
  uint32_t merged_id;
  bool operator<(const Candidate& other) const {  // for a max-heap: the best is the smallest rank
    return rank != other.rank ? rank > other.rank : left > other.left;
  }
};

}  // namespace

void PairTable::Reserve(size_t pairs) {
  const size_t size = std::bit_ceil(std::max<size_t>(2 * pairs, 16));
  slots_.assign(size, Entry{});
  mask_ = size - 1;
  shift_ = 64 - std::countr_zero(size);
}

void PairTable::Insert(uint32_t left, uint32_t right, Merge merge) {
  const uint64_t key = Key(left, right);
  size_t i = Slot(key);
  while (slots_[i].key != kEmpty) {
    if (slots_[i].key == key) return;
    i = (i + 1) & mask_;
  }
  slots_[i] = Entry{key, merge};
}

void BpeModel::Encode(std::string_view word, std::vector<uint32_t>* ids) const {
  if (word.size() == 1) {
    ids->push_back(byte_id[static_cast<unsigned char>(word[0])]);
    return;
  }
  if (ignore_merges) {
    const auto whole = id_of.find(std::string(word));
    if (whole != id_of.end()) {
      ids->push_back(whole->second);
      return;
    }
  }
  if (word.size() <= kShortWordBytes) {
    EncodeShort(word, ids);
  } else {
    EncodeLong(word, ids);
  }
}

void BpeModel::EncodeShort(std::string_view word, std::vector<uint32_t>* ids) const {
  uint32_t symbols[kShortWordBytes];
  PairTable::Merge pairs[kShortWordBytes];  // pairs[i] merges symbols i and i + 1
  size_t count = word.size();
  for (size_t i = 0; i < count; ++i) symbols[i] = byte_id[static_cast<unsigned char>(word[i])];
  for (size_t i = 0; i + 1 < count; ++i) pairs[i] = merges.Find(symbols[i], symbols[i + 1]);
  while (count > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < count; ++i) {
      if (pairs[i].rank < pairs[best].rank) best = i;
    }
    if (pairs[best].rank == PairTable::kNoRank) break;
    symbols[best] = pairs[best].id;
    std::memmove(symbols + best + 1, symbols + best + 2, (count - best - 2) * sizeof(symbols[0]));
    if (best + 2 < count) {
      std::memmove(pairs + best + 1, pairs + best + 2, (count - best - 3) * sizeof(pairs[0]));
    }
    --count;
    if (best > 0) pairs[best - 1] = merges.Find(symbols[best - 1], symbols[best]);
    if (best + 1 < count) pairs[best] = merges.Find(symbols[best], symbols[best + 1]);
  }
  ids->insert(ids->end(), symbols, symbols + count);
}

void BpeModel::EncodeLong(std::string_view word, std::vector<uint32_t>* ids) const {
  constexpr uint32_t kGone = ~uint32_t{0};
  const auto size = static_cast<uint32_t>(word.size());
  std::vector<uint32_t> symbols(size);
  std::vector<uint32_t> next(size);
  std::vector<uint32_t> previous(size);
  for (uint32_t i = 0; i < size; ++i) {
    symbols[i] = byte_id[static_cast<unsigned char>(word[i])];
    next[i] = i + 1;
    previous[i] = i - 1;  // wraps to kGone at 0
  }
  std::priority_queue<Candidate> queue;
  const auto consider = [&](uint32_t left) {
    if (left == kGone || next[left] >= size) return;
    const uint32_t left_id = symbols[left];
    const uint32_t right_id = symbols[next[left]];
    const PairTable::Merge merge = merges.Find(left_id, right_id);
    if (merge.rank != PairTable::kNoRank) {
      queue.push({merge.rank, left, left_id, right_id, merge.id});
    }
  };
  for (uint32_t i = 0; i + 1 < size; ++i) consider(i);
  while (!queue.empty()) {
    const Candidate top = queue.top();
    queue.pop();
    // Stale if either side has changed since.
    if (symbols[top.left] != top.left_id || next[top.left] >= size) continue;
    const uint32_t right = next[top.left];
    if (symbols[right] != top.right_id) continue;
    symbols[top.left] = top.merged_id;
    symbols[right] = kGone;
    next[top.left] = next[right];
    if (next[right] < size) previous[next[right]] = top.left;
    consider(previous[top.left]);
    consider(top.left);
  }
  for (uint32_t i = 0; i < size; i = next[i]) ids->push_back(symbols[i]);
}

}  // namespace heddle::tokenizer
