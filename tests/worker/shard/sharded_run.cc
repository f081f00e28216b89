#include "tests/worker/shard/sharded_run.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "data/stream/sequence_stream.h"
#include "model/optim/gradient_norm.h"
#include "model/optim/optimizer.h"
#include "tests/support/status_matchers.h"

namespace heddle::shard {
namespace {

using model_test::BatchData;
using model_test::RandomBatch;

constexpr int kSteps = 3;
constexpr int kMicroBatches = 5;
constexpr uint64_t kSeed = 7;

const BatchData& MicroBatch(int step, int m) {
  static const std::vector<BatchData> all = [] {
    std::vector<BatchData> batches;
    for (int i = 0; i < kSteps * kMicroBatches; ++i) {
      batches.push_back(RandomBatch({7 + i % 3, 0, 1, 4 + i % 5}, 37, static_cast<uint64_t>(i)));
    }
    return batches;
  }();
  return all[static_cast<size_t>(step % kSteps * kMicroBatches + m)];
}

layers::StepInfo InfoOf(int step) {
  layers::StepInfo info;
  info.step = step;
  info.seed = kSeed;
  int64_t labels = 0;
  int64_t rows = 0;
  for (int m = 0; m < kMicroBatches; ++m) {
    const BatchData& batch = MicroBatch(step, m);
    labels += std::count_if(batch.labels.begin(), batch.labels.end(),
                            [](int64_t label) { return label != model::kIgnoredLabel; });
    rows += static_cast<int64_t>(batch.ids.size());
  }
  info.loss_scale = 1.0 / static_cast<double>(labels);
  info.row_scale = 1.0 / static_cast<double>(rows);
  return info;
}

int PassesOf(int world) { return (kMicroBatches + world - 1) / world; }

// The batches of one pass of a rank; an empty one where it has none left.
std::vector<model::PackedBatch> PassOf(const Case& c, int step, int rank, int pass) {
  const stream::MicroBatchRange mine = stream::RankMicroBatches(kMicroBatches, rank, c.world);
  const bool all = c.options.accumulation == Accumulation::kLayerMajor;
  std::vector<model::PackedBatch> batches;
  for (int64_t m = mine.begin + pass;
       m < (all ? mine.end : std::min(mine.end, mine.begin + pass + 1)); ++m) {
    batches.push_back(MicroBatch(step, static_cast<int>(m)).view());
  }
  static const BatchData nothing;
  // Ranks that share experts make the same number of exchanges.
  const int lanes = all && c.options.expert_degree > 1 ? PassesOf(c.world) : 1;
  while (static_cast<int>(batches.size()) < lanes) batches.push_back(nothing.view());
  return batches;
}

optim::StepArgs ArgsOf(const Case& c, int step, double squares) {
  optim::StepArgs args;
  args.update = step + 1;
  args.learning_rate = 0.01;
  args.grad_scale = optim::ClipDivisor(std::sqrt(squares), c.clip);
  return args;
}

// Adds `from` to `to`, or takes its place where `to` is empty.
void Add(const std::span<const float> from, Values* to) {
  if (to->empty()) {
    to->assign(from.begin(), from.end());
    return;
  }
  for (size_t i = 0; i < from.size(); ++i) (*to)[i] += from[i];
}

// What a rank holds, at its place in the whole model.
void Place(const model::ModelPlan& own, const model::ModelPlan& whole, const Held& held,
           std::span<const float> values, Values* to) {
  for (const model::TensorSpec& tensor : own.tensors) {
    const int64_t begin = std::max(tensor.offset, held.range.begin);
    const int64_t end = std::min(tensor.offset + tensor.elements, held.range.end);
    if (begin >= end) continue;
    const int64_t shift = whole.Find(tensor.name)->offset - tensor.offset;
    std::copy(values.begin() + (begin - held.range.begin),
              values.begin() + (end - held.range.begin), to->begin() + begin + shift);
  }
}

}  // namespace

Values Reference(const Case& c) {
  model_test::Built built = model_test::Build(c.config, c.options.precision, {}, kSeed);
  const model::ModelPlan& plan = built.store->plan();
  const optim::Hyperparameters hyper;
  const std::vector<optim::GroupRange> groups = optim::GroupsOf(plan, hyper);
  Values m(static_cast<size_t>(plan.flat_elements), 0.0f);
  Values v = m;
  for (int step = 0; step < kSteps; ++step) {
    const bool each = c.options.accumulation == Accumulation::kSyncEach;
    Values sum;
    for (int pass = 0; pass < (each ? PassesOf(c.world) : 1); ++pass) {
      Values over_ranks;
      for (int rank = 0; rank < c.world; ++rank) {
        built.store->ZeroGradients();
        for (int p = pass; p < (each ? pass + 1 : PassesOf(c.world)); ++p) {
          Case single = c;
          single.options.accumulation = Accumulation::kSyncEach;
          EXPECT_OK(built.model->ForwardBackward(PassOf(single, step, rank, p), InfoOf(step)));
        }
        Add(built.store->gradients(), &over_ranks);
      }
      Add(over_ranks, &sum);
    }
    double squares = 0;
    for (const float g : sum) squares += double{g} * double{g};
    std::copy(sum.begin(), sum.end(), built.store->gradients().begin());
    optim::OptimizerStep(hyper, groups, ArgsOf(c, step, squares),
                         {.flat_offset = 0,
                          .master = built.store->master(),
                          .m = m,
                          .v = v,
                          .gradient = built.store->gradients(),
                          .compute_bf16 = built.store->compute_bf16()});
  }
  return {built.store->master().begin(), built.store->master().end()};
}

namespace {

// With the moments that lie beside offloaded masters, or in m and v.
optim::Shard ShardOf(const Held& held, Values* m, Values* v) {
  optim::Shard shard = {.flat_offset = held.range.begin,
                        .master = held.master,
                        .gradient = held.gradient,
                        .compute_bf16 = held.compute_bf16};
  const size_t size = held.master.size();
  if (held.offloaded) {
    shard.m = {reinterpret_cast<float*>(held.moments[0]), size};
    shard.v = {reinterpret_cast<float*>(held.moments[1]), size};
  } else {
    shard.m = std::span<float>(*m).subspan(static_cast<size_t>(held.owned_offset), size);
    shard.v = std::span<float>(*v).subspan(static_cast<size_t>(held.owned_offset), size);
  }
  return shard;
}

}  // namespace

Status RunRank(const Case& c, comm::Communicator* group, Outcome* out) {
  ASSIGN_OR_RETURN(const model::ModelPlan whole, model::PlanModel(c.config));
  Options options = c.options;
  options.rank = group->rank();
  options.world = c.world;
  ASSIGN_OR_RETURN(const model::ModelPlan plan,
                   model::PlanModel(c.config, model::ExpertsOfRank(c.config, options.rank,
                                                                   options.expert_degree)));
  ASSIGN_OR_RETURN(const std::unique_ptr<Parameters> parameters, MakeParameters(plan, options));
  parameters->Connect(group);
  RETURN_IF_ERROR(InitParameters(kSeed, parameters.get()));
  for (const model::TensorSpec& buffer : plan.buffers) {
    if (c.first_bias != 0) parameters->buffers()[static_cast<size_t>(buffer.offset)] = c.first_bias;
  }
  model::LanguageModelOptions model_options;
  model_options.recompute = c.recompute;
  ASSIGN_OR_RETURN(const std::unique_ptr<model::LanguageModel> model,
                   model::LanguageModel::Create(c.config, parameters->memory(), model_options));
  const optim::Hyperparameters hyper;
  const std::vector<optim::GroupRange> groups = optim::GroupsOf(plan, hyper);
  Values m(static_cast<size_t>(parameters->owned_elements()), 0.0f);
  Values v = m;
  const int passes = options.accumulation == Accumulation::kLayerMajor ? 1 : PassesOf(c.world);
  for (int step = 0; step < c.steps; ++step) {
    parameters->BeginStep();
    std::fill(model->statistics().begin(), model->statistics().end(), 0.0);
    double loss = 0;
    for (int pass = 0; pass < passes; ++pass) {
      ASSIGN_OR_RETURN(
          const model::LossSum sum,
          model->ForwardBackward(PassOf(c, step, options.rank, pass), InfoOf(step),
                                 parameters->Hooks({.train = true, .last = pass + 1 == passes})));
      loss += sum.loss * InfoOf(step).loss_scale;
    }
    RETURN_IF_ERROR(parameters->FinishGradients());
    double squares = 0;
    RETURN_IF_ERROR(parameters->ForEachMeasured([&](const Measured& slice) {
      squares += slice.Stats().sum_of_squares;
    }));
    RETURN_IF_ERROR(group->AllReduceSum(std::span<double>(&squares, 1)));
    RETURN_IF_ERROR(group->AllReduceSum(std::span<double>(&loss, 1)));
    out->losses.push_back(loss);
    out->norms.push_back(std::sqrt(squares));
    RETURN_IF_ERROR(parameters->ForEachHeld(Touch::kUpdate, [&](const Held& held) {
      if (step == 0) {
        Place(plan, whole, held, held.gradient, &out->first_gradients);
      }
      optim::OptimizerStep(hyper, groups, ArgsOf(c, step, squares), ShardOf(held, &m, &v));
      return OkStatus();
    }));
    parameters->Updated();
    if (c.config.moe().n_experts() > 0) {
      RETURN_IF_ERROR(group->AllReduceSum(model->statistics()));
      model->UpdateBuffers(false);
    }
    // A forward between two steps: gathers, and changes nothing.
    RETURN_IF_ERROR(model->Evaluate(MicroBatch(step, 0).view(), InfoOf(step),
                                    parameters->Hooks({.train = false})));
  }
  out->gathered_bytes = parameters->gathered_bytes();
  if (const auto stats = parameters->TakeOffloadStats()) out->offload = *stats;
  out->buffers.assign(parameters->buffers().begin(), parameters->buffers().end());
  return parameters->ForEachHeld(Touch::kReadState, [&](const Held& held) {
    Place(plan, whole, held, held.master, &out->masters);
    return OkStatus();
  });
}

Outcome NoOutcome(const Case& c) {
  const Values zero(static_cast<size_t>(model::PlanModel(c.config)->flat_elements), 0.0f);
  Outcome none;
  none.masters = zero;
  none.first_gradients = zero;
  return none;
}

void Merge(const Values& from, Values* to) {
  for (size_t i = 0; i < to->size(); ++i) (*to)[i] = (*to)[i] == 0.0f ? from[i] : (*to)[i];
}

double Largest(const Values& a, const Values& b) {
  double largest = a.size() == b.size() ? 0 : INFINITY;
  for (size_t i = 0; i < a.size() && i < b.size(); ++i) {
    largest = std::max(largest, std::abs(double{a[i]} - double{b[i]}));
  }
  return largest;
}

namespace {

std::string NameOf(Mode mode) {
  return mode == Mode::kNone ? "none" : mode == Mode::kOptimizer ? "optimizer" : "full";
}
std::string NameOf(Accumulation accumulation) {
  return accumulation == Accumulation::kSyncEach   ? "sync_each"
         : accumulation == Accumulation::kSyncLast ? "sync_last"
                                                   : "layer_major";
}

}  // namespace

Case CaseOf(const Parts& parts) {
  Case c;
  bool tied = false;
  std::tie(c.world, c.options.mode, c.options.accumulation, c.recompute, c.options.precision,
           tied) = parts;
  c.config.set_tie_embeddings(tied);
  return c;
}

std::string NameOf(const Parts& parts) {
  const auto& [world, mode, accumulation, recompute, precision, tied] = parts;
  return Str(world, "_", NameOf(mode), "_", NameOf(accumulation), "_",
             recompute == Recompute::kFull        ? "recompute"
             : recompute == Recompute::kSelective ? "selective"
                                                  : "keep",
             "_", precision == Precision::kFp32 ? "fp32" : "bf16", tied ? "_tied" : "");
}

std::vector<Parts> AllParts() {
  std::vector<Parts> all;
  for (const int world : {1, 2, 3, 4}) {
    for (const Mode mode : {Mode::kNone, Mode::kOptimizer, Mode::kFull}) {
      for (const Accumulation accumulation :
           {Accumulation::kSyncEach, Accumulation::kSyncLast, Accumulation::kLayerMajor}) {
        if (mode == Mode::kNone && accumulation == Accumulation::kSyncEach) continue;
        for (const Recompute recompute :
             {Recompute::kNone, Recompute::kSelective, Recompute::kFull}) {
          for (const Precision precision : {Precision::kFp32, Precision::kBf16}) {
            all.emplace_back(world, mode, accumulation, recompute, precision, false);
            if (world == 2 || world == 3) {
              all.emplace_back(world, mode, accumulation, recompute, precision, true);
            }
          }
        }
      }
    }
  }
  return all;
}

std::string Difference(const Case& c, const Values& got) {
  // The reference does not depend on mode or recomputation.
  static std::map<std::tuple<int, bool, Precision, bool>, Values> references;
  const bool tied = c.config.tie_embeddings();
  const auto key = std::tuple(c.world, c.options.accumulation == Accumulation::kSyncEach,
                              c.options.precision, tied);
  if (!references.contains(key)) references[key] = Reference(c);
  const Values& expected = references[key];
  const double largest = Largest(got, expected);
  if (got.size() != expected.size()) return "another number of parameters";
  if (tied && c.options.accumulation == Accumulation::kLayerMajor) {
    // The head's shares of all micro-batches come before the embedding's.
    const double allowed = c.options.precision == Precision::kFp32 ? 2e-6 : 1e-2;
    return largest < allowed ? "" : Str("largest difference ", largest);
  }
  const bool equal = std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)) == 0;
  return equal ? "" : Str("other bits; largest difference ", largest);
}

}  // namespace heddle::shard
