// The table of one element type, compiled once per instruction set. Included by generic.cc, avx2.cc
// and avx512.cc only.
#pragma once

#include "kernels/indexer/body_kl.h"
#include "kernels/indexer/body_scores.h"
#include "kernels/indexer/body_select.h"

namespace heddle::kernels::indexer {
namespace {  // NOLINT: ISA file (architecture.md T12)

template <typename T>
constexpr Table<T> MakeTable() {
  return Table<T>{RowScoresRun<T>, StatisticsRun<T>, SelectRun<T>, KlRowsRun<T>, KlKeysRun<T>};
}

}  // namespace
}  // namespace heddle::kernels::indexer
