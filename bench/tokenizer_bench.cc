// Times tokenizer training and encoding on one thread: bench_tokenizer train SIZE OUT INPUT..., or
// bench_tokenizer encode TOKENIZER INPUT.... Prints one JSON line. The peer is
// bench/peers/tokenizers_encode.py.
#include <chrono>
#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

#include "data/text/document_source.h"
#include "data/tokenizer/bpe_trainer.h"
#include "data/tokenizer/tokenizer.h"

namespace heddle {
namespace {

double SecondsSince(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

StatusOr<std::vector<std::string>> ReadDocuments(const std::vector<std::string>& inputs) {
  text::SourceOptions options;
  options.inputs = inputs;
  ASSIGN_OR_RETURN(const text::SourceListing listing, text::ListFiles(options));
  text::DocumentReader reader(listing, options);
  std::vector<std::string> documents;
  while (true) {
    ASSIGN_OR_RETURN(std::optional<text::Document> document, reader.Next());
    if (!document.has_value()) return documents;
    documents.push_back(std::move(document->text));
  }
}

Status Train(uint32_t size, const std::string& out, const std::vector<std::string>& documents) {
  tokenizer::BpeTrainerOptions options;
  options.vocab_size = size;
  ASSIGN_OR_RETURN(std::unique_ptr<tokenizer::BpeTrainer> trainer,
                   tokenizer::BpeTrainer::Create(options));
  const auto start = std::chrono::steady_clock::now();
  for (const std::string& document : documents) RETURN_IF_ERROR(trainer->Add(document));
  const double count_seconds = SecondsSince(start);
  ASSIGN_OR_RETURN(const std::string json, trainer->Finish({}));
  std::ofstream(out, std::ios::binary) << json;
  std::printf("{\"count_seconds\":%.3f,\"seconds\":%.3f}\n", count_seconds, SecondsSince(start));
  return OkStatus();
}

Status Encode(const std::string& path, const std::vector<std::string>& documents) {
  ASSIGN_OR_RETURN(std::unique_ptr<tokenizer::Tokenizer> tokenizer,
                   tokenizer::Tokenizer::Load(path));
  tokenizer::Encoder encoder(*tokenizer);
  std::vector<uint32_t> ids;
  size_t bytes = 0;
  size_t tokens = 0;
  const auto start = std::chrono::steady_clock::now();
  for (const std::string& document : documents) {
    ids.clear();
    RETURN_IF_ERROR(encoder.Encode(document, {}, &ids));
    bytes += document.size();
    tokens += ids.size();
  }
  const double seconds = SecondsSince(start);
  std::printf("{\"bytes\":%zu,\"tokens\":%zu,\"seconds\":%.4f,\"mb_per_second\":%.2f}\n", bytes,
              tokens, seconds, static_cast<double>(bytes) / 1e6 / seconds);
  return OkStatus();
}

Status Run(const std::vector<std::string>& args) {
  if (args.size() >= 4 && args[0] == "train") {
    ASSIGN_OR_RETURN(const uint32_t size, tokenizer::ParseBpeSpec("bpe:" + args[1]));
    ASSIGN_OR_RETURN(const std::vector<std::string> documents,
                     ReadDocuments({args.begin() + 3, args.end()}));
    return Train(size, args[2], documents);
  }
  if (args.size() >= 3 && args[0] == "encode") {
    ASSIGN_OR_RETURN(const std::vector<std::string> documents,
                     ReadDocuments({args.begin() + 2, args.end()}));
    return Encode(args[1], documents);
  }
  return InvalidArgument(
      "usage: bench_tokenizer train SIZE OUT INPUT... | encode TOKENIZER INPUT...");
}

}  // namespace
}  // namespace heddle

int main(int argc, char** argv) {
  const heddle::Status status = heddle::Run({argv + 1, argv + argc});
  if (!status.ok()) std::fprintf(stderr, "%s\n", heddle::Message(status).c_str());
  return status.ok() ? 0 : 1;
}
