// What reports of a rank that hangs can name: the units of its collectives.
#include <gtest/gtest.h>

#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "base/rank_words/rank_words.h"
#include "tests/support/status_matchers.h"
#include "tests/support/worker/temp_dir.h"
#include "tests/worker/comm/thread_ranks.h"
#include "tests/worker/shard/sharded_run.h"
#include "worker/comm/recorder.h"
#include "worker/control/rank_page.h"

namespace heddle::shard {
namespace {

// "all-gather block.1" and so on: every collective of rank 0 in a run of one step.
std::set<std::string> CollectivesOf(const Case& c) {
  const test::TempDir dir;
  const auto page = control::RankPage::Create(dir.path() + "/page");
  comm::FakeRendezvous server;
  std::vector<std::thread> ranks;
  for (int rank = 0; rank < c.world; ++rank) {
    ranks.emplace_back([&, rank] {
      auto group = comm::ConnectGloo(comm::OptionsOf(&server, rank, c.world));
      ASSERT_OK(group.status());
      if (rank == 0) group = comm::MakeRecorded(*std::move(group), 0, page.get());
      Outcome out = NoOutcome(c);
      ASSERT_OK(RunRank(c, group->get(), &out));
    });
  }
  for (std::thread& rank : ranks) rank.join();
  std::set<std::string> texts;
  const uint64_t last = page->NewestCollective().seq;
  EXPECT_LT(last, control::kRingEntries);
  for (uint64_t seq = 1; seq <= last; ++seq) {
    const control::CollectiveEntry& entry = page->ring()[seq];
    const std::string text = CollectiveText(seq, entry.op, entry.unit, c.config.n_layers());
    texts.insert(text.substr(text.find(' ') + 1));
  }
  return texts;
}

Case ExpertCase(int world, int degree) {
  Case c;
  c.config = model_test::TinyConfig(model_test::Kind::kHybrid, true);
  c.config.mutable_moe()->set_n_experts(8);
  c.config.mutable_moe()->add_layers(0);
  c.config.mutable_moe()->add_layers(2);
  c.world = world;
  c.steps = 1;
  c.options.mode = Mode::kNone;
  c.options.expert_degree = degree;
  return c;
}

TEST(Report, SumsOfExpertsNameTheirLayer) {
  const std::set<std::string> texts = CollectivesOf(ExpertCase(2, 1));
  EXPECT_TRUE(texts.contains("all-reduce block.0.experts"));
  EXPECT_TRUE(texts.contains("all-reduce block.2.experts"));
  EXPECT_TRUE(texts.contains("all-reduce")) << "of all that is dense";
  EXPECT_FALSE(texts.contains("all-reduce embedding"));
}

// Sums over some of the ranks are exchanges between all of them.
TEST(Report, SumsOfDividedExpertsNameNoOtherUnit) {
  const std::set<std::string> texts = CollectivesOf(ExpertCase(4, 2));
  EXPECT_TRUE(texts.contains("all-to-all block.0.experts"));
  EXPECT_TRUE(texts.contains("all-to-all block.2.experts"));
  for (const std::string& text : texts) {
    EXPECT_TRUE(text.find("all-to-all") != 0 || text.ends_with(".experts")) << text;
  }
}

}  // namespace
}  // namespace heddle::shard
