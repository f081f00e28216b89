// What goes to and from the home of offloaded experts, and when the model gets them.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>
#include <vector>

#include "tests/support/status_matchers.h"
#include "tests/support/worker/temp_dir.h"
#include "tests/worker/shard/sharded_run.h"
#include "worker/offload/home.h"

namespace heddle::shard {
namespace {

using layers::ExpertMemory;
using Use = ExpertMemory::Use;

constexpr int kExperts = 32;

// Counts what goes by, and on request lets reads wait.
class WatchedHome : public offload::Home {
 public:
  explicit WatchedHome(std::unique_ptr<offload::Home> home) : home_(std::move(home)) {}

  void Begin(const offload::Transfer& transfer) override {
    {
      const std::lock_guard lock(mutex_);
      if (transfer.write) ++writes_[transfer.block];
      if (!transfer.write && holds_) return held_.push_back(transfer);
    }
    home_->Begin(transfer);
  }
  void Wait(std::vector<offload::TransferEnd>& ends) override {
    std::deque<offload::Transfer> begun;
    {
      const std::lock_guard lock(mutex_);
      for (; released_ > 0 && !held_.empty(); --released_) {
        begun.push_back(held_.front());
        held_.pop_front();
      }
    }
    for (const offload::Transfer& transfer : begun) home_->Begin(transfer);
    home_->Wait(ends);
  }
  void Wake() override { home_->Wake(); }
  std::string Describe() const override { return home_->Describe(); }

  void HoldReads() {
    const std::lock_guard lock(mutex_);
    holds_ = true;
  }
  void LetAllGo() {
    {
      const std::lock_guard lock(mutex_);
      holds_ = false;
      released_ = held_.size();
    }
    Wake();
  }
  size_t held() {
    const std::lock_guard lock(mutex_);
    return held_.size();
  }
  void Release(size_t reads) {
    {
      const std::lock_guard lock(mutex_);
      released_ += reads;
    }
    Wake();
  }
  int writes(uint32_t slot, offload::Kind kind) {
    const std::lock_guard lock(mutex_);
    return writes_[slot * offload::kKinds + static_cast<uint32_t>(kind)];
  }

 private:
  const std::unique_ptr<offload::Home> home_;
  std::mutex mutex_;                // guards the rest
  std::map<uint32_t, int> writes_;  // by block
  bool holds_ = false;
  size_t released_ = 0;
  std::deque<offload::Transfer> held_;
};

// Experts of two layers in a resident set of a share of their bytes; the home is an arena.
class OffloadTraffic : public testing::Test {
 protected:
  void Make(int percent) {
    heddle::v1::ModelConfig config = model_test::TinyConfig(model_test::Kind::kHybrid, true);
    config.mutable_moe()->set_n_experts(kExperts);
    config.mutable_moe()->set_d_expert(16);
    config.mutable_moe()->add_layers(0);
    config.mutable_moe()->add_layers(2);
    ASSERT_OK_AND_ASSIGN(const model::ModelPlan plan, model::PlanModel(config));
    int64_t all = 0;
    for (auto u = static_cast<size_t>(plan.dense_units); u < plan.units.size(); ++u) {
      for (const int64_t bytes : {2, 4, 12}) {
        all += offload::BlockMemoryBytes(bytes * plan.units[u].elements);
      }
    }
    Options options;
    options.precision = Precision::kBf16;
    options.offload = {.enabled = true, .budget_bytes = all * percent / 100};
    options.offload.around_home = [this](std::unique_ptr<offload::Home> home) {
      auto watched = std::make_unique<WatchedHome>(std::move(home));
      home_ = watched.get();
      return watched;
    };
    ASSERT_OK_AND_ASSIGN(parameters_, MakeParameters(plan, options));
    group_ = comm::MakeSolo();
    parameters_->Connect(group_.get());
    ASSERT_OK(InitParameters(1, parameters_.get()));
    ASSERT_NE(memory(), nullptr);
  }
  // A set waits for its transfers before it goes.
  void TearDown() override {
    if (home_ != nullptr) home_->LetAllGo();
  }
  ExpertMemory* memory() { return parameters_->memory().experts.memory; }

  // All experts of a layer, once.
  void Visit(int layer, Use use) {
    std::vector<int> experts(kExperts);
    std::iota(experts.begin(), experts.end(), 0);
    ASSERT_OK(memory()->Begin(layer, experts, use));
    for (size_t done = 0; done < experts.size();) {
      ASSERT_OK_AND_ASSIGN(const size_t count, memory()->Next());
      done += count;
      ASSERT_OK(memory()->End());
    }
  }

  std::unique_ptr<comm::Communicator> group_;
  std::unique_ptr<Parameters> parameters_;
  WatchedHome* home_ = nullptr;  // parameters_ has it
};

// In a set where gradients find room until their update, and then what comes next wants it.
TEST_F(OffloadTraffic, AGradientThatWasUsedIsNotWritten) {
  ASSERT_NO_FATAL_FAILURE(Make(50));
  const auto writes = [this](size_t slot) {
    return home_->writes(static_cast<uint32_t>(slot), offload::Kind::kGradient);
  };
  for (int step = 0; step < 2; ++step) {
    parameters_->BeginStep();
    parameters_->Hooks({.train = true, .last = true});
    for (const int layer : {0, 2}) ASSERT_NO_FATAL_FAILURE(Visit(layer, Use::kForward));
    for (const int layer : {2, 0}) ASSERT_NO_FATAL_FAILURE(Visit(layer, Use::kBackward));
    ASSERT_OK(parameters_->FinishGradients());
    std::vector<int> before;  // writes of each slot's gradient when it had been used
    size_t visited = 0;
    ASSERT_OK(parameters_->ForEachHeld(Touch::kUpdate, [&](const Held& held) {
      if (held.offloaded && visited++ > 0) before.push_back(writes(visited - 2));
      return OkStatus();
    }));
    before.push_back(writes(visited - 1));
    ASSERT_EQ(before.size(), 2u * kExperts);
    EXPECT_GE(std::ranges::count(before, 0), kExperts / 2) << "all had been written before";
    parameters_->Updated();
    parameters_->Hooks({.train = false});
    for (const int layer : {0, 2}) ASSERT_NO_FATAL_FAILURE(Visit(layer, Use::kForward));
    ASSERT_OK(parameters_->ForEachHeld(Touch::kReadState, [](const Held&) { return OkStatus(); }));
    EXPECT_GT(home_->writes(0, offload::Kind::kState), 0) << "nothing wanted memory";
    for (size_t slot = 0; slot < before.size(); ++slot) EXPECT_EQ(writes(slot), before[slot]);
  }
}

// While one expert is computed with, others are on their way: it is not they that are waited for.
TEST_F(OffloadTraffic, ExpertsAreTakenTogetherOnlyIfTheyAreThere) {
  ASSERT_NO_FATAL_FAILURE(Make(20));
  // Leaves no room for weights.
  ASSERT_OK(parameters_->ForEachHeld(Touch::kReadState, [](const Held&) { return OkStatus(); }));
  parameters_->TakeOffloadStats();
  parameters_->Hooks({.train = false});
  home_->HoldReads();
  const std::vector<int> experts = {3, 5, 7, 9};
  ASSERT_OK_AND_ASSIGN(const std::vector<int> order, memory()->Begin(0, experts, Use::kForward));
  EXPECT_EQ(order, experts) << "some were there already";
  ASSERT_TRUE(test::WaitUntil([this] { return home_->held() >= 4; }));
  // If Next() waits for them after all, it is told rather than that the test hangs.
  std::atomic<bool> over = false;
  std::thread late([&] {
    if (!test::WaitUntil([&] { return over.load(); })) home_->LetAllGo();
  });
  home_->Release(1);
  const StatusOr<size_t> first = memory()->Next();
  over = true;
  late.join();
  ASSERT_OK(first);
  EXPECT_EQ(*first, 1u);
  ASSERT_OK(memory()->End());
  home_->Release(3);
  const int64_t weights = offload::BlockMemoryBytes(
      2 * parameters_->plan().units[static_cast<size_t>(parameters_->plan().dense_units)].elements);
  int64_t read = 0;
  ASSERT_TRUE(test::WaitUntil([&] {
    read += parameters_->TakeOffloadStats()->bytes_read;
    return read >= 4 * weights;
  }));
  ASSERT_OK_AND_ASSIGN(const size_t rest, memory()->Next());
  EXPECT_EQ(rest, 3u);
  ASSERT_OK(memory()->End());
}

}  // namespace
}  // namespace heddle::shard
