#include "base/rank_words/rank_words.h"

#include <algorithm>

#include "base/status/status.h"

namespace heddle {
namespace {

struct PhaseWord {
  uint32_t number;
  const char* text;
  PhasePart part;
};
constexpr PhaseWord kPhases[] = {
#define HEDDLE_PHASE(number, name, text, part) {number, text, PhasePart::part},
#include "base/rank_words/words.def"
};

struct OperationWord {
  uint32_t number;
  const char* text;
  bool has_unit;
};
constexpr OperationWord kOperations[] = {
#define HEDDLE_COLLECTIVE(number, name, text, has_unit) {number, text, has_unit},
#include "base/rank_words/words.def"
};

const PhaseWord* FindPhase(uint32_t phase) {
  for (const PhaseWord& word : kPhases) {
    if (word.number == phase) return &word;
  }
  return nullptr;
}

const OperationWord* FindOperation(uint32_t operation) {
  for (const OperationWord& word : kOperations) {
    if (word.number == operation) return &word;
  }
  return nullptr;
}

}  // namespace

std::string PhaseText(uint32_t phase) {
  const PhaseWord* word = FindPhase(phase);
  return word == nullptr ? Str("phase ", phase) : word->text;
}

PhasePart PartOfPhase(uint32_t phase) {
  const PhaseWord* word = FindPhase(phase);
  return word == nullptr ? PhasePart::kNone : word->part;
}

uint32_t PhaseCount() {
  uint32_t count = 0;
  for (const PhaseWord& word : kPhases) count = std::max(count, word.number + 1);
  return count;
}

std::string OperationText(uint32_t operation) {
  const OperationWord* word = FindOperation(operation);
  return word == nullptr ? Str("operation ", operation) : word->text;
}

std::string UnitText(int64_t unit, int64_t layers) {
  if (unit < 0 || unit > 2 * layers + 1) return "";
  if (unit == 0) return "embedding";
  if (unit <= layers) return Str("block.", unit - 1);
  return unit == layers + 1 ? "head" : Str("block.", unit - layers - 2, ".experts");
}

std::string CollectiveText(uint64_t seq, uint32_t operation, int64_t unit, int64_t layers) {
  const OperationWord* word = FindOperation(operation);
  const std::string name =
      word != nullptr && word->has_unit ? UnitText(unit, layers) : std::string();
  return Str("#", seq, " ", OperationText(operation), name.empty() ? "" : " ", name);
}

}  // namespace heddle
