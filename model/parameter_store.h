// The flat buffers of a model: fp32 master weights, the bf16 compute copy and fp32 gradients, all
// with the layout of ModelPlan, and the fp32 state that no gradient changes. The optimizer works on
// whole ranges of them, the language model reads views. Torch-free and free of threads of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "base/status/status.h"
#include "model/model_plan.h"

namespace heddle::model {

enum class Precision {
  kFp32,  // compute weights are the master weights
  kBf16,  // bf16 compute copy of fp32 master weights
  kFp64   // reference precision of the tests: master, compute and gradients are double
};

class ParameterStore {
 public:
  // RESOURCE_EXHAUSTED if the buffers cannot be had. All values start as zero.
  static StatusOr<std::unique_ptr<ParameterStore>> Create(ModelPlan plan, Precision precision);
  ~ParameterStore();
  ParameterStore(const ParameterStore&) = delete;
  ParameterStore& operator=(const ParameterStore&) = delete;

  const ModelPlan& plan() const { return plan_; }
  Precision precision() const { return precision_; }

  // [plan().flat_elements], 128-byte aligned, padding stays zero. REQUIRES: not kFp64.
  std::span<float> master();
  std::span<const float> master() const;
  std::span<float> gradients();

  // bf16 compute weights as raw bits, empty unless kBf16. The optimizer writes them together with
  // the master weights; whoever changes master() otherwise calls RefreshComputeWeights().
  std::span<uint16_t> compute_bf16();

  // Range of one tensor in master(). REQUIRES: tensor belongs to plan().
  std::span<float> master(const TensorSpec& tensor);

  // State of ModelPlan::buffers, [plan().buffer_elements] fp32 in every precision.
  std::span<float> buffers();
  std::span<const float> buffers() const;
  // Range of one buffer. REQUIRES: buffer belongs to plan().buffers.
  std::span<float> buffer(const TensorSpec& buffer);

  void ZeroGradients();
  // master -> compute weights, round to nearest even. No effect unless kBf16.
  void RefreshComputeWeights();

  // Untyped access for views: the buffer the forward reads, and the gradient buffer.
  void* compute_data();
  void* gradient_data();
  void* master_data();

 private:
  ParameterStore(ModelPlan plan, Precision precision);

  struct Buffer;
  ModelPlan plan_;
  Precision precision_;
  std::unique_ptr<Buffer> master_;
  std::unique_ptr<Buffer> compute_;
  std::unique_ptr<Buffer> gradients_;
  std::unique_ptr<Buffer> buffers_;
};

// Fills the master weights (and the compute copy) and zeroes the buffers. Every value is a pure
// function of (seed, tensor name, element index): independent of ranks, threads and layout
// (training-runtime.md 13.1).
void InitParameters(uint64_t seed, ParameterStore* store);
// One tensor of the master weights in the same way; the compute copy is the caller's. REQUIRES: not
// kFp64, `tensor` belongs to the store's plan.
void InitTensor(uint64_t seed, const TensorSpec& tensor, ParameterStore* store);
// Elements [first, first + out.size()) of one tensor.
void InitRange(uint64_t seed, const TensorSpec& tensor, int64_t first, std::span<float> out);

}  // namespace heddle::model
