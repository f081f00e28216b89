// Packing of one window of documents into sequences, from lengths alone.
#pragma once

#include <cstdint>
#include <vector>

namespace heddle::stream {

// A run of tokens of one document.
struct Piece {
  int64_t document = 0;
  int64_t begin = 0;
  int64_t length = 0;
  bool ends_document = false;
};

using Sequence = std::vector<Piece>;

// Tokens and labels of a sequence; the last token of a document has no label.
int64_t TokensOf(const Sequence& sequence);
int64_t ValidLabelsOf(const Sequence& sequence);

struct DocumentLength {
  int64_t document = 0;
  int64_t tokens = 0;
};

// Best fit decreasing: documents longer than `max_seq_len` are cut into pieces of that length and a
// rest; pieces, longest first, go where the least room remains, ties to the earlier. Every token is
// in exactly one sequence. The number of sequences depends on the lengths only, not on their order.
std::vector<Sequence> PackBestFit(const std::vector<DocumentLength>& documents,
                                  int64_t max_seq_len);

}  // namespace heddle::stream
