// The key sets of a micro-batch as the sparse attention kernel takes them, owned. Built once per
// forward by a selection and kept for the backward and for recomputation: never selected again
// (attention-and-moe.md section 1).
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "kernels/sparse_attention/params.h"
#include "model/attention/document_groups.h"
#include "model/layers/sublayer.h"

namespace heddle::attention {

struct KeySets {
  int64_t set_heads = 1;
  int32_t width = 1;
  std::vector<int64_t> offsets;  // [N set_heads + 1]
  std::vector<int32_t> first;
  std::vector<int32_t> end;  // [N]
  // Keys of a row that sees many more, by the settings: of every visible key where nothing is
  // selected. Decides how attention is computed, so never by what was selected.
  int64_t usual = INT64_MAX;

  kernels::sparse_attention::KeySets view() const;
  // Pairs (row, key) over all set heads: what the cost formulas count (X4).
  int64_t pairs() const;
  // Of rows [begin, end) alone.
  int64_t pairs(int64_t begin, int64_t end) const;
};

// Where queries and keys of documents lie: queries see keys of their own document only.
struct KeyDocuments {
  struct Rows {
    Document queries;
    Document keys;
  };
  std::vector<Rows> rows;  // ascending
};
KeyDocuments SameRows(const layers::Documents& documents);
// Document b has queries [query_rows[b], query_rows[b+1]) and keys [key_rows[b], key_rows[b+1]).
KeyDocuments RowsOf(std::span<const int32_t> query_rows, std::span<const int32_t> key_rows);

// Every key from the document's start to the row itself.
KeySets CausalSets(const layers::Documents& documents);
// Window of W keys, the query's own included, and the first A keys (section 4).
KeySets WindowSets(const layers::Documents& documents, model::Window window);
// Token sets from a selection of absolute rows, ascending per row.
KeySets TokenSets(const layers::Documents& documents, std::vector<int64_t> offsets,
                  std::vector<int32_t> selected);

}  // namespace heddle::attention
