// Rows of experts over a part of the group: what model/moe asks for, by worker/comm. For this
// folder.
#pragma once

#include <memory>
#include <utility>

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
  StatusOr<std::unique_ptr<layers::PendingRows>> StartAllToAll(
      int layer, std::span<const std::byte> sent, std::span<const size_t> sent_bytes,
      std::span<std::byte> received, std::span<const size_t> received_bytes) override {
    ASSIGN_OR_RETURN(
        std::unique_ptr<comm::Pending> pending,
        group_->StartAllToAll(sent, sent_bytes, received, received_bytes, first_unit_ + layer));
    return std::make_unique<Rows>(std::move(pending));
  }

 private:
  class Rows : public layers::PendingRows {
   public:
    explicit Rows(std::unique_ptr<comm::Pending> pending) : pending_(std::move(pending)) {}
    Status Wait() override { return pending_->Wait(); }

   private:
    const std::unique_ptr<comm::Pending> pending_;
  };

  const int ranks_;
  const int first_unit_;
  std::unique_ptr<comm::Communicator> group_;
};

}  // namespace heddle::shard
