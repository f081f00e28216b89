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
const std::vector<int32_t> kLengths = {1, 63, 0, 64, 65, 127, 128, 129, 300};
const std::vector<Widths> kTileWidths = {
    {4, 2, 32, 32}, {3, 3, 64, 64}, {6, 1, 96, 96}, {16, 1, 128, 128}};

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

// To the bit.
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

KeySets WithUsual(KeySets sets, int64_t usual) {
  sets.usual = usual;
  return sets;
}

#define SKIP_WITHOUT_TILES()                                             \
  if (kernels::attention::GatheredPairCost(2).forward == 0) {            \
    GTEST_SKIP() << "tiles of bf16 never pay with this instruction set"; \
  }

TEST(SetAttention, TilesTheFirstRowsOfEachDocumentByTheSettingsAlone) {
  SKIP_WITHOUT_TILES();
  std::mt19937 random(32);
  const Widths w{4, 2, 32, 32};
  const Batch batch({64, 3000, 0});
  const KeyDocuments documents = SameRows(batch.documents());
  const Inputs in = RandomInputs(w, batch.rows(), batch.rows(), at::kBFloat16, &random);
  const auto tiled = [&](const KeySets& sets, const at::Tensor& q) {
    std::vector<int32_t> lengths;
    for (const auto& rows : TiledRows(sets, documents, q, in.k, in.v).rows) {
      lengths.push_back(rows.queries.length);
      EXPECT_EQ(rows.keys.length, rows.queries.length);
    }
    return lengths;
  };
  const auto first = [](double usual) {
    return static_cast<int32_t>(kernels::attention::GatheredPairCost(2).forward * usual) / 64 * 64;
  };
  EXPECT_EQ(tiled(CausalSets(batch.documents()), in.q), (std::vector<int32_t>{64, 3000}));
  EXPECT_EQ(tiled(WindowSets(batch.documents(), {256, 0}), in.q), (std::vector<int32_t>{64, 3000}));
  for (const int64_t selected : {8, 50}) {  // what was selected does not count
    const KeySets sets = WithUsual(RandomTokens(batch, 1, selected, &random), 100);
    EXPECT_EQ(tiled(sets, in.q), (std::vector<int32_t>{64, first(100)}));
  }
  EXPECT_EQ(tiled(CausalSets(batch.documents()), in.q.to(at::kFloat)), (std::vector<int32_t>{}));
}

// Documents of which all, some or no rows are tiles, in one batch.
TEST(SetAttention, C2PackedEqualsAloneAndC5ThreadsChangeNothing) {
  std::mt19937 random(33);
  const Widths w{4, 2, 32, 32};
  const Batch batch({64, 900, 0, 130, 1});
  const int threads = at::get_num_threads();
  for (const int64_t usual : {8, 32}) {
    const KeySets sets = WithUsual(RandomTokens(batch, 2, 2 * usual, &random), usual);
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
      const Outputs alone = Chosen(w.scale(), WithUsual(Slice(sets, first, count), usual),
                                   {{{{0, count}, {0, count}}}},
                                   {part(in.q), part(in.k), part(in.v), part(in.dout)}, at::kFloat);
      ExpectSameBits(
          {part(packed.out), part(packed.lse), part(packed.dq), part(packed.dk), part(packed.dv)},
          alone, "document " + std::to_string(b));
    }
  }
}

TEST(SetAttention, C1PrefixesHaveTheSameBits) {
  std::mt19937 random(35);
  const Widths w{4, 2, 32, 32};
  const Batch batch({400});
  std::vector<NamedSets> all = SetsOf(batch, w.kv_heads, &random);
  for (NamedSets& named : all) {
    if (named.name.starts_with("tokens") || named.name == "blocks") named.sets.usual = 40;
  }
  for (const auto& [name, sets] : all) {
    const Inputs in = RandomInputs(w, 400, 400, at::kBFloat16, &random);
    const Outputs whole = Chosen(w.scale(), sets, SameRows(batch.documents()), in);
    for (const int32_t t : {1, 17, 64, 100, 128, 129, 320, 399}) {
      const auto part = [&](const at::Tensor& x) { return x.narrow(0, 0, t); };
      const Outputs prefix =
          Chosen(w.scale(), WithUsual(Slice(sets, 0, t), sets.usual), {{{{0, t}, {0, t}}}},
                 {part(in.q), part(in.k), part(in.v), part(in.dout)});
      EXPECT_TRUE(SameBits(part(whole.out), prefix.out)) << name << " t " << t;
      EXPECT_TRUE(SameBits(part(whole.lse), prefix.lse)) << name << " t " << t;
      EXPECT_TRUE(SameBits(part(whole.dq), prefix.dq)) << name << " t " << t;
    }
  }
}

// Keys of documents without queries, or that nobody sees.
TEST(SetAttention, KeysThatNobodySeesGetZeroGradients) {
  std::mt19937 random(36);
  const Widths w{4, 2, 32, 32};
  KeySets sets;  // two documents of 70 rows and 40 keys, of which 30 are seen; one of keys alone
  sets.width = INT32_MAX;
  sets.offsets = {0};
  for (int32_t row = 0; row < 140; ++row) {
    sets.first.push_back(row / 70 * 40);
    sets.offsets.push_back(row + 1);
    sets.end.push_back(row / 70 * 40 + 30);
  }
  const std::vector<int32_t> query_rows = {0, 70, 140, 140};
  const std::vector<int32_t> key_rows = {0, 40, 80, 95};
  const Inputs in = RandomInputs(w, 140, 95, at::kBFloat16, &random);
  const Outputs got = Chosen(w.scale(), sets, RowsOf(query_rows, key_rows), in);
  ExpectClose(got, Reference(w.scale(), sets, in), kTolerance, "");
  for (const auto& [first, count] : {std::pair(30, 10), {70, 10}, {80, 15}}) {
    EXPECT_EQ(got.dk.narrow(0, first, count).abs().sum().item<double>(), 0.0) << first;
    EXPECT_EQ(got.dv.narrow(0, first, count).abs().sum().item<double>(), 0.0) << first;
  }
}

// A number that is none shows in every row that sees it, whichever way.
TEST(MaskedFlash, NanShowsInTheRowsThatSeeIt) {
  std::mt19937 random(37);
  const Widths w{2, 1, 32, 32};
  const Batch batch({200});
  const KeyDocuments documents = SameRows(batch.documents());
  const KeySets sets = CausalSets(batch.documents());
  const double nan = std::numeric_limits<double>::quiet_NaN();
  for (const int which : {0, 1, 2}) {
    Inputs in = RandomInputs(w, 200, 200, at::kBFloat16, &random);
    at::Tensor row = (which == 0 ? in.q : which == 1 ? in.k : in.v).select(0, 150);
    row.fill_(nan);
    const Outputs got = Tiles(w.scale(), sets, documents, in);
    for (int64_t t = 0; t < 200; ++t) {
      if (which == 0 ? t == 150 : t >= 150) {
        EXPECT_TRUE(got.out.select(0, t).isnan().all().item<bool>()) << which << " row " << t;
      } else if (which < 2) {
        EXPECT_FALSE(got.out.select(0, t).isnan().any().item<bool>()) << which << " row " << t;
      }
    }
    EXPECT_TRUE(got.dq.select(0, 150).isnan().any().item<bool>()) << which;
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
