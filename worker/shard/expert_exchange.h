// Rows of experts over a part of the group: what model/moe asks for, by worker/comm. For this
// folder.
#pragma once

#include <memory>
#include <vector>

#include "model/layers/expert_access.h"
#include "worker/comm/communicator.h"

namespace heddle::shard {

class ExpertExchange : public layers::RowExchange {
 public:
  // `ranks` share the experts. In reports the rows of layer l are those of unit first_unit + l.
  ExpertExchange(int ranks, int first_unit) : ranks_(ranks), first_unit_(first_unit) {}

  // The group of these ranks: before the first pass.
  void Connect(std::unique_ptr<comm::Communicator> group) { group_ = std::move(group); }

  int ranks() const override { return ranks_; }
  Status AllToAll(int layer, std::span<const std::byte> sent, std::span<const size_t> sent_bytes,
                  std::span<std::byte> received, std::span<const size_t> received_bytes) override {
    ASSIGN_OR_RETURN(
        const std::unique_ptr<comm::Pending> pending,
        group_->StartAllToAll(sent, sent_bytes, received, received_bytes, first_unit_ + layer));
    return pending->Wait();
  }

 private:
  const int ranks_;
  const int first_unit_;
  std::unique_ptr<comm::Communicator> group_;
};

}  // namespace heddle::shard
