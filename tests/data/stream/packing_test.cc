#include "data/stream/packing.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <map>
#include <vector>

#include "base/rng/rng.h"

namespace heddle::stream {
namespace {

TEST(PackBestFit, FillsTheTightestPlace) {
  // 6 and 5 open two sequences of 8; 3 fits the second exactly, 2 the first.
  const std::vector<Sequence> sequences = PackBestFit({{0, 2}, {1, 6}, {2, 3}, {3, 5}}, 8);
  ASSERT_EQ(sequences.size(), 2u);
  EXPECT_EQ(sequences[0][0].document, 1);
  EXPECT_EQ(sequences[0][1].document, 0);
  EXPECT_EQ(sequences[1][0].document, 3);
  EXPECT_EQ(sequences[1][1].document, 2);
}

TEST(PackBestFit, CutsLongDocumentsWithoutLosingATokenOrALabel) {
  const std::vector<Sequence> sequences = PackBestFit({{0, 20}}, 8);
  ASSERT_EQ(sequences.size(), 3u);
  EXPECT_EQ(sequences[0][0].begin, 0);
  EXPECT_EQ(sequences[1][0].begin, 8);
  EXPECT_EQ(sequences[2][0].begin, 16);
  EXPECT_EQ(sequences[2][0].length, 4);
  EXPECT_FALSE(sequences[0][0].ends_document);
  EXPECT_TRUE(sequences[2][0].ends_document);
  int64_t labels = 0;
  for (const Sequence& sequence : sequences) labels += ValidLabelsOf(sequence);
  EXPECT_EQ(labels, 19);
}

TEST(PackBestFit, PlacesEveryTokenOnceAndWastesLittle) {
  const uint64_t seed = 4;
  RngCursor random(Rng(seed, "test.pack"));
  for (int round = 0; round < 200; ++round) {
    const auto max = static_cast<int64_t>(2 + random.Below(300));
    std::vector<DocumentLength> documents;
    int64_t tokens = 0;
    for (int64_t d = 0; d < 200; ++d) {
      documents.push_back(
          {d, static_cast<int64_t>(1 + random.Below(random.Below(8) == 0 ? 2000 : 100))});
      tokens += documents.back().tokens;
    }
    const std::vector<Sequence> sequences = PackBestFit(documents, max);
    std::map<int64_t, std::vector<Piece>> by_document;
    for (const Sequence& sequence : sequences) {
      ASSERT_LE(TokensOf(sequence), max);
      for (const Piece& piece : sequence) by_document[piece.document].push_back(piece);
    }
    ASSERT_EQ(by_document.size(), documents.size());
    for (auto& [document, pieces] : by_document) {
      std::sort(pieces.begin(), pieces.end(),
                [](const Piece& a, const Piece& b) { return a.begin < b.begin; });
      int64_t at = 0;
      for (const Piece& piece : pieces) {
        ASSERT_EQ(piece.begin, at) << "seed " << seed;
        at += piece.length;
        ASSERT_EQ(piece.ends_document, at == documents[static_cast<size_t>(document)].tokens);
      }
      ASSERT_EQ(at, documents[static_cast<size_t>(document)].tokens) << "seed " << seed;
    }
    // Best fit decreasing needs at most 11/9 of the optimum, plus one.
    const auto sequences_min = (tokens + max - 1) / max;
    ASSERT_LE(static_cast<int64_t>(sequences.size()), sequences_min * 11 / 9 + 40);
  }
}

TEST(PackBestFit, NeedsEquallyManySequencesInAnyOrder) {
  RngCursor random(Rng(6, "test.pack"));
  std::vector<DocumentLength> documents;
  for (int64_t d = 0; d < 500; ++d)
    documents.push_back({d, static_cast<int64_t>(1 + random.Below(90))});
  const size_t count = PackBestFit(documents, 100).size();
  for (uint64_t seed = 0; seed < 5; ++seed) {
    Shuffle(Rng(seed, "test.order"), documents);
    EXPECT_EQ(PackBestFit(documents, 100).size(), count);
  }
}

}  // namespace
}  // namespace heddle::stream
