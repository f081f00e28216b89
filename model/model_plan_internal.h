// Shared by the files of target model_plan; nobody else includes it.
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "heddle/v1/config.pb.h"
#include "model/model_plan.h"

namespace heddle::model {

// Limits of a plan, far above any known model: a configuration from the network must not make the
// coordinator build millions of names or overflow a count.
inline constexpr int64_t kTensorsMax = 262'144;
inline constexpr double kParametersMax = 9007199254740992.0;  // 2^53: exact in JSON and in double

struct Init {
  InitKind kind = InitKind::kNormal;
  double value = 0.0;  // TensorSpec::init_value
};
Init Constant(double value);
// Xavier-uniform with LibTorch's fans: for [a, b, c..] fan_in = b c.., fan_out = a c..
Init Xavier(const std::vector<int64_t>& shape, double gain);
// LibTorch's default of a linear layer, weight or bias: U(+-1/sqrt(inputs)).
Init TorchLinear(int64_t inputs);

struct Placement {
  bool joined = false;   // follows the previous tensor without a gap (ModelPlan invariant 2)
  bool indexer = false;  // TensorSpec::indexer
  bool trained = true;   // false: no loss of any stage gives it a gradient
};

// Appends tensors to a plan while keeping the layout invariants.
class PlanBuilder {
 public:
  explicit PlanBuilder(const heddle::v1::ModelConfig& config) : config_(config) {}

  void BeginUnit(const std::string& name);
  void Add(const std::string& name, std::vector<int64_t> shape, Init init,
           Placement placement = {});
  // The units so far are all but the experts.
  void EndDense() { plan_.dense_units = static_cast<int>(plan_.units.size()); }
  // The units from here on are these experts of `layer`.
  void BeginExperts(int layer, ExpertRange experts) {
    plan_.experts = experts;
    plan_.expert_layers.push_back(layer);
  }
  void AddBuffer(const std::string& name, std::vector<int64_t> shape);
  // INVALID_ARGUMENT if the model has more than kParametersMax parameters.
  StatusOr<ModelPlan> Finish();

 private:
  void Align();

  const heddle::v1::ModelConfig& config_;
  ModelPlan plan_;
  double total_ = 0;
};

// Gain, and what the other forms add, of a norm over `width` values named `name`.
void AddNorm(const heddle::v1::ModelConfig& config, const std::string& name, PlanBuilder* plan);
// All tensors and buffers of one block but its experts.
void AddBlock(const heddle::v1::ModelConfig& config, int layer, PlanBuilder* plan);
void AddExpert(const heddle::v1::ModelConfig& config, int layer, int64_t expert, PlanBuilder* plan);

// Every problem, "model.key: rule".
std::vector<std::string> ModelProblems(const heddle::v1::ModelConfig& config);

bool UsesKind(const heddle::v1::ModelConfig& config, heddle::v1::AttentionKind kind);
// Whether dsa layers select rows of an MLA latent.
bool DsaOnLatent(const heddle::v1::ModelConfig& config);

// ---- memory (model_memory.cc) ----

// Bytes that the forward of one token of a document of `length` writes for the backward, logits
// included, in all layers; `element` bytes of the compute type.
double KeptBytesPerToken(const heddle::v1::ModelConfig& model, int64_t element, int64_t length);

// Ranks that share the experts of a layer: parallel.expert.
int64_t ExpertDegree(const heddle::v1::ParallelConfig& parallel);
// A unit, or the experts of one layer that a rank holds, and the ranks over which it is divided:
// all, or those that hold the same experts (training-runtime.md 10.1).
struct MeshUnit {
  UnitSpec unit;
  int64_t ranks = 1;
};
// Of rank 0: dense units, then experts. Empty for a model that PlanModel refuses.
std::vector<MeshUnit> MeshOf(const heddle::v1::ModelConfig& model,
                             const heddle::v1::ParallelConfig& parallel);

// EstimateMemory, of everything or of all but the experts' weights, gradients and states.
MemoryEstimate EstimateMemoryApart(const heddle::v1::ModelConfig& model,
                                   const heddle::v1::TrainingConfig& training,
                                   const heddle::v1::ParallelConfig& parallel, bool experts_apart);

}  // namespace heddle::model
