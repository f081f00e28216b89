#include "worker/offload/blocks.h"

#include <algorithm>

namespace heddle::offload {

std::string_view KindName(Kind kind) {
  constexpr std::array<std::string_view, kKinds> kNames = {"weights", "gradient", "state"};
  return kNames[static_cast<size_t>(kind)];
}

std::string ToText(const Block& block) {
  return Str(KindName(block.kind), " of slot ", block.slot);
}

StatusOr<BlockTable> BlockTable::Make(std::span<const SlotBytes> slots) {
  BlockTable table;
  table.bytes_.reserve(slots.size() * kKinds);
  for (const SlotBytes& slot : slots) {
    for (const int64_t bytes : slot) {
      if (bytes < 0) {
        return InvalidArgument(Str("expert offload: slot ", table.bytes_.size() / kKinds,
                                   " has a block of ", bytes, " bytes"));
      }
      table.bytes_.push_back(bytes);
    }
  }
  if (std::ranges::all_of(table.bytes_, [](int64_t bytes) { return bytes == 0; })) {
    return InvalidArgument("expert offload: there are no blocks: the model has no experts");
  }
  return table;
}

StatusOr<uint32_t> BlockTable::Find(Block block) const {
  const size_t number = size_t{block.slot} * kKinds + static_cast<size_t>(block.kind);
  if (number >= bytes_.size()) {
    return InvalidArgument(
        Str("expert offload: ", block, ": there are ", bytes_.size() / kKinds, " slots"));
  }
  if (bytes_[number] == 0) {
    return InvalidArgument(Str("expert offload: ", block, " has no bytes"));
  }
  return static_cast<uint32_t>(number);
}

}  // namespace heddle::offload
