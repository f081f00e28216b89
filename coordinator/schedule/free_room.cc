#include "coordinator/schedule/free_room.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "coordinator/schedule/constraint.h"

namespace heddle::schedule {

namespace {

constexpr uint32_t kManySlots = 1u << 20;
constexpr uint32_t kNoNode = std::numeric_limits<uint32_t>::max();

// The tightest node that holds all ranks, and how many ranks all nodes hold together.
struct Tightest {
  uint32_t node = kNoNode;
  uint64_t slots = 0;
};
Tightest FindTightest(const std::vector<uint32_t>& slots, uint32_t ranks, uint32_t without) {
  Tightest found;
  uint32_t least = std::numeric_limits<uint32_t>::max();
  for (uint32_t node = 0; node < slots.size(); ++node) {
    const uint32_t one = node == without ? 0 : slots[node];
    found.slots += one;
    if (one >= ranks && one < least) {
      least = one;
      found.node = node;
    }
  }
  return found;
}

}  // namespace

uint32_t Slots(const Shape& shape, double cpus, uint64_t memory, size_t gpus) {
  uint64_t slots = kManySlots;
  if (shape.cpus > 0) {
    slots = std::min<uint64_t>(slots, static_cast<uint64_t>(cpus / shape.cpus + 1e-9));
  }
  if (shape.memory > 0) {
    slots = std::min<uint64_t>(slots, memory / shape.memory);
  }
  if (shape.gpus > 0) {
    slots = std::min<uint64_t>(slots, gpus / shape.gpus);
  }
  return static_cast<uint32_t>(slots);
}

std::vector<ChosenNode> Choose(const std::vector<uint32_t>& slots, uint32_t ranks,
                               std::optional<uint32_t> without) {
  const Tightest tightest = FindTightest(slots, ranks, without.value_or(kNoNode));
  if (tightest.node != kNoNode) {
    return {{tightest.node, ranks}};
  }
  if (tightest.slots < ranks) {
    return {};
  }
  // No node holds all: the roomiest ones, which few gangs have many of, from a heap.
  std::vector<std::pair<uint32_t, uint32_t>> heap;  // slots, and ~node so that the first wins
  for (uint32_t node = 0; node < slots.size(); ++node) {
    if (slots[node] > 0 && node != without.value_or(kNoNode)) {
      heap.emplace_back(slots[node], ~node);
    }
  }
  std::make_heap(heap.begin(), heap.end());
  std::vector<ChosenNode> chosen;
  while (heap.front().first < ranks) {
    chosen.push_back({~heap.front().second, heap.front().first});
    ranks -= heap.front().first;
    std::pop_heap(heap.begin(), heap.end());
    heap.pop_back();
    if (ranks == 0) {
      return chosen;
    }
  }
  std::pair<uint32_t, uint32_t> last = heap.front();
  for (const std::pair<uint32_t, uint32_t>& one : heap) {
    const bool tighter = one.first < last.first;
    if (one.first >= ranks && (tighter || (one.first == last.first && one.second > last.second))) {
      last = one;
    }
  }
  chosen.push_back({~last.second, ranks});
  return chosen;
}

FreeRoom::FreeRoom(std::vector<NodeView>* nodes) : nodes_(*nodes), reserved_(nodes->size()) {
  for (const NodeView& node : nodes_) {
    cpus_free_.push_back(node.cpus_free);
    memory_free_.push_back(node.memory_free);
    gpus_free_.push_back(static_cast<uint32_t>(node.gpus_free.size()));
    takes_work_.push_back(node.schedulable ? 1 : 0);
    AddKind(node);
  }
}

void FreeRoom::AddKind(const NodeView& node) {
  // From the back: a cluster has few kinds, and where it has many none is looked for long.
  constexpr size_t kLookedAt = 64;
  const size_t end = kinds_.size() > kLookedAt ? kinds_.size() - kLookedAt : 0;
  for (size_t kind = kinds_.size(); kind > end; --kind) {
    const Kind& known = kinds_[kind - 1];
    if (known.cpus == node.cpus && known.memory == node.memory && known.gpus == node.gpus.size()) {
      kind_.push_back(static_cast<uint32_t>(kind - 1));
      return;
    }
  }
  kind_.push_back(static_cast<uint32_t>(kinds_.size()));
  kinds_.push_back({node.cpus, node.memory, node.gpus.size()});
}

const std::vector<uint8_t>& FreeRoom::Matching(const std::string& constraint) {
  const auto [place, fresh] = matching_.try_emplace(constraint);
  if (fresh) {
    const Constraint parsed(constraint);
    place->second.reserve(nodes_.size());
    for (const NodeView& node : nodes_) {
      place->second.push_back(parsed.Matches(node.labels) ? 1 : 0);
    }
  }
  return place->second;
}

std::vector<uint32_t> FreeRoom::SlotsOfKinds(const Shape& shape) const {
  std::vector<uint32_t> slots;
  for (const Kind& kind : kinds_) {
    slots.push_back(Slots(shape, kind.cpus, kind.memory, kind.gpus));
  }
  return slots;
}

uint32_t FreeRoom::SlotsNow(const Shape& shape, uint32_t node) const {
  // Most nodes of a busy cluster have no room: the divisions of Slots() are for the others. The
  // margin is above what Slots() forgives.
  if (cpus_free_[node] < shape.cpus - 1e-5 || memory_free_[node] < shape.memory ||
      gpus_free_[node] < shape.gpus) {
    return 0;
  }
  return Slots(shape, cpus_free_[node], memory_free_[node], gpus_free_[node]);
}

ShapeRoom FreeRoom::Look(const Shape& shape) {
  ShapeRoom room;
  room.matches.assign(nodes_.size(), 1);
  for (const std::string& constraint : shape.constraints) {
    const std::vector<uint8_t>& matching = Matching(constraint);
    for (size_t node = 0; node < nodes_.size(); ++node) {
      room.matches[node] &= matching[node];
    }
  }
  const std::vector<uint32_t> empty = SlotsOfKinds(shape);
  room.slots.resize(nodes_.size());
  for (uint32_t node = 0; node < nodes_.size(); ++node) {
    if (room.matches[node] == 0) {
      continue;
    }
    ++room.matching;
    room.slots_ever += empty[kind_[node]];
    if (takes_work_[node] == 0) {
      continue;
    }
    room.slots_up += empty[kind_[node]];
    room.slots[node] = reserved_[node] != 0 ? 0 : SlotsNow(shape, node);
  }
  room.seen = changed_.size();
  return room;
}

void FreeRoom::Refresh(const Shape& shape, ShapeRoom* room) const {
  for (; room->seen < changed_.size(); ++room->seen) {
    const uint32_t node = changed_[room->seen];
    const bool open = room->matches[node] != 0 && takes_work_[node] != 0 && reserved_[node] == 0;
    room->slots[node] = open ? SlotsNow(shape, node) : 0;
  }
}

void FreeRoom::Take(const Shape& shape, const std::vector<ChosenNode>& chosen) {
  for (const ChosenNode& one : chosen) {
    NodeView& node = nodes_[one.node];
    node.cpus_free -= shape.cpus * one.ranks;
    node.memory_free -= shape.memory * one.ranks;
    const auto gpus = static_cast<ptrdiff_t>(static_cast<size_t>(shape.gpus) * one.ranks);
    node.gpus_free.erase(node.gpus_free.begin(), node.gpus_free.begin() + gpus);
    cpus_free_[one.node] = node.cpus_free;
    memory_free_[one.node] = node.memory_free;
    gpus_free_[one.node] = static_cast<uint32_t>(node.gpus_free.size());
    changed_.push_back(one.node);
  }
}

void FreeRoom::Reserve(uint32_t node) {
  reserved_[node] = 1;
  changed_.push_back(node);
}

std::vector<uint32_t> FreeRoom::NodesToReserve(const Shape& shape, const ShapeRoom& room) const {
  const std::vector<uint32_t> empty = SlotsOfKinds(shape);
  // Nodes with more room now come first: they are ready soonest, and the choice stays the same from
  // pass to pass while jobs end.
  std::vector<std::pair<uint32_t, uint32_t>> heap;  // slots now, and ~node
  for (uint32_t node = 0; node < nodes_.size(); ++node) {
    if (room.matches[node] != 0 && takes_work_[node] != 0 && reserved_[node] == 0 &&
        empty[kind_[node]] > 0) {
      heap.emplace_back(room.slots[node], ~node);
    }
  }
  std::make_heap(heap.begin(), heap.end());
  std::vector<uint32_t> chosen;
  uint64_t slots = 0;
  while (slots < shape.ranks && !heap.empty()) {
    chosen.push_back(~heap.front().second);
    slots += empty[kind_[chosen.back()]];
    std::pop_heap(heap.begin(), heap.end());
    heap.pop_back();
  }
  return slots >= shape.ranks ? chosen : std::vector<uint32_t>();
}

}  // namespace heddle::schedule
