// How long an optimizer step takes, from the configuration and figures of the host: the throughput
// of `heddle plan` (training-runtime.md section 4). Torch-free; of target model_plan.
#pragma once

#include <cstdint>
#include <string>

namespace heddle::v1 {
class RunConfig;
}  // namespace heddle::v1

namespace heddle::model {

// Rates a second; 0: unknown.
struct HostFigures {
  // What a rank sustains in training, all overhead included, and what it sends in one direction:
  // said by the user, and then taken instead of what follows.
  double matmul_flops = 0;
  double link_bytes = 0;
  // Measured by `heddle bench-host` with `threads` threads, the whole host.
  int64_t threads = 0;
  double bf16_flops = 0;  // of a large product
  double fp32_flops = 0;
  double dram_bytes = 0;         // read and written in place
  double dram_thread_bytes = 0;  // by one thread
  double update_bytes = 0;       // that an AdamW moves
  double exchange_bytes = 0;     // that one of two ranks sends over shared memory
  double disk_read_bytes = 0;
  double disk_write_bytes = 0;
};

struct StepEstimate {
  int64_t tokens = 0;              // of all ranks, documents as long as the sequence
  double flops_per_token = 0;      // recomputation included
  double communication_bytes = 0;  // that a rank sends in a step
  double disk_read_bytes = 0;      // by a rank in a step
  double disk_written_bytes = 0;
  // Masters and moments of spilled experts that a rank copies to the disk in a save, and the time
  // that training waits for it; 0 where nothing is spilled, the time also without figures.
  double snapshot_bytes = 0;
  double snapshot_seconds = 0;
  double micro_batch_tokens = 0;  // of a rank
  double tokens_per_expert = 0;   // a visit; 0 without experts

  // Seconds; 0 where a figure is missing.
  double compute_seconds = 0;
  double communication_seconds = 0;
  double optimizer_seconds = 0;
  double disk_seconds = 0;  // reading and writing, side by side
  // Of communication and disk, what no computation hides.
  double exposed_seconds = 0;
  double step_seconds = 0;
  double tokens_per_second = 0;
  // Formulas (1) and (6): tokens per rank and micro-batch that hide the collectives of
  // parallel.shard=full, tokens per expert and step that hide spilling. 0: does not apply.
  double tokens_that_hide_collectives = 0;
  double tokens_that_hide_disk = 0;
  // The largest of compute, communication, host memory (the optimizer) and disk; empty where a
  // figure is missing.
  std::string bound;
  std::string missing;  // which figure, and how to give it; empty where none is
};
// The model of efficiency, for one rank on a CPU:
//   compute   = (product FLOPs + expert FLOPs / kExpertShare) / R + core FLOPs / (kCoreShare R)
//               + kPasses kept bytes / BW
//     R the rate of a large product in the compute type, BW the memory's bandwidth, kept bytes the
//     activations that the forward keeps for the backward. The last term stands for everything that
//     is no product: norms, activation functions, softmax, copies, and the loss of products
//     narrower than the measured one.
//   optimizer = bytes of formula (4), and of the gradients' norm and clearing, / BW
//   disk      = formula (6), for the part of the experts beyond the resident set, with their
//               gradients
//   rows      = tokens sent to the ranks of their experts and back, which a layer waits for
//   step      = max(compute, collectives under sharding, spilled weights) + rows
//             + collectives without sharding + max(optimizer, spilled states)
// kCoreShare and kPasses were fitted to dense models of 5M and 30M parameters at 512 and 2048
// tokens in bf16 and fp32, to within 15 %, kExpertShare to three small mixtures (step_estimate.cc).
// Kinds that select keys, whose kernels gather, are slower than it says.
//
// Formulas (1), (2), (4) and (6). Sharded gathers and reductions run beside the computation: the
// longer one counts; an all-reduce of whole gradients comes after it.
StepEstimate EstimateStep(const heddle::v1::RunConfig& config, const HostFigures& host);

}  // namespace heddle::model
