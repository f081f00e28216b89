// Times one attention layer, forward and backward, against LibTorch's flash attention over all
// visible keys, in turns:
//   bench_attention KIND LENGTH THREADS SECONDS
// KIND: dense, swa, nsa, gsa or dsa in the shapes of attention-and-moe.md 16.2. One document of
// LENGTH tokens, bf16, stage 2 of indexers (their loss included; gsa-no-loss, dsa-no-loss: not).
// dense and swa are cores without projections; the others are layers of model width 64, whose
// projections are a few hundredths of the whole. Prints one JSON line: seconds of every round.
#include <ATen/Parallel.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu.h>
#include <ATen/ops/_scaled_dot_product_flash_attention_for_cpu_backward.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/randn.h>
#include <c10/core/InferenceMode.h>
#include <google/protobuf/text_format.h>

#include <charconv>
#include <cmath>
#include <cstdio>
#include <ctime>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <string_view>
#include <vector>

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"
#include "model/attention/attention.h"
#include "model/attention/attention_stack.h"
#include "model/model_plan.h"
#include "model/parameter_store.h"
#include "model/store_views.h"

namespace heddle {
namespace {

constexpr int64_t kHeadDim = 128;
constexpr int64_t kKeyHeads = 2;

struct Shape {
  std::string kind;
  int64_t length = 0;
  int64_t threads = 1;
  int64_t seconds = 1;
  bool loss = true;
  int64_t query_heads() const { return kind == "nsa" ? 32 : 8; }
};

at::Tensor Random(at::IntArrayRef sizes) { return at::randn(sizes, at::kFloat).to(at::kBFloat16); }

// Of one thread the processor's time, which other programs on the machine disturb less.
double Now(const Shape& s) {
  timespec now = {};
  clock_gettime(s.threads == 1 ? CLOCK_PROCESS_CPUTIME_ID : CLOCK_MONOTONIC, &now);
  return static_cast<double>(now.tv_sec) + 1e-9 * static_cast<double>(now.tv_nsec);
}

struct Times {
  std::vector<double> forward, backward;
};

// Something with a forward and a backward on inputs of its own.
class Contender {
 public:
  virtual ~Contender() = default;
  virtual void Forward() = 0;
  virtual void Backward() = 0;
};

class Peer : public Contender {
 public:
  explicit Peer(const Shape& s)
      : q_(Random({1, s.query_heads(), s.length, kHeadDim})),
        k_(Random({1, kKeyHeads, s.length, kHeadDim})),
        v_(Random({1, kKeyHeads, s.length, kHeadDim})),
        dout_(Random({1, s.query_heads(), s.length, kHeadDim})) {}
  void Forward() override {
    std::tie(out_, lse_) =
        at::_scaled_dot_product_flash_attention_for_cpu(q_, k_, v_, 0.0, /*is_causal=*/true);
  }
  void Backward() override {
    at::_scaled_dot_product_flash_attention_for_cpu_backward(dout_, q_, k_, v_, out_, lse_, 0.0,
                                                             /*is_causal=*/true);
  }

 private:
  at::Tensor q_, k_, v_, dout_, out_, lse_;
};

class Core : public Contender {
 public:
  explicit Core(const Shape& s)
      : q_(Random({s.length, s.query_heads(), kHeadDim})),
        k_(Random({s.length, kKeyHeads, kHeadDim})),
        v_(Random({s.length, kKeyHeads, kHeadDim})),
        dout_(Random({s.length, s.query_heads(), kHeadDim})),
        out_(at::empty_like(q_)),
        dq_(at::empty_like(q_)),
        dk_(at::empty_like(k_)),
        dv_(at::empty_like(v_)) {
    const double scale = 1 / std::sqrt(static_cast<double>(kHeadDim));
    core_ = s.kind == "swa" ? attention::MakeSlidingWindow(scale, {.keys = 256, .sinks = 4})
                            : attention::MakeDense(scale);
    core_->Begin({0, static_cast<int32_t>(s.length)});
  }
  void Forward() override { core_->Forward(q_, k_, v_, out_, &saved_); }
  void Backward() override { core_->Backward(q_, k_, v_, out_, saved_, dout_, dq_, dk_, dv_); }

 private:
  at::Tensor q_, k_, v_, dout_, out_, dq_, dk_, dv_;
  std::unique_ptr<attention::AttentionCore> core_;
  attention::Saved saved_;
};

const char* AttentionOf(const std::string& kind) {
  if (kind == "nsa") {
    return "kind: ATTENTION_KIND_NSA nsa { kernel_size: 32 kernel_stride: 16 block_size: 64 "
           "topk: 8 init_blocks: 1 local_blocks: 2 window_size: 512 }";
  }
  if (kind == "gsa") {
    return "kind: ATTENTION_KIND_GSA gsa { n_indexer_heads: 4 d_indexer: 64 k_base: 256 "
           "k_min: 128 k_max: 512 }";
  }
  return "kind: ATTENTION_KIND_DSA dsa { n_indexer_heads: 4 d_indexer: 64 topk: 256 }";
}

StatusOr<v1::ModelConfig> ConfigOf(const Shape& s) {
  const std::string text = Str("vocab_size: 64 d_model: 64 n_layers: 1 n_heads: ", s.query_heads(),
                               " n_kv_heads: ", kKeyHeads, " head_dim: ", kHeadDim,
                               " d_ffn: 64 max_position_embeddings: ", s.length, " attention { ",
                               AttentionOf(s.kind), " }");
  v1::ModelConfig config;
  if (!google::protobuf::TextFormat::ParseFromString(text, &config)) return Internal(text);
  return config;
}

class Layer : public Contender {
 public:
  Layer(const Shape& s, v1::ModelConfig config, std::unique_ptr<model::ParameterStore> store)
      : config_(std::move(config)),
        store_(std::move(store)),
        storages_(model::StoragesOf(*store_)),
        stack_(config_, storages_),
        cu_{0, static_cast<int32_t>(s.length)},
        positions_(static_cast<size_t>(s.length)),
        h_(Random({s.length, 64})),
        residual_(Random({s.length, 64})),
        out_(at::empty_like(h_)),
        gradient_(Random({s.length, 64})),
        dh_(at::empty_like(h_)) {
    std::iota(positions_.begin(), positions_.end(), 0);
    documents_ = {cu_, positions_, s.length};
    step_.loss_scale = 1.0 / static_cast<double>(s.length);
    if (s.loss) step_.row_scale = step_.loss_scale;
    context_ = {.pass = layers::Pass::kTrain,
                .documents = &documents_,
                .step = &step_,
                .losses = &losses_,
                .counts = &counts_,
                .kept = &kept_,
                .scratch = &scratch_};
  }
  void Forward() override {
    kept_.Release(0);
    scratch_.Release(0);
    stack_.Begin(documents_);
    stack_.layer(0)->Forward(context_, h_, residual_, out_);
  }
  void Backward() override { stack_.layer(0)->Backward(context_, h_, gradient_, dh_); }

 private:
  const v1::ModelConfig config_;
  const std::unique_ptr<model::ParameterStore> store_;
  const std::vector<layers::LayerStorage> storages_;
  attention::AttentionStack stack_;
  const std::vector<int32_t> cu_;
  std::vector<int32_t> positions_;
  layers::Documents documents_;
  layers::StepInfo step_;
  layers::LayerLosses losses_;
  layers::LayerCounts counts_;
  layers::BufferPool kept_, scratch_;
  layers::PassContext context_;
  at::Tensor h_, residual_, out_, gradient_, dh_;
};

StatusOr<std::unique_ptr<Contender>> Make(const Shape& s) {
  if (s.kind == "dense" || s.kind == "swa") return std::make_unique<Core>(s);
  ASSIGN_OR_RETURN(v1::ModelConfig config, ConfigOf(s));
  ASSIGN_OR_RETURN(const model::ModelPlan plan, model::PlanModel(config));
  ASSIGN_OR_RETURN(std::unique_ptr<model::ParameterStore> store,
                   model::ParameterStore::Create(plan, model::Precision::kBf16));
  model::InitParameters(1, store.get());
  store->ZeroGradients();
  return std::make_unique<Layer>(s, std::move(config), std::move(store));
}

void Print(const char* name, const Times& times) {
  for (const auto& [part, values] :
       {std::pair("forward", &times.forward), std::pair("backward", &times.backward)}) {
    std::printf("%s\"%s_%s\": [", name == std::string_view("ours") && part[0] == 'f' ? "{" : ", ",
                name, part);
    for (size_t i = 0; i < values->size(); ++i) {
      std::printf("%s%.6g", i == 0 ? "" : ", ", (*values)[i]);
    }
    std::printf("]");
  }
}

Status Run(const Shape& s) {
  at::set_num_threads(static_cast<int>(s.threads));
  const c10::InferenceMode no_graph;
  ASSIGN_OR_RETURN(const std::unique_ptr<Contender> ours, Make(s));
  Peer peer(s);
  Times our_times, peer_times;
  const double end = Now(s) + static_cast<double>(s.seconds);
  // The first round makes LibTorch's primitives and fills the pools; it is not counted.
  for (int round = 0; round < 3 || Now(s) < end; ++round) {
    for (const auto& [contender, times] :
         {std::pair<Contender*, Times*>(ours.get(), &our_times), {&peer, &peer_times}}) {
      const double begin = Now(s);
      contender->Forward();
      const double between = Now(s);
      contender->Backward();
      if (round == 0) continue;
      times->forward.push_back(between - begin);
      times->backward.push_back(Now(s) - between);
    }
  }
  Print("ours", our_times);
  Print("peer", peer_times);
  std::printf("}\n");
  return OkStatus();
}

int Main(int argc, char** argv) {
  Shape s;
  int64_t* const numbers[] = {&s.length, &s.threads, &s.seconds};
  bool usable = argc == 5;
  for (int i = 2; usable && i < argc; ++i) {
    const std::string_view text = argv[i];
    usable = std::from_chars(text.data(), text.data() + text.size(), *numbers[i - 2]).ec ==
                 std::errc() &&
             *numbers[i - 2] > 0;
  }
  if (usable) s.kind = argv[1];
  if (constexpr std::string_view kEnd = "-no-loss"; s.kind.ends_with(kEnd)) {
    s.loss = false;
    s.kind.resize(s.kind.size() - kEnd.size());
  }
  const bool known =
      s.kind == "dense" || s.kind == "swa" || s.kind == "nsa" || s.kind == "gsa" || s.kind == "dsa";
  if (!known) {
    std::fprintf(stderr, "usage: bench_attention dense|swa|nsa|gsa|dsa LENGTH THREADS SECONDS\n");
    return 2;
  }
  const Status status = Run(s);
  if (!status.ok()) std::fprintf(stderr, "bench_attention: %s\n", Message(status).c_str());
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) { return heddle::Main(argc, argv); }
