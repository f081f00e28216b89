// Attention over key sets as masked dense tiles, and the choice between them and gathering.
#include "model/attention/set_attention.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kernels/attention/params.h"
#include "model/attention/flash.h"
#include "model/attention/sparse_attention.h"
#include "tests/model/attention/sets_harness.h"

namespace heddle::attention {
namespace {

// NOLINTNEXTLINE: all of them
using namespace sets_test;

// What tiles round: inputs, probabilities and scores' gradients to bf16, relative to the largest.
constexpr double kTolerance = 0.02;

Outputs Blanks(const Inputs& in, at::ScalarType gradients) {
  return {Blank(in.dout.sizes(), at::kBFloat16), Blank({in.q.size(0), in.q.size(1)}, at::kFloat),
          Blank(in.q.sizes(), gradients), Blank(in.k.sizes(), gradients),
          Blank(in.v.sizes(), gradients)};
}

Outputs Tiles(double scale, const KeySets& sets, const KeyDocuments& documents, const Inputs& in,
              at::ScalarType gradients = at::kBFloat16) {
  const Outputs o = Blanks(in, gradients);
  const MaskedFlash flash(scale, &sets, documents.rows);
  flash.Forward(in.q, in.k, in.v, o.out, o.lse);
  flash.Backward(in.q, in.k, in.v, o.out, o.lse, in.dout, o.dq, o.dk, o.dv);
  return o;
}

Outputs Chosen(double scale, const KeySets& sets, const KeyDocuments& documents, const Inputs& in,
               at::ScalarType gradients = at::kBFloat16) {
  const Outputs o = Blanks(in, gradients);
  SetAttention(scale, sets, documents, in.q, in.k, in.v, o.out, o.lse);
  SetAttentionBackward(scale, sets, documents, in.q, in.k, in.v, o.out, o.lse, in.dout, o.dq, o.dk,
                       o.dv);
  return o;
}

// Documents around tiles of 64 queries and blocks of 128 keys.
const std::vector<int32_t> kLengths = {1, 63, 0, 64, 65, 128, 131, 300};
const std::vector<Widths> kTileWidths = {{4, 2, 32, 32}, {3, 3, 64, 64}, {6, 1, 96, 96}};

TEST(MaskedFlash, EqualsTheReferenceOnPackedDocuments) {
  unsigned seed = 20;
  for (const Widths& w : kTileWidths) {
    std::mt19937 random(seed++);
    const Batch batch(kLengths);
    const KeyDocuments documents = SameRows(batch.documents());
    const Inputs in = RandomInputs(w, batch.rows(), batch.rows(), at::kBFloat16, &random);
    for (const auto& [name, sets] : SetsOf(batch, w.kv_heads, &random)) {
      const Outputs reference = Reference(w.scale(), sets, in);
      KeyDocuments some;  // tiles want keys
      for (const KeyDocuments::Rows& rows : documents.rows) {
        if (rows.keys.length > 0) some.rows.push_back(rows);
      }
      for (const at::ScalarType gradients : {at::kBFloat16, at::kFloat}) {
        const Outputs got = Tiles(w.scale(), sets, some, in, gradients);
        ExpectClose(got, reference, kTolerance, name);
      }
    }
  }
}

// Rows that see nothing, and key documents of other lengths than the queries'.
TEST(MaskedFlash, EmptySetsGiveZeroAndMinusInfinity) {
  std::mt19937 random(30);
  const Widths w{4, 2, 32, 32};
  const std::vector<int32_t> query_rows = {0, 100, 200};
  const std::vector<int32_t> key_rows = {0, 40, 90};
  KeySets sets;
  sets.width = INT32_MAX;
  sets.offsets = {0};
  for (int32_t row = 0; row < 200; ++row) {
    const int32_t start = key_rows[static_cast<size_t>(row / 100)];
    const int32_t visible = row % 100 < 70 ? 0 : row % 100 - 69;
    if (visible > 0) sets.first.push_back(start);
    sets.offsets.push_back(static_cast<int64_t>(sets.first.size()));
    sets.end.push_back(start + visible);
  }
  const Inputs in = RandomInputs(w, 200, 90, at::kBFloat16, &random);
  const Outputs got = Tiles(w.scale(), sets, RowsOf(query_rows, key_rows), in);
  ExpectClose(got, Reference(w.scale(), sets, in), kTolerance, "compressed");
  EXPECT_EQ(ToVector(got.lse)[0], -kInfinity);
  EXPECT_EQ(ToVector(got.out)[0], 0.0);
}

// A hidden key does not spread even a NaN; a visible one does, to exactly its rows.
TEST(MaskedFlash, C7AKeyReachesExactlyTheRowsThatHoldIt) {
  std::mt19937 random(31);
  const Widths w{2, 1, 32, 32};
  const Batch batch({200});
  const KeyDocuments documents = SameRows(batch.documents());
  constexpr int32_t kKey = 20;
  for (const auto& [name, sets] : SetsOf(batch, 1, &random)) {
    const Inputs in = RandomInputs(w, 200, 200, at::kBFloat16, &random);
    const Outputs before = Tiles(w.scale(), sets, documents, in);
    Inputs changed = in;
    changed.k = in.k.clone();
    changed.v = in.v.clone();
    at::Tensor row = changed.k.select(0, kKey);
    row.fill_(3);
    row = changed.v.select(0, kKey);
    row.fill_(100);
    const Outputs after = Tiles(w.scale(), sets, documents, changed);
    for (int64_t t = 0; t < 200; ++t) {
      bool holds = false;
      for (int64_t i = sets.offsets[static_cast<size_t>(t)];
           i < sets.offsets[static_cast<size_t>(t) + 1]; ++i) {
        const int32_t first = sets.first[static_cast<size_t>(i)];
        holds = holds || (first <= kKey && kKey - first < sets.width &&
                          kKey < sets.end[static_cast<size_t>(t)]);
      }
      EXPECT_EQ(SameBits(before.out.select(0, t), after.out.select(0, t)), !holds)
          << name << " row " << t;
    }
  }
}

TEST(SetAttention, ChoosesTilesForDenseSetsAndGathersSparseOnes) {
  if (kernels::attention::GatheredPairCost() == 0) {
    GTEST_SKIP() << "tiles of bf16 never pay with this instruction set";
  }
  std::mt19937 random(32);
  const Widths w{2, 1, 32, 32};
  const Batch batch({64, 2000, 0});
  const KeyDocuments documents = SameRows(batch.documents());
  const Inputs in = RandomInputs(w, batch.rows(), batch.rows(), at::kBFloat16, &random);
  const auto tiled = [&](const KeySets& sets, const at::Tensor& q) {
    std::vector<int32_t> lengths;
    for (const auto& rows : TiledDocuments(sets, documents, q, in.v).rows) {
      lengths.push_back(rows.queries.length);
    }
    return lengths;
  };
  EXPECT_EQ(tiled(CausalSets(batch.documents()), in.q), (std::vector<int32_t>{64, 2000}));
  EXPECT_EQ(tiled(WindowSets(batch.documents(), {256, 0}), in.q), (std::vector<int32_t>{64, 2000}));
  EXPECT_EQ(tiled(RandomTokens(batch, 1, 1, &random), in.q), (std::vector<int32_t>{}));
  EXPECT_EQ(tiled(RandomTokens(batch, 1, 32, &random), in.q), (std::vector<int32_t>{64}));
  EXPECT_EQ(tiled(CausalSets(batch.documents()), in.q.to(at::kFloat)), (std::vector<int32_t>{}));
}

// Documents that go different ways in one batch.
TEST(SetAttention, C2PackedEqualsAloneAndC5ThreadsChangeNothing) {
  std::mt19937 random(33);
  const Widths w{4, 2, 32, 32};
  const Batch batch({64, 900, 0, 130, 1});
  const int threads = at::get_num_threads();
  for (const int64_t k : {8, 32}) {
    const KeySets sets = RandomTokens(batch, 2, k, &random);
    const Inputs in = RandomInputs(w, batch.rows(), batch.rows(), at::kBFloat16, &random);
    const KeyDocuments documents = SameRows(batch.documents());
    at::set_num_threads(1);
    const Outputs packed = Chosen(w.scale(), sets, documents, in, at::kFloat);
    at::set_num_threads(3);
    ExpectSameBits(Chosen(w.scale(), sets, documents, in, at::kFloat), packed, "three threads");
    at::set_num_threads(threads);
    ExpectClose(packed, Reference(w.scale(), sets, in), kTolerance, "packed");
    for (size_t b = 0; b + 1 < batch.cu.size(); ++b) {
      const int32_t first = batch.cu[b];
      const int32_t count = batch.cu[b + 1] - first;
      const auto part = [&](const at::Tensor& t) { return t.narrow(0, first, count); };
      const Outputs alone =
          Chosen(w.scale(), Slice(sets, first, count), {{{{0, count}, {0, count}}}},
                 {part(in.q), part(in.k), part(in.v), part(in.dout)}, at::kFloat);
      ExpectSameBits(
          {part(packed.out), part(packed.lse), part(packed.dq), part(packed.dk), part(packed.dv)},
          alone, "document " + std::to_string(b));
    }
  }
}

// Slices of one projection buffer, as layers have them.
TEST(SetAttention, K4StridedRowsGiveTheBitsOfContiguousOnes) {
  std::mt19937 random(34);
  const Widths w{4, 2, 32, 32};
  const Batch batch({150});
  const KeyDocuments documents = SameRows(batch.documents());
  for (const auto& [name, sets] : SetsOf(batch, w.kv_heads, &random)) {
    const Inputs in = RandomInputs(w, 150, 150, at::kBFloat16, &random);
    const Outputs dense = Chosen(w.scale(), sets, documents, in);
    const at::Tensor joined = Blank({150, 8, 32}, at::kBFloat16);
    const auto place = [&](const at::Tensor& from, int64_t head) {
      at::Tensor to = joined.narrow(1, head, from.size(1));
      to.copy_(from);
      return to;
    };
    const Inputs strided = {place(in.q, 0), place(in.k, 4), place(in.v, 6), in.dout};
    const at::Tensor gradients = Blank({150, 8, 32}, at::kBFloat16);
    const Outputs o = {Blank(in.dout.sizes(), at::kBFloat16), Blank({150, 4}, at::kFloat),
                       gradients.narrow(1, 0, 4), gradients.narrow(1, 4, 2),
                       gradients.narrow(1, 6, 2)};
    SetAttention(w.scale(), sets, documents, strided.q, strided.k, strided.v, o.out, o.lse);
    SetAttentionBackward(w.scale(), sets, documents, strided.q, strided.k, strided.v, o.out, o.lse,
                         in.dout, o.dq, o.dk, o.dv);
    ExpectSameBits(o, dense, name);
  }
}

}  // namespace
}  // namespace heddle::attention
