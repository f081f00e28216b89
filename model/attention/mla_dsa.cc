// DSA on MLA: the core of an MLA layer whose heads all attend to the keys that the indexer selects.
#include <utility>

#include "base/status/status.h"
#include "model/attention/dsa_indexer.h"
#include "model/attention/mla_core.h"
#include "model/attention/mla_layer.h"
#include "model/attention/sparse_attention.h"

namespace heddle::attention {
namespace {

class SelectedMlaCore : public MlaCore {
 public:
  SelectedMlaCore(const MlaShape& shape, std::unique_ptr<TokenIndexer> indexer)
      : shape_(shape), indexer_(std::move(indexer)) {}

  int64_t KeyWidth(at::ScalarType /*type*/) const override { return shape_.key(); }
  int64_t ValueWidth(at::ScalarType /*type*/) const override { return shape_.value; }
  void Begin(const layers::Documents& documents) override { documents_ = SameRows(documents); }

  void Forward(const MlaInputs& inputs, const MlaHeads& heads) override {
    const layers::PassContext& context = *inputs.context;
    const int64_t n = heads.q_NHK.size(0);
    if (n == 0) return;
    const bool keep = layers::Keeps(context.pass);
    const at::ScalarType type = heads.q_NHK.scalar_type();
    const at::ScalarType statistics = type == at::kDouble ? at::kDouble : at::kFloat;
    const std::shared_ptr<const Selection> selection =
        indexer_->Select(context, inputs.indexer_u_NU, inputs.h_ND);
    const at::Tensor lse =
        (keep ? context.kept : context.scratch)->Take({n, shape_.heads}, statistics);
    SparseAttention(shape_.scale, selection->sets, heads.q_NHK, heads.k_NHK, heads.v_NHE,
                    heads.out_NHE, lse);
    indexer_->Train(context, *selection, {heads.q_NHK, heads.k_NHK, lse, shape_.scale});
    if (!keep) return;
    selection_ = selection;
    lse_NH_ = lse;
  }

  void Backward(const MlaInputs& inputs, const MlaHeads& heads, const MlaHeads& d) override {
    if (heads.q_NHK.size(0) == 0) return;
    HEDDLE_CHECK(selection_ != nullptr, "no forward that keeps precedes");
    SparseAttentionBackward(shape_.scale, selection_->sets, documents_, heads.q_NHK, heads.k_NHK,
                            heads.v_NHE, heads.out_NHE, lse_NH_, d.out_NHE, d.q_NHK, d.k_NHK,
                            d.v_NHE);
    indexer_->Backward(*inputs.context, inputs.indexer_u_NU, inputs.h_ND);
    selection_.reset();
  }

  const Selection* selection() const override { return selection_.get(); }

 private:
  MlaShape shape_;
  std::unique_ptr<TokenIndexer> indexer_;
  KeyDocuments documents_;
  // From a forward that keeps to its backward.
  std::shared_ptr<const Selection> selection_;
  at::Tensor lse_NH_;
};

}  // namespace

std::unique_ptr<MlaSublayer> MakeDsaMla(const heddle::v1::ModelConfig& config,
                                        const layers::LayerStorage& storage, layers::RopeSet* ropes,
                                        SharedSelection* shared) {
  MlaProjection projection(config, storage, ropes);
  const MlaShape shape = projection.shape();
  auto indexer = std::make_unique<DsaIndexer>(config, storage, ropes, shape.rotary, shared);
  return MakeMlaLayer(std::move(projection),
                      std::make_unique<SelectedMlaCore>(shape, std::move(indexer)));
}

}  // namespace heddle::attention
