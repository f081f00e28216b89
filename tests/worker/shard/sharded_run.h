// One short training run with every way to shard, accumulate and recompute, on any group of ranks,
// and what one process computes that holds everything and adds the ranks' gradients in ascending
// order (training-runtime.md 20.1). Five micro-batches, so that ranks have different numbers of
// them, or none.
#pragma once

#include <cstdint>
#include <string>
#include <tuple>
#include <vector>

#include "heddle/v1/config.pb.h"
#include "model/language_model.h"
#include "tests/model/tiny_model.h"
#include "worker/comm/communicator.h"
#include "worker/shard/parameters.h"

namespace heddle::shard {

using model::Precision;
using model::Recompute;

struct Case {
  Options options;  // rank and world are set by the run
  int world = 1;
  Recompute recompute = Recompute::kNone;
  heddle::v1::ModelConfig config = model_test::TinyConfig(model_test::Kind::kHybrid, false);
  double clip = 1e9;
  int steps = 3;
  float first_bias = 0;  // of expert 0 in the choice of every layer, at the start
};

using Values = std::vector<float>;  // masters of the whole model

struct Outcome {
  int64_t gathered_bytes = 0;
  Values masters;              // after the last step
  Values first_gradients;      // sums over ranks of step 0
  std::vector<double> losses;  // of all ranks, step by step
  std::vector<double> norms;
  Values buffers;
  offload::ResidentSetStats offload;
};

// The run of one process that plays all ranks one after the other.
Values Reference(const Case& c);

// One rank's run; writes what it holds into `out`, whose vectors are zeros for the whole model.
Status RunRank(const Case& c, comm::Communicator* group, Outcome* out);
// Zeros for every rank.
Outcome NoOutcome(const Case& c);
// What one rank holds is 0 with the others, or they all hold the same.
void Merge(const Values& from, Values* to);

double Largest(const Values& a, const Values& b);

using Parts = std::tuple<int, Mode, Accumulation, Recompute, Precision, bool>;
Case CaseOf(const Parts& parts);
std::string NameOf(const Parts& parts);
// All combinations but sync_each with whole gradients, which is refused; tied embeddings, which
// change the schedule of two units only, on two and three ranks.
std::vector<Parts> AllParts();
// Empty, or how `got` differs from what the reference allows.
std::string Difference(const Case& c, const Values& got);

}  // namespace heddle::shard
