// The c10d store of attempts over a kill of the coordinator, without processes.
#include "coordinator/runtime/rendezvous.h"

#include <gtest/gtest.h>

#include <optional>
#include <string>

#include "coordinator/store/mem_log.h"

namespace heddle::runtime {
namespace {

constexpr Fence kFence{7};

v1::RendezvousRequest Request(v1::RendezvousVerb verb, uint64_t n, int64_t amount = 0) {
  v1::RendezvousRequest request;
  request.set_verb(verb);
  request.set_n(n);
  request.add_keys("joined");
  request.set_amount(amount);
  return request;
}

// A rank adds itself; the coordinator is killed after `written` of its batches; the rank, without
// an answer, asks the next one again.
TEST(RendezvousStore, ARepeatedAddCountsOnceWhereverTheCoordinatorWasKilled) {
  for (size_t written = 0; written <= 3; ++written) {
    store::MemDisk disk;
    std::optional<v1::RendezvousReply> answer;
    const auto keep = [&answer](const v1::RendezvousReply& reply) { answer = reply; };
    const auto alive = [](Fence) { return true; };
    const v1::RendezvousRequest add = Request(v1::RENDEZVOUS_VERB_ADD, 1, 1);
    {
      store::MemLog log(&disk, /*auto_commit=*/false);
      Rendezvous rendezvous;
      rendezvous.Load(&log, alive);
      rendezvous.Handle(kFence, 0, add, 0, [](const v1::RendezvousReply&) {});
      log.Commit(written);
      log.Crash();
    }
    store::MemLog log(&disk, /*auto_commit=*/true);
    Rendezvous rendezvous;
    rendezvous.Load(&log, alive);
    rendezvous.Handle(kFence, 0, add, 0, keep);
    ASSERT_TRUE(answer.has_value());
    EXPECT_EQ(answer->number(), 1) << "killed after " << written << " batches";
    rendezvous.Handle(kFence, 1, Request(v1::RENDEZVOUS_VERB_ADD, 1, 1), 0, keep);
    EXPECT_EQ(answer->number(), 2) << "killed after " << written << " batches";
  }
}

}  // namespace
}  // namespace heddle::runtime
