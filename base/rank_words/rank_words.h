// Numbers of a rank's page as people read them (training-runtime.md 17). Every number has a text:
// pages come from other processes, perhaps of another version.
#pragma once

#include <cstdint>
#include <string>

namespace heddle {

// What time in a phase counts as when ranks are compared (17.4).
enum class PhasePart { kNone, kCompute, kData, kDisk };

// "backward"; "phase 77" for a number that this version does not know.
std::string PhaseText(uint32_t phase);
PhasePart PartOfPhase(uint32_t phase);
// One past the highest number of a phase that this version knows.
uint32_t PhaseCount();

// "all-gather"; "operation 77".
std::string OperationText(uint32_t operation);
// Of a model with `layers` blocks: "embedding", "block.3", "head", "block.3.experts"; "" outside of
// these. Experts of layer l are unit layers + 2 + l.
std::string UnitText(int64_t unit, int64_t layers);
// "#1812 all-gather block.7". Sums over all parameters at once have no unit.
std::string CollectiveText(uint64_t seq, uint32_t operation, int64_t unit, int64_t layers);

}  // namespace heddle
