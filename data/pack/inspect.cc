#include "data/pack/inspect.h"

#include <algorithm>
#include <memory>
#include <utility>

#include "base/rng/rng.h"
#include "data/pack/dataset.h"
#include "data/pack/files.h"
#include "data/text/utf8.h"
#include "data/tokenizer/tokenizer.h"

namespace heddle::pack {
namespace {

std::string TokenizerPath(const std::string& dir) { return Str(dir, "/tokenizer.json"); }

}  // namespace

StatusOr<InspectReport> Inspect(const std::string& dir, bool verify) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Dataset> dataset, Dataset::Open(dir));
  if (verify) RETURN_IF_ERROR(dataset->Verify());
  InspectReport report;
  report.manifest = dataset->manifest();
  report.verified = verify;
  std::vector<int64_t> lengths;
  lengths.reserve(static_cast<size_t>(dataset->documents()));
  for (int64_t d = 0; d < dataset->documents(); ++d) lengths.push_back(dataset->DocumentLength(d));
  std::sort(lengths.begin(), lengths.end());
  if (!lengths.empty()) {
    report.document_tokens_min = lengths.front();
    report.document_tokens_median = lengths[lengths.size() / 2];
    report.document_tokens_p99 = lengths[(lengths.size() - 1) * 99 / 100];
    report.document_tokens_max = lengths.back();
  }
  if (report.manifest.tokens > 0) {
    report.bytes_per_token = static_cast<double>(report.manifest.text_bytes) /
                             static_cast<double>(report.manifest.tokens);
  }
  for (const ShardEntry& shard : report.manifest.shards) report.bytes_on_disk += shard.bytes;
  const StatusOr<std::string> tokenizer = ReadFile(TokenizerPath(dir));
  report.has_tokenizer =
      tokenizer.ok() && tokenizer::Sha256Hex(*tokenizer) == report.manifest.tokenizer_sha256;
  return report;
}

StatusOr<std::vector<SampledDocument>> Sample(const std::string& dir,
                                              const SampleOptions& options) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Dataset> dataset, Dataset::Open(dir));
  ASSIGN_OR_RETURN(const std::unique_ptr<tokenizer::Tokenizer> tokenizer,
                   tokenizer::Tokenizer::Load(TokenizerPath(dir)));
  if (tokenizer->sha256() != dataset->manifest().tokenizer_sha256) {
    return FailedPrecondition(
        Str(TokenizerPath(dir), ": not the tokenizer that the data were made with"));
  }
  std::vector<int64_t> order;
  for (int64_t d = 0; d < dataset->documents(); ++d) order.push_back(d);
  Shuffle(Rng(options.seed, "data.sample"), order);
  order.resize(
      static_cast<size_t>(std::clamp<int64_t>(options.documents, 0, dataset->documents())));
  std::vector<SampledDocument> samples;
  for (const int64_t d : order) {
    SampledDocument sample;
    sample.document = d;
    const int64_t tokens = std::min(dataset->DocumentLength(d), options.tokens_max);
    sample.ids.resize(static_cast<size_t>(std::max<int64_t>(tokens, 0)));
    RETURN_IF_ERROR(dataset->ReadTokens(d, 0, sample.ids));
    ASSIGN_OR_RETURN(const std::string bytes, tokenizer->Decode(sample.ids));
    sample.text = text::ToPrintableUtf8(bytes);
    samples.push_back(std::move(sample));
  }
  return samples;
}

}  // namespace heddle::pack
