// Experts divided over two ranks, which are two threads here (training-runtime.md section 10): what
// the layer computes, how many rounds of messages it takes, and what happens while rows travel.
#include "model/moe/routed_experts.h"

#include <gtest/gtest.h>

#include <array>
#include <condition_variable>
#include <map>
#include <mutex>
#include <thread>

#include "tests/model/moe/moe_fixture.h"

namespace heddle::moe {
namespace {

using layers_test::MaxDifference;
using layers_test::Normal;
using layers_test::ToTensor;
using moe_test::Batch;
using moe_test::kWidth;
using moe_test::ModelConfig;
using moe_test::MoeCase;
using moe_test::Outcome;
using moe_test::Runner;
using moe_test::SmallConfig;

constexpr int kRanks = 2;

// Where the two ranks leave their slices for each other, round by round. Nothing comes before the
// reader waits, so that a result that is used too early is not there.
struct Mail {
  std::mutex mutex;
  std::condition_variable came;
  std::map<std::array<int, 3>, std::vector<std::byte>> slices;  // by round, from, to
};

class CountingExchange : public layers::RowExchange {
 public:
  CountingExchange(Mail* mail, int rank) : mail_(mail), rank_(rank) {}

  int ranks() const override { return kRanks; }
  StatusOr<std::unique_ptr<layers::PendingRows>> StartAllToAll(
      int layer, std::span<const std::byte> sent, std::span<const size_t> sent_bytes,
      std::span<std::byte> received, std::span<const size_t> received_bytes) override {
    EXPECT_EQ(layer, 3);
    if (rounds_ == breaks_at_) return Unavailable("the peer is gone");
    const int round = rounds_++;
    ++under_way_;
    {
      const std::lock_guard<std::mutex> lock(mail_->mutex);
      for (int to = 0; to < kRanks; ++to) {
        const auto slice = sent.first(sent_bytes[static_cast<size_t>(to)]);
        mail_->slices[{round, rank_, to}].assign(slice.begin(), slice.end());
        sent = sent.subspan(slice.size());
      }
      EXPECT_TRUE(sent.empty());
    }
    mail_->came.notify_all();
    return std::make_unique<Rows>(
        this, round, received, std::vector<size_t>(received_bytes.begin(), received_bytes.end()));
  }

  int rounds() const { return rounds_; }
  int under_way() const { return under_way_; }
  void BreakAt(int round) { breaks_at_ = round; }

 private:
  class Rows : public layers::PendingRows {
   public:
    Rows(CountingExchange* exchange, int round, std::span<std::byte> to, std::vector<size_t> bytes)
        : exchange_(exchange), round_(round), to_(to), bytes_(std::move(bytes)) {}
    ~Rows() override { EXPECT_TRUE(waited_) << "round " << round_; }
    Status Wait() override {
      EXPECT_FALSE(waited_);
      waited_ = true;
      --exchange_->under_way_;
      Mail* mail = exchange_->mail_;
      std::unique_lock<std::mutex> lock(mail->mutex);
      for (int from = 0; from < kRanks; ++from) {
        const std::array<int, 3> key = {round_, from, exchange_->rank_};
        if (!mail->came.wait_for(lock, std::chrono::seconds(60),
                                 [&] { return mail->slices.contains(key); })) {
          return Unavailable("no slice came");
        }
        const std::vector<std::byte> slice = std::move(mail->slices[key]);
        EXPECT_EQ(slice.size(), bytes_[static_cast<size_t>(from)]);
        std::copy(slice.begin(), slice.end(), to_.begin());
        to_ = to_.subspan(slice.size());
      }
      EXPECT_TRUE(to_.empty());
      return OkStatus();
    }

   private:
    CountingExchange* const exchange_;
    const int round_;
    std::span<std::byte> to_;
    const std::vector<size_t> bytes_;
    bool waited_ = false;
  };

  Mail* const mail_;
  const int rank_;
  int rounds_ = 0;
  int under_way_ = 0;
  int breaks_at_ = -1;
};

// One rank's half of a layer.
struct Half {
  Half(const ModelConfig& config, at::ScalarType type, Mail* mail, int rank)
      : whole(config, type), exchange(mail, rank), plan(whole.fixture.plan()) {
    plan.experts = {rank * config.moe().n_experts() / kRanks, config.moe().n_experts() / kRanks};
    storage = whole.fixture.storage();
    storage.plan = &plan;
    storage.experts.exchange = &exchange;
    layer = MakeMoe(config, storage);
  }
  MoeCase whole;
  CountingExchange exchange;
  model::ModelPlan plan;
  layers::LayerStorage storage;
  std::unique_ptr<MoeLayer> layer;
};

template <typename Body>
void OnBothRanks(const Body& body) {
  std::thread other([&] { body(1); });
  body(0);
  other.join();
}

ModelConfig ConfigOf(int top_k, int shared) {
  ModelConfig config = SmallConfig(6, top_k);
  config.mutable_moe()->set_n_shared(shared);
  return config;
}

// Rank 1 has other tokens, more than one task copies, or none.
std::vector<Batch> BatchesOf(bool idle) {
  std::vector<Batch> batches;
  batches.emplace_back(std::vector<int32_t>{30, 11}, kWidth, "divided.0");
  batches.emplace_back(std::vector<int32_t>{idle ? 0 : 300}, kWidth, "divided.1");
  return batches;
}

void ExpectClose(const Outcome& got, const Outcome& expected, double tolerance) {
  EXPECT_LT(MaxDifference(got.out, expected.out), tolerance);
  EXPECT_LT(MaxDifference(got.dh, expected.dh), tolerance);
}

// fp64, so that only the order of sums remains.
TEST(RoutedExperts, TwoRanksComputeWhatOneDoesWithAndWithoutRecomputation) {
  for (const auto& [top_k, shared, idle] :
       {std::tuple{1, 0, false}, {2, 1, false}, {3, 2, true}, {6, 1, false}}) {
    for (const bool recompute : {false, true}) {
      SCOPED_TRACE(Str(top_k, " ", shared, " ", idle, " ", recompute));
      const ModelConfig config = ConfigOf(top_k, shared);
      const std::vector<Batch> batches = BatchesOf(idle);
      const auto train = [&](Runner* runner, const Batch& batch) {
        return recompute ? runner->TrainWithRecomputation(batch) : runner->Train(batch);
      };
      MoeCase one(config, at::kDouble);
      Runner runner = one.NewRunner();
      std::vector<Outcome> expected;
      for (const Batch& batch : batches) expected.push_back(train(&runner, batch));

      Mail mail;
      std::vector<std::unique_ptr<Half>> halves;
      std::vector<Outcome> got(kRanks);
      for (int r = 0; r < kRanks; ++r) {
        halves.push_back(std::make_unique<Half>(config, at::kDouble, &mail, r));
      }
      OnBothRanks([&](int rank) {
        const auto r = static_cast<size_t>(rank);
        Runner half(halves[r]->layer.get(), at::kDouble);
        got[r] = train(&half, batches[r]);
      });
      for (size_t r = 0; r < kRanks; ++r) ExpectClose(got[r], expected[r], 1e-12);
      const auto gradients = one.Gradients();
      const auto first = halves[0]->whole.Gradients();
      const auto second = halves[1]->whole.Gradients();
      for (const auto& [name, values] : gradients) {
        std::vector<double> sum = first.at(name);
        for (size_t i = 0; i < sum.size(); ++i) sum[i] += second.at(name)[i];
        EXPECT_LT(MaxDifference(sum, values), 1e-10) << name;
      }
    }
  }
}

// What the header says, on both ranks, one of which has no token in the second case.
TEST(RoutedExperts, RoundsOfMessages) {
  for (const at::ScalarType type : {at::kBFloat16, at::kFloat, at::kDouble}) {
    for (const bool idle : {false, true}) {
      const ModelConfig config = ConfigOf(2, 1);
      const std::vector<Batch> batches = BatchesOf(idle);
      Mail mail;
      std::vector<std::unique_ptr<Half>> halves;
      for (int r = 0; r < kRanks; ++r) {
        halves.push_back(std::make_unique<Half>(config, type, &mail, r));
      }
      std::array<std::vector<int>, kRanks> rounds;
      OnBothRanks([&](int rank) {
        const auto r = static_cast<size_t>(rank);
        Runner half(halves[r]->layer.get(), type);
        half.Infer(batches[r]);
        rounds[r].push_back(halves[r]->exchange.rounds());
        half.Train(batches[r]);
        rounds[r].push_back(halves[r]->exchange.rounds());
        half.TrainWithRecomputation(batches[r]);
        rounds[r].push_back(halves[r]->exchange.rounds());
      });
      const int inference = 3;
      const int training = 3 + 2;
      const int again = 3 + 2 + 1;  // neither counts nor results of the recomputation
      const std::vector<int> expected = {inference, inference + training,
                                         inference + training + again};
      EXPECT_EQ(rounds[0], expected);
      EXPECT_EQ(rounds[1], expected);
    }
  }
}

// The experts themselves, without a layer around them.
struct Routed {
  Routed(MoeCase* c, layers::ExpertAccess access, int first, int count)
      : experts(layers::Activation::kSwiglu, Views(c, first, count), access, 3) {}
  static std::vector<layers::FeedForwardTensors> Views(MoeCase* c, int first, int count) {
    std::vector<layers::FeedForwardTensors> views;
    for (int e = first; e < first + count; ++e) {
      views.push_back(layers::ViewFeedForward(layers::Activation::kSwiglu, c->fixture.storage(),
                                              MoeCase::Expert(e)));
    }
    return views;
  }
  RoutedExperts experts;
};

struct Passes {
  std::vector<int> under_way;  // rounds that were, at each call of `meanwhile`
  Status forward;
  Status backward;
};

Passes RunPasses(RoutedExperts* experts, const CountingExchange* exchange, int64_t tokens) {
  Passes passes;
  std::vector<int32_t> chosen;
  for (int64_t t = 0; t < tokens; ++t) chosen.push_back(static_cast<int32_t>(t % 6));
  Dispatch dispatch;
  BuildDispatch(chosen, 1, 6, INT64_MAX, &dispatch);
  layers::BufferPool kept, scratch;
  const at::Tensor x = ToTensor(Normal(tokens * kWidth, "x"), kWidth, at::kDouble);
  const at::Tensor y = at::full({dispatch.rows(), kWidth}, 0.0, x.options());
  const at::Tensor weight = at::full({dispatch.rows()}, 0.5, x.options());
  const at::Tensor dweight = at::full({dispatch.rows()}, 0.0, x.options());
  const auto meanwhile = [&] {
    passes.under_way.push_back(exchange == nullptr ? 0 : exchange->under_way());
  };
  const RoutedExperts::ForwardRows forward = {experts, &dispatch,           x, y, meanwhile,
                                              &kept,   layers::Pass::kTrain};
  passes.forward = RoutedExperts::Forward({&forward, 1}, &scratch);
  if (!passes.forward.ok()) return passes;
  EXPECT_EQ(scratch.Mark(), 0u);
  const RoutedExperts::BackwardRows backward = {experts, &dispatch, x, x,
                                                weight,  dweight,   y, meanwhile};
  passes.backward = RoutedExperts::Backward({&backward, 1}, &scratch);
  if (!passes.backward.ok()) return passes;
  EXPECT_EQ(scratch.Mark(), 0u);
  return passes;
}

TEST(RoutedExperts, OtherWorkIsDoneWhileRowsTravel) {
  const ModelConfig config = ConfigOf(1, 0);
  Mail mail;
  std::array<Passes, kRanks> passes;
  OnBothRanks([&](int rank) {
    MoeCase c(config, at::kDouble);
    CountingExchange exchange(&mail, rank);
    Routed half(&c, {.exchange = &exchange}, rank * 3, 3);
    passes[static_cast<size_t>(rank)] = RunPasses(&half.experts, &exchange, rank == 0 ? 40 : 0);
  });
  for (const Passes& p : passes) {
    EXPECT_TRUE(p.forward.ok() && p.backward.ok()) << p.forward << p.backward;
    EXPECT_EQ(p.under_way, (std::vector<int>{1, 1}));
  }
  MoeCase c(config, at::kDouble);
  Routed all(&c, {}, 0, 6);
  EXPECT_EQ(RunPasses(&all.experts, nullptr, 40).under_way, (std::vector<int>{0, 0}));
}

// Each of the five rounds may be the one that finds the peer gone.
TEST(RoutedExperts, ABrokenExchangeEndsTheCall) {
  const ModelConfig config = ConfigOf(1, 0);
  for (int broken = 0; broken < 5; ++broken) {
    Mail mail;
    std::array<Passes, kRanks> passes;
    OnBothRanks([&](int rank) {
      MoeCase c(config, at::kDouble);
      CountingExchange exchange(&mail, rank);
      exchange.BreakAt(broken);
      Routed half(&c, {.exchange = &exchange}, rank * 3, 3);
      passes[static_cast<size_t>(rank)] = RunPasses(&half.experts, &exchange, 40);
    });
    for (const Passes& p : passes) {
      const Status& failed = broken < 3 ? p.forward : p.backward;
      EXPECT_EQ(failed.code(), StatusCode::kUnavailable) << broken;
      EXPECT_EQ(p.forward.ok(), broken >= 3);
    }
  }
}

}  // namespace
}  // namespace heddle::moe
