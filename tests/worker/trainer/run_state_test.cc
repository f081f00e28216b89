// What a checkpoint holds of a rank's state, and what a rank takes from one: types of the moments,
// any layout from any other.
#include "worker/trainer/run_state.h"

#include <gtest/gtest.h>
#include <malloc.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/status/status.h"
#include "checkpoint/catalog/tensors.h"
#include "heddle/v1/config.pb.h"
#include "model/hf/model_dir.h"
#include "model/parameter_store.h"
#include "tests/checkpoint/temp_dir.h"
#include "tests/model/attention/allocation_meter.h"
#include "tests/support/bad_disk.h"
#include "tests/support/status_matchers.h"
#include "tests/support/worker/disk_dir.h"

namespace heddle::trainer {
namespace {

using heddle::v1::TrainingConfig;

// One tensor, the embedding, has more elements than two chunks of either type.
heddle::v1::ModelConfig Model() {
  heddle::v1::ModelConfig model;
  model.set_vocab_size(17'000);
  model.set_d_model(64);
  model.set_d_ffn(96);
  model.set_n_layers(1);
  model.set_n_heads(2);
  model.set_n_kv_heads(2);
  model.set_tie_embeddings(true);
  return model;
}

RunPlan PlanOf(optim::Moments moments, shard::Mode mode, optim::Algorithm algorithm) {
  RunPlan plan;
  plan.precision = model::Precision::kFp32;
  plan.optimizer.algorithm = algorithm;
  plan.optimizer.moments = moments;
  plan.optimizer.seed = 3;
  plan.seed = 3;
  plan.shard.mode = mode;
  return plan;
}

// Eight experts in two of three layers, a dense one between them.
heddle::v1::ModelConfig DividedModel() {
  heddle::v1::ModelConfig model;
  model.set_vocab_size(300);
  model.set_d_model(64);
  model.set_d_ffn(96);
  model.set_n_layers(3);
  model.set_n_heads(2);
  model.set_n_kv_heads(2);
  model.set_tie_embeddings(true);
  heddle::v1::MoeConfig* moe = model.mutable_moe();
  moe->set_n_experts(8);
  moe->set_top_k(2);
  moe->set_d_expert(36);
  moe->add_layers(0);
  moe->add_layers(2);
  return model;
}

struct World {
  World(optim::Moments moments, shard::Mode mode, int ranks,
        optim::Algorithm algorithm = optim::Algorithm::kAdamW)
      : World(PlanOf(moments, mode, algorithm), Model(), ranks) {}
  World(const RunPlan& run, const heddle::v1::ModelConfig& model, int ranks) : plan(run) {
    for (int rank = 0; rank < ranks; ++rank) {
      auto state = RunState::Create(model, plan, rank, ranks);
      EXPECT_OK(state);
      states.push_back(*std::move(state));
    }
  }

  // Every offloaded expert, with its unit in the plan while its memory is there.
  static void VisitExperts(RunState* state, layers::ExpertMemory::Use use,
                           const std::function<void(size_t)>& visit) {
    const model::ModelMemory memory = state->parameters()->memory();
    const model::ModelPlan& plan = state->parameters()->plan();
    if (memory.experts.memory == nullptr) return;
    std::vector<int> experts(static_cast<size_t>(plan.experts.count));
    std::iota(experts.begin(), experts.end(), 0);
    size_t first = static_cast<size_t>(plan.dense_units);
    for (const int layer : plan.expert_layers) {
      const StatusOr<std::vector<int>> order = memory.experts.memory->Begin(layer, experts, use);
      ASSERT_OK(order);
      for (size_t done = 0; done < order->size();) {
        const StatusOr<size_t> there = memory.experts.memory->Next();
        ASSERT_OK(there);
        for (const size_t end = done + *there; done < end; ++done) {
          visit(first + static_cast<size_t>((*order)[done]));
        }
        EXPECT_OK(memory.experts.memory->End());
      }
      first += experts.size();
    }
  }

  // Gradients are a function of the element and its tensor, so every layout computes the same.
  static void SetGradients(RunState* state) {
    // A backward through every expert: an offloaded one that had none is left out of an update.
    VisitExperts(state, layers::ExpertMemory::Use::kBackward, [](size_t) {});
    const std::vector<model::TensorSpec>& tensors = state->parameters()->plan().tensors;
    EXPECT_OK(state->parameters()->ForEachHeld(
        shard::Touch::kWriteGradients, [&](const shard::Held& held) {
          std::fill(held.gradient.begin(), held.gradient.end(), 0.0f);
          for (const model::TensorSpec& tensor : tensors) {
            const int64_t begin = std::max(tensor.offset, held.range.begin);
            const int64_t end = std::min(tensor.offset + tensor.elements, held.range.end);
            const auto shift = state->whole().Find(tensor.name)->offset - tensor.offset;
            for (int64_t at = begin; at < end; ++at) {
              const double place = static_cast<double>(at + shift);
              held.gradient[static_cast<size_t>(at - held.range.begin)] =
                  static_cast<float>(std::sin(0.37 * place + 1.1));
            }
          }
          return OkStatus();
        }));
  }

  void Update(int64_t update) {
    for (const auto& state : states) {
      SetGradients(state.get());
      optim::StepArgs args;
      args.update = update;
      args.learning_rate = 1e-3;
      EXPECT_OK(state->ForEachShard(false, [&](const optim::Shard& shard) {
        optim::OptimizerStep(plan.optimizer, state->groups(false), args, shard);
      }));
    }
  }

  StatusOr<heddle::v1::CheckpointRecord> Save(const std::string& root) const {
    heddle::v1::CheckpointRecord record;
    record.set_job(1);
    record.set_fence(2);
    record.set_step(3);
    record.set_dir("j-1/f2/step-3");
    for (const heddle::v1::TensorInfo& info : states[0]->tensors()) *record.add_tensors() = info;
    const uint32_t ranks = static_cast<uint32_t>(states.size());
    for (uint32_t rank = 0; rank < ranks; ++rank) {
      checkpoint::Snapshot snapshot;
      RETURN_IF_ERROR(states[rank]->CopyTo(&snapshot));
      checkpoint::ShardWriterOptions options;
      options.root = root;
      options.dir = record.dir();
      options.header.set_job(1);
      options.header.set_fence(2);
      options.header.set_step(3);
      options.header.set_rank(rank);
      options.header.set_world_size(ranks);
      ASSIGN_OR_RETURN(const auto files, snapshot.Write(options));
      heddle::v1::RankSeal* seal = record.add_seals();
      seal->set_rank(rank);
      for (const heddle::v1::ShardFile& file : files) *seal->add_files() = file;
    }
    return record;
  }

  Status Load(const heddle::v1::CheckpointRecord& record, const std::string& root) const {
    for (const auto& state : states) RETURN_IF_ERROR(state->Load(record, root));
    return OkStatus();
  }

  // Every element of every tensor and class, as fp32. An element that nobody owns stays NaN, which
  // equals nothing.
  std::map<std::pair<uint32_t, int>, std::vector<float>> Values() const {
    std::map<std::pair<uint32_t, int>, std::vector<float>> all;
    for (size_t rank = 0; rank < states.size(); ++rank) {
      EXPECT_OK(states[rank]->ForEachRanges([&](const auto& ranges, bool /*offloaded*/) {
        for (const checkpoint::LocalRange& range : ranges) {
          std::vector<float>& values = all[{range.tensor, range.tensor_class}];
          values.resize(checkpoint::Elements(states[0]->tensors()[range.tensor - 1]),
                        std::nanf(""));
          CopyValues(range, values.data() + range.first);
        }
        return OkStatus();
      }));
    }
    return all;
  }

  void CopyValues(const checkpoint::LocalRange& range, float* to) const {
    const bool narrow = range.tensor_class != heddle::v1::TENSOR_CLASS_MASTER &&
                        plan.optimizer.moments == optim::Moments::kBf16;
    if (narrow) {
      const uint16_t* from = static_cast<const uint16_t*>(range.data);
      std::transform(from, from + range.count, to,
                     [](uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); });
    } else {
      std::copy_n(static_cast<const float*>(range.data), range.count, to);
    }
  }

  RunPlan plan;
  std::vector<std::unique_ptr<RunState>> states;
};

using optim::Moments;
using shard::Mode;

TEST(RunState, Bf16MomentsGoFromAnyLayoutToAnyOther) {
  for (const optim::Algorithm algorithm : {optim::Algorithm::kAdamW, optim::Algorithm::kLion}) {
    World one(Moments::kBf16, Mode::kNone, 1, algorithm);
    World two(Moments::kBf16, Mode::kFull, 2, algorithm);
    for (int64_t update = 1; update <= 2; ++update) {
      one.Update(update);
      two.Update(update);
    }
    const checkpoint::TempDir root;
    const StatusOr<heddle::v1::CheckpointRecord> record = two.Save(root.path());
    ASSERT_OK(record);
    World three(Moments::kBf16, Mode::kOptimizer, 3, algorithm);
    ASSERT_OK(three.Load(*record, root.path()));
    EXPECT_EQ(one.Values(), two.Values());
    EXPECT_EQ(one.Values(), three.Values());
    one.Update(3);
    three.Update(3);
    EXPECT_EQ(one.Values(), three.Values());
  }
}

// An expert's random bits are its own, whichever rank has it, and whether it lies in memory or in
// the resident set of offloaded experts.
TEST(RunState, Bf16MomentsOfExpertsRoundAlikeOnRanksThatDivideThem) {
  RunPlan plan = PlanOf(Moments::kBf16, Mode::kNone, optim::Algorithm::kAdamW);
  const auto updated = [&](const RunPlan& run, int ranks) {
    World world(run, DividedModel(), ranks);
    for (int64_t update = 1; update <= 3; ++update) world.Update(update);
    return world.Values();
  };
  const auto expected = updated(plan, 1);
  for (const auto& [mode, degree, ranks] : {std::tuple{Mode::kNone, 2, 2},
                                            {Mode::kNone, 4, 4},
                                            {Mode::kFull, 1, 4},
                                            {Mode::kFull, 2, 4},
                                            {Mode::kOptimizer, 4, 4}}) {
    plan.shard.mode = mode;
    plan.shard.expert_degree = degree;
    EXPECT_EQ(updated(plan, ranks), expected) << degree << " of " << ranks;
  }
  plan.shard.mode = Mode::kNone;
  plan.shard.expert_degree = 2;
  plan.shard.offload.enabled = true;
  EXPECT_EQ(updated(plan, 2), expected) << "offloaded";
}

// Every optimizer's shard says where its elements lie in the whole model, and no place is two
// elements' of different experts.
TEST(RunState, EveryElementIsUpdatedAtItsPlaceInTheWholeModel) {
  RunPlan plan = PlanOf(Moments::kBf16, Mode::kNone, optim::Algorithm::kAdamW);
  plan.shard.expert_degree = 4;
  World world(plan, DividedModel(), 4);
  const model::ModelPlan& whole = world.states[0]->whole();
  std::vector<int> seen(static_cast<size_t>(whole.flat_elements), 0);
  for (const auto& state : world.states) {
    ASSERT_OK(state->ForEachShard(false, [&](const optim::Shard& shard) {
      for (size_t i = 0; i < shard.master.size(); ++i) {
        ++seen[static_cast<size_t>(shard.rounding_offset) + i];
      }
    }));
  }
  const int64_t experts = whole.units[static_cast<size_t>(whole.dense_units)].offset;
  for (int64_t at = 0; at < whole.flat_elements; ++at) {
    ASSERT_EQ(seen[static_cast<size_t>(at)], at < experts ? 4 : 1) << at;
  }
}

// A folder of weights and, where its router has one, a bias that are no run's initial ones.
std::unique_ptr<model::ParameterStore> WriteFolder(const heddle::v1::ModelConfig& config,
                                                   const std::string& dir) {
  auto store = *model::ParameterStore::Create(*model::PlanModel(config), model::Precision::kFp32);
  model::InitParameters(99, store.get());
  for (size_t i = 0; i < store->buffers().size(); ++i) {
    store->buffers()[i] = 0.25f * static_cast<float>(i % 7);
  }
  hf::ExportOptions options;
  options.shard_bytes_max = 4 << 20;
  EXPECT_OK(hf::WriteModelDir(dir, config, hf::WeightsOf(store.get()), options));
  return store;
}

void ExpectWeightsOf(const World& world, model::ParameterStore* given, const std::string& what) {
  const std::vector<heddle::v1::TensorInfo>& infos = world.states[0]->tensors();
  for (const auto& [place, values] : world.Values()) {
    const std::string& name = infos[place.first - 1].name();
    if (place.second == heddle::v1::TENSOR_CLASS_MASTER) {
      const auto expected = given->master(*given->plan().Find(name));
      EXPECT_TRUE(std::equal(values.begin(), values.end(), expected.begin(), expected.end()))
          << what << ": " << name;
    } else if (place.second == heddle::v1::TENSOR_CLASS_BUFFER) {
      const auto expected = given->buffer(*given->plan().FindBuffer(name));
      EXPECT_TRUE(std::equal(values.begin(), values.end(), expected.begin(), expected.end()))
          << what << ": " << name;
    } else {
      EXPECT_EQ(values, std::vector<float>(values.size(), 0.0f)) << what << ": " << name;
    }
  }
}

int64_t NotNearest(std::span<const uint16_t> computed, std::span<const float> masters) {
  int64_t wrong = 0;
  for (size_t i = 0; i < masters.size(); ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(masters[i]);
    const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    wrong += computed[i] == nearest ? 0 : 1;
  }
  return wrong;
}

// What a model computes with follows its masters. An update writes compute weights of offloaded
// experts and shows none: they are seen where a model sees them.
void ExpectComputeWeights(World* world, const std::string& what) {
  for (const auto& state : world->states) {
    int64_t wrong = 0;
    size_t seen = 0;
    std::map<int64_t, std::vector<float>> offloaded;  // masters by where the expert begins
    EXPECT_OK(
        state->parameters()->ForEachHeld(shard::Touch::kReadState, [&](const shard::Held& held) {
          if (held.offloaded) {
            offloaded[held.range.begin].assign(held.master.begin(), held.master.end());
            return OkStatus();
          }
          EXPECT_EQ(held.compute_bf16.size(), held.master.size());
          wrong += NotNearest(held.compute_bf16, held.master);
          return OkStatus();
        }));
    World::VisitExperts(state.get(), layers::ExpertMemory::Use::kForward, [&](size_t unit) {
      const at::Tensor weights = state->parameters()->memory().weights[unit];
      const std::vector<float>& masters =
          offloaded.at(state->parameters()->plan().units[unit].offset);
      ASSERT_EQ(weights.numel(), static_cast<int64_t>(masters.size()));
      wrong += NotNearest({static_cast<const uint16_t*>(weights.const_data_ptr()), masters.size()},
                          masters);
      ++seen;
    });
    EXPECT_EQ(seen, offloaded.size()) << what;
    EXPECT_EQ(wrong, 0) << what;
  }
}

// However a run keeps its weights, those of a folder are in it bit for bit, each on the rank that
// has it.
TEST(RunState, StartsFromAFolderInEveryLayout) {
  const checkpoint::TempDir folder;
  const heddle::v1::ModelConfig config = DividedModel();
  const auto given = WriteFolder(config, folder.path() + "/model");
  struct Layout {
    Mode mode;
    int degree;
    int ranks;
    bool offload;
    bool spill;
  };
  for (const Layout& layout : std::vector<Layout>{{Mode::kNone, 1, 1, false, false},
                                                  {Mode::kNone, 2, 2, false, false},
                                                  {Mode::kFull, 1, 3, false, false},
                                                  {Mode::kFull, 2, 4, false, false},
                                                  {Mode::kOptimizer, 2, 4, false, false},
                                                  {Mode::kNone, 1, 1, true, false},
                                                  {Mode::kNone, 2, 2, true, true},
                                                  {Mode::kFull, 2, 2, true, true}}) {
    for (const bool bf16 : {false, true}) {
      const std::string what =
          Str("mode ", static_cast<int>(layout.mode), " degree ", layout.degree, " ranks ",
              layout.ranks, " offload ", layout.offload, layout.spill, " bf16 ", bf16);
      const test::DiskDir spill;
      RunPlan plan = PlanOf(Moments::kFp32, layout.mode, optim::Algorithm::kAdamW);
      plan.precision = bf16 ? model::Precision::kBf16 : model::Precision::kFp32;
      plan.init_from = folder.path() + "/model";
      plan.shard.expert_degree = layout.degree;
      plan.shard.offload.enabled = layout.offload;
      if (layout.offload) plan.shard.offload.budget_bytes = 1 << 18;
      if (layout.spill) plan.shard.offload.spill_dir = spill.path();
      World world(plan, config, layout.ranks);
      ExpectWeightsOf(world, given.get(), what);
      world.Update(1);
      for (const auto& state : world.states) ASSERT_OK(state->Reset());
      ExpectWeightsOf(world, given.get(), what + " after a reset");
      if (bf16) ExpectComputeWeights(&world, what);
    }
  }
}

// The rank that has a damaged expert says so, by the name of the tensor.
TEST(RunState, AFolderWithAValueThatIsNotFiniteIsRefused) {
  const checkpoint::TempDir folder;
  const heddle::v1::ModelConfig config = DividedModel();
  auto store = *model::ParameterStore::Create(*model::PlanModel(config), model::Precision::kFp32);
  const std::string name = "model.layers.2.mlp.experts.5.up_proj.weight";
  store->master(*store->plan().Find(name))[17] = std::nanf("");
  hf::ExportOptions options;
  options.allow_nonfinite = true;
  ASSERT_OK(
      hf::WriteModelDir(folder.path() + "/model", config, hf::WeightsOf(store.get()), options));
  RunPlan plan = PlanOf(Moments::kFp32, Mode::kNone, optim::Algorithm::kAdamW);
  plan.init_from = folder.path() + "/model";
  plan.shard.expert_degree = 2;
  EXPECT_OK(RunState::Create(config, plan, 0, 2));
  EXPECT_STATUS(RunState::Create(config, plan, 1, 2), StatusCode::kInvalidArgument,
                name + "': element 17 is not finite");
}

// Bytes of a line of /proc/self/status.
int64_t OwnMemory(const std::string& key) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (line.rfind(key + ":", 0) == 0) return std::stoll(line.substr(key.size() + 1)) * 1024;
  }
  return 0;
}

// A hundred MiB of experts, a few of them in memory at a time: to read them takes no more than to
// draw them did, neither of malloc's memory nor of pages, those of the mapped files among them.
TEST(RunState, ReadingAFolderTakesNoMemoryOfItsSize) {
  heddle::v1::ModelConfig config = DividedModel();
  config.set_d_model(256);
  config.mutable_moe()->set_n_experts(64);
  config.mutable_moe()->set_d_expert(256);
  constexpr int64_t kModelBytes = int64_t{64} * 2 * 3 * 256 * 256 * 4;
  constexpr int64_t kMost = 16 << 20;  // a piece, the header, and what the kernel maps around
  const checkpoint::TempDir folder;
  const test::DiskDir spill;
  WriteFolder(config, folder.path() + "/model");
  RunPlan plan = PlanOf(Moments::kFp32, Mode::kNone, optim::Algorithm::kAdamW);
  plan.precision = model::Precision::kBf16;
  plan.shard.offload.enabled = true;
  plan.shard.offload.budget_bytes = 32 << 20;
  plan.shard.offload.spill_dir = spill.path();
  struct Peaks {
    int64_t allocated;
    int64_t resident;
  };
  const auto create = [&]() -> Peaks {
    malloc_trim(0);
    std::ofstream("/proc/self/clear_refs") << "5";  // VmHWM starts anew
    const int64_t before = OwnMemory("VmRSS");
    const model_test::AllocationMeter meter;
    EXPECT_OK(RunState::Create(config, plan, 0, 1));
    return {meter.peak(), OwnMemory("VmHWM") - before};
  };
  const Peaks drawn = create();
  plan.init_from = folder.path() + "/model";
  const Peaks read = create();
  std::printf("MiB beyond the run's own: %.1f of malloc, %.1f of pages; the model is %.0f\n",
              static_cast<double>(read.allocated - drawn.allocated) / (1 << 20),
              static_cast<double>(read.resident - drawn.resident) / (1 << 20),
              static_cast<double>(kModelBytes) / (1 << 20));
  EXPECT_GT(kModelBytes, 4 * kMost);
  EXPECT_LT(read.allocated - drawn.allocated, kMost);
  if (drawn.resident > kModelBytes) {
    std::printf("VmHWM cannot be started anew here: pages are not measured\n");
  } else {
    EXPECT_LT(read.resident - drawn.resident, kMost);
  }
}

// Every bf16 number is an fp32 number.
TEST(RunState, Bf16MomentsAreWidenedExactly) {
  World narrow(Moments::kBf16, Mode::kFull, 2);
  narrow.Update(1);
  const checkpoint::TempDir root;
  const StatusOr<heddle::v1::CheckpointRecord> record = narrow.Save(root.path());
  ASSERT_OK(record);
  World wide(Moments::kFp32, Mode::kOptimizer, 3);
  ASSERT_OK(wide.Load(*record, root.path()));
  const auto values = wide.Values();
  EXPECT_EQ(narrow.Values(), values);
  for (const auto& [place, moments] : values) {
    EXPECT_LT(std::count(moments.begin(), moments.end(), 0.0f), 3) << place.first;
  }
}

TEST(RunState, Fp32MomentsAreNotRoundedOnLoading) {
  World wide(Moments::kFp32, Mode::kNone, 1);
  wide.Update(1);
  const checkpoint::TempDir root;
  const StatusOr<heddle::v1::CheckpointRecord> record = wide.Save(root.path());
  ASSERT_OK(record);
  const World narrow(Moments::kBf16, Mode::kNone, 1);
  EXPECT_STATUS(narrow.Load(*record, root.path()), StatusCode::kFailedPrecondition,
                "set training.moments: fp32");
}

TEST(RunState, Bf16MomentsHalveWhatMomentsTakeInACheckpoint) {
  const auto bytes = [](Moments moments) {
    const World world(moments, Mode::kNone, 1);
    checkpoint::Snapshot snapshot;
    EXPECT_OK(world.states[0]->CopyTo(&snapshot));
    return snapshot.bytes();
  };
  EXPECT_EQ(bytes(Moments::kBf16) * 3, bytes(Moments::kFp32) * 2);
}

heddle::v1::ModelConfig ExpertModel() {
  heddle::v1::ModelConfig model = Model();
  model.set_vocab_size(300);
  model.mutable_moe()->set_n_experts(16);
  model.mutable_moe()->set_top_k(2);
  model.mutable_moe()->set_d_expert(64);
  return model;
}

// What the disk of spilled experts does is no fault of the checkpoint that is being loaded.
TEST(RunState, LostExpertsAreToldFromADamagedCheckpoint) {
  const checkpoint::TempDir root;
  const test::DiskDir spill;
  RunPlan plan = PlanOf(Moments::kFp32, Mode::kFull, optim::Algorithm::kAdamW);
  World whole(plan, ExpertModel(), 1);
  const StatusOr<heddle::v1::CheckpointRecord> record = whole.Save(root.path());
  ASSERT_OK(record);
  plan.shard.offload = {.enabled = true, .budget_bytes = 1 << 20, .spill_dir = spill.path()};
  const World good(plan, ExpertModel(), 1);
  ASSERT_OK(good.Load(*record, root.path()));
  EXPECT_OK(good.states[0]->parameters()->Healthy());
  EXPECT_EQ(good.Values(), whole.Values());
  const World bad(plan, ExpertModel(), 1);
  ASSERT_GE(FlipBits(spill.path()), 3);
  EXPECT_FALSE(bad.Load(*record, root.path()).ok());
  EXPECT_FALSE(bad.states[0]->parameters()->Healthy().ok());
  World torn(PlanOf(Moments::kFp32, Mode::kFull, optim::Algorithm::kAdamW), ExpertModel(), 1);
  heddle::v1::CheckpointRecord missing = *record;
  missing.mutable_seals(0)->mutable_files(0)->set_name("gone");
  EXPECT_FALSE(torn.Load(missing, root.path()).ok());
  EXPECT_OK(torn.states[0]->parameters()->Healthy());
}

}  // namespace
}  // namespace heddle::trainer
