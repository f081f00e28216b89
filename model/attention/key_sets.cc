#include "model/attention/key_sets.h"

#include <algorithm>
#include <utility>

#include "base/status/status.h"

namespace heddle::attention {
namespace {

// Calls body(first row of the document, row) for every row.
template <typename Body>
void ForRows(const layers::Documents& documents, const Body& body) {
  for (size_t b = 0; b + 1 < documents.cu_seqlens.size(); ++b) {
    const int32_t first_row = documents.cu_seqlens[b];
    for (int32_t row = first_row; row < documents.cu_seqlens[b + 1]; ++row) body(first_row, row);
  }
}

// No keys yet; every row may see up to itself.
KeySets EmptySets(const layers::Documents& documents, int32_t width) {
  KeySets sets;
  sets.width = width;
  sets.offsets.reserve(static_cast<size_t>(documents.rows()) + 1);
  sets.offsets.push_back(0);
  sets.end.reserve(static_cast<size_t>(documents.rows()));
  ForRows(documents, [&](int32_t /*first_row*/, int32_t row) { sets.end.push_back(row + 1); });
  return sets;
}

}  // namespace

kernels::sparse_attention::KeySets KeySets::view() const {
  return {set_heads, offsets.data(), first.data(), end.data(), width};
}

int64_t KeySets::pairs() const { return pairs(0, static_cast<int64_t>(end.size())); }

int64_t KeySets::pairs(int64_t begin_row, int64_t end_row) const {
  int64_t sum = 0;
  for (auto at = static_cast<size_t>(begin_row * set_heads);
       at < static_cast<size_t>(end_row * set_heads); ++at) {
    const int64_t limit = end[at / static_cast<size_t>(set_heads)];
    for (int64_t i = offsets[at]; i < offsets[at + 1]; ++i) {
      const int64_t key = first[static_cast<size_t>(i)];
      sum += std::max<int64_t>(0, std::min<int64_t>(key + width, limit) - key);
    }
  }
  return sum;
}

KeyDocuments RowsOf(std::span<const int32_t> query_rows, std::span<const int32_t> key_rows) {
  HEDDLE_CHECK(query_rows.size() == key_rows.size());
  KeyDocuments documents;
  for (size_t b = 0; b + 1 < query_rows.size(); ++b) {
    documents.rows.push_back({{query_rows[b], query_rows[b + 1] - query_rows[b]},
                              {key_rows[b], key_rows[b + 1] - key_rows[b]}});
  }
  return documents;
}

KeyDocuments SameRows(const layers::Documents& documents) {
  return RowsOf(documents.cu_seqlens, documents.cu_seqlens);
}

KeySets CausalSets(const layers::Documents& documents) {
  KeySets sets = EmptySets(documents, INT32_MAX);
  sets.first.reserve(sets.end.size());
  ForRows(documents, [&](int32_t first_row, int32_t /*row*/) {
    sets.first.push_back(first_row);
    sets.offsets.push_back(static_cast<int64_t>(sets.first.size()));
  });
  return sets;
}

// All spans of a batch have one width, and only the row's end cuts one short: with sinks the width
// is A, so that one span holds the sinks and spans from the window's start hold the window.
KeySets WindowSets(const layers::Documents& documents, model::Window window) {
  HEDDLE_CHECK(window.keys >= 1 && window.sinks >= 0, "window of ", window.keys, " keys and ",
               window.sinks, " sinks");
  const int64_t width = std::min<int64_t>(window.sinks > 0 ? window.sinks : window.keys, INT32_MAX);
  KeySets sets = EmptySets(documents, static_cast<int32_t>(width));
  ForRows(documents, [&](int32_t first_row, int32_t row) {
    const int64_t sinks = first_row + window.sinks;
    int64_t start = std::max<int64_t>(first_row, row - window.keys + 1);
    if (start <= sinks) {
      start = first_row;
    } else if (window.sinks > 0) {
      sets.first.push_back(first_row);
    }
    for (int64_t key = start; key <= row; key += width) {
      sets.first.push_back(static_cast<int32_t>(key));
    }
    sets.offsets.push_back(static_cast<int64_t>(sets.first.size()));
  });
  return sets;
}

KeySets TokenSets(const layers::Documents& documents, std::vector<int64_t> offsets,
                  std::vector<int32_t> selected) {
  const int64_t rows = documents.rows();
  KeySets sets = EmptySets(documents, 1);
  HEDDLE_CHECK(!offsets.empty() && offsets.back() == static_cast<int64_t>(selected.size()));
  const int64_t lists = static_cast<int64_t>(offsets.size()) - 1;
  if (rows > 0) {
    HEDDLE_CHECK(lists > 0 && lists % rows == 0, lists, " lists for ", rows, " rows");
    sets.set_heads = lists / rows;
  }
  for (size_t list = 0; list + 1 < offsets.size(); ++list) {
    for (int64_t i = offsets[list] + 1; i < offsets[list + 1]; ++i) {
      HEDDLE_CHECK(selected[static_cast<size_t>(i - 1)] < selected[static_cast<size_t>(i)],
                   "selected keys must ascend");
    }
  }
  sets.offsets = std::move(offsets);
  sets.first = std::move(selected);
  return sets;
}

}  // namespace heddle::attention
