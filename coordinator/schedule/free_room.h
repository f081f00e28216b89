// What is free on the nodes of a pass, and what of it one shape of gang can use. A pass asks for
// few shapes many times: what a shape finds is kept and brought up to date by the nodes that have
// changed since. Internal to coordinator/schedule.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "coordinator/schedule/schedule.h"

namespace heddle::schedule {

// Ranks of `shape` that so much holds.
uint32_t Slots(const Shape& shape, double cpus, uint64_t memory, size_t gpus);

// A node and ranks on it.
struct ChosenNode {
  uint32_t node = 0;  // index into the snapshot's nodes
  uint32_t ranks = 0;
};

// What a shape finds. Made and kept up to date by FreeRoom only.
struct ShapeRoom {
  std::vector<uint32_t> slots;  // per node now; 0 also where it must not go
  std::vector<uint8_t> matches;
  uint64_t slots_ever = 0;  // of matching nodes, empty
  uint64_t slots_up = 0;    // of those that take work, empty
  uint32_t matching = 0;    // nodes
  size_t seen = 0;          // changes of nodes that are taken in
};

// All ranks or nothing: on the smallest single node that holds all of them, else on the roomiest
// ones first and the tightest for the rest; of equal ones the first. `without`: a node to leave
// out.
std::vector<ChosenNode> Choose(const std::vector<uint32_t>& slots, uint32_t ranks,
                               std::optional<uint32_t> without = std::nullopt);

class FreeRoom {
 public:
  // `nodes` is borrowed and changed by Take.
  explicit FreeRoom(std::vector<NodeView>* nodes);

  // Looks at every node.
  ShapeRoom Look(const Shape& shape);
  // Looks at those that have changed since.
  void Refresh(const Shape& shape, ShapeRoom* room) const;

  void Take(const Shape& shape, const std::vector<ChosenNode>& chosen);
  // Keeps a node from all shapes.
  void Reserve(uint32_t node);
  // Nodes, not reserved yet, that would hold all ranks if they were empty; those with most room now
  // first. Empty if they do not suffice.
  std::vector<uint32_t> NodesToReserve(const Shape& shape, const ShapeRoom& room) const;

 private:
  struct Kind {  // of nodes: how much they have
    double cpus = 0;
    uint64_t memory = 0;
    size_t gpus = 0;
  };
  void AddKind(const NodeView& node);
  const std::vector<uint8_t>& Matching(const std::string& constraint);
  std::vector<uint32_t> SlotsOfKinds(const Shape& shape) const;
  uint32_t SlotsNow(const Shape& shape, uint32_t node) const;

  std::vector<NodeView>& nodes_;
  // Of each node, side by side: a look goes through all of them.
  std::vector<double> cpus_free_;
  std::vector<uint64_t> memory_free_;
  std::vector<uint32_t> gpus_free_;
  std::vector<uint32_t> kind_;
  std::vector<uint8_t> takes_work_;
  std::vector<uint8_t> reserved_;
  std::vector<Kind> kinds_;
  std::map<std::string, std::vector<uint8_t>> matching_;  // by constraint
  std::vector<uint32_t> changed_;                         // nodes, in order of their changes
};

}  // namespace heddle::schedule
