#include "data/stream/packing.h"

#include <algorithm>
#include <set>
#include <utility>

namespace heddle::stream {

int64_t TokensOf(const Sequence& sequence) {
  int64_t tokens = 0;
  for (const Piece& piece : sequence) tokens += piece.length;
  return tokens;
}

int64_t ValidLabelsOf(const Sequence& sequence) {
  int64_t labels = 0;
  for (const Piece& piece : sequence) labels += piece.length - (piece.ends_document ? 1 : 0);
  return labels;
}

std::vector<Sequence> PackBestFit(const std::vector<DocumentLength>& documents,
                                  int64_t max_seq_len) {
  std::vector<Piece> pieces;
  for (const DocumentLength& document : documents) {
    for (int64_t begin = 0; begin < document.tokens; begin += max_seq_len) {
      const int64_t length = std::min(max_seq_len, document.tokens - begin);
      pieces.push_back({document.document, begin, length, begin + length == document.tokens});
    }
  }
  std::stable_sort(pieces.begin(), pieces.end(),
                   [](const Piece& a, const Piece& b) { return a.length > b.length; });
  std::vector<Sequence> sequences;
  std::set<std::pair<int64_t, size_t>> open;  // (room, sequence)
  for (const Piece& piece : pieces) {
    auto best = open.lower_bound({piece.length, 0});
    size_t target = sequences.size();
    int64_t room = max_seq_len;
    if (best != open.end()) {
      room = best->first;
      target = best->second;
      open.erase(best);
    } else {
      sequences.emplace_back();
    }
    sequences[target].push_back(piece);
    if (room > piece.length) open.insert({room - piece.length, target});
  }
  return sequences;
}

}  // namespace heddle::stream
