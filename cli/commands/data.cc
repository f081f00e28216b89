// data prepare, inspect, sample, encode: packed data sets.
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <sstream>

#include "base/settings/json.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"
#include "cli/output/table.h"
#include "data/pack/inspect.h"
#include "data/pack/prepare.h"
#include "data/tokenizer/tokenizer.h"

namespace heddle::cli {
namespace {

using settings::JsonNumber;
using settings::JsonQuote;

struct DataState {
  std::vector<std::string> inputs;
  std::vector<std::string> extensions;
  std::string tokenizer;
  std::string out;
  std::string dir;
  std::string input;
  double eval_fraction = 0;
  int64_t threads = 0;
  int64_t documents = 3;
  int64_t seed = 0;
  bool verify = false;
};

void ShowProgress(const pack::PrepareProgress& progress) {
  fprintf(stderr, "\r%-9s %5.1f%%  %lld documents  %.1f MB/s  ETA %s   ", progress.phase.c_str(),
          progress.bytes_total > 0 ? 100.0 * static_cast<double>(progress.bytes_done) /
                                         static_cast<double>(progress.bytes_total)
                                   : 0.0,
          static_cast<long long>(progress.documents), progress.megabytes_per_second,
          FormatAge(static_cast<int64_t>(progress.eta_seconds * 1000)).c_str());
}

std::string SplitJson(const pack::SplitReport& split) {
  return Str("{\"dir\":", JsonQuote(split.dir),
             ",\"manifest_hash\":", JsonQuote(split.manifest_hash),
             ",\"documents\":", split.documents, ",\"tokens\":", split.tokens,
             ",\"bytes\":", split.text_bytes, ",\"shards\":", split.shards, "}");
}

StatusOr<int> Prepare(const DataState& state, const CommandContext& context) {
  pack::PrepareOptions options;
  options.source.inputs = state.inputs;
  options.source.extensions = state.extensions;
  options.tokenizer = state.tokenizer;
  options.out = state.out;
  options.eval_fraction = state.eval_fraction;
  options.threads = static_cast<int>(state.threads);
  options.seed = static_cast<uint64_t>(state.seed);
  if (context.terminal && !context.json()) {
    options.progress = ShowProgress;
  }
  const StatusOr<pack::PrepareReport> prepared = pack::Prepare(options);
  if (options.progress) {
    fprintf(stderr, "\n");
  }
  RETURN_IF_ERROR(prepared.status());
  const pack::PrepareReport& report = *prepared;
  if (context.json()) {
    PrintText(Str("{\"train\":", SplitJson(report.train),
                  ",\"eval\":", report.eval.dir.empty() ? "null" : SplitJson(report.eval),
                  ",\"vocab_size\":", report.vocab_size,
                  ",\"tokenizer_sha256\":", JsonQuote(report.tokenizer_sha256),
                  ",\"bytes_per_token\":", JsonNumber(report.bytes_per_token),
                  ",\"megabytes_per_second\":", JsonNumber(report.megabytes_per_second),
                  ",\"already_complete\":", report.already_complete, "}\n"));
    return 0;
  }
  PrintText(Str(report.train.dir, ": ", report.train.documents, " documents, ", report.train.tokens,
                " tokens, vocabulary ", report.vocab_size, ", ",
                FormatFixed(report.bytes_per_token, 2), " bytes a token, ",
                FormatFixed(report.megabytes_per_second, 1), " MB/s",
                report.already_complete ? " (was complete already)" : "", "\n"));
  for (const auto& [reason, count] : report.skipped) {
    PrintText(Str("  skipped ", count, " files: ", reason, "\n"));
  }
  return 0;
}

StatusOr<int> Inspect(const DataState& state, const CommandContext& context) {
  ASSIGN_OR_RETURN(const pack::InspectReport report, pack::Inspect(state.dir, state.verify));
  const pack::Manifest& manifest = report.manifest;
  if (context.json()) {
    PrintText(
        Str("{\"dir\":", JsonQuote(state.dir), ",\"manifest_hash\":", JsonQuote(manifest.hash),
            ",\"split\":", JsonQuote(manifest.split), ",\"documents\":", manifest.documents,
            ",\"tokens\":", manifest.tokens, ",\"vocab_size\":", manifest.vocab_size,
            ",\"shards\":", manifest.shards.size(), ",\"bytes_on_disk\":", report.bytes_on_disk,
            ",\"bytes_per_token\":", JsonNumber(report.bytes_per_token),
            ",\"verified\":", report.verified, "}\n"));
    return 0;
  }
  PrintText(FormatTable(
      {"DATA SET", state.dir},
      {{"manifest", manifest.hash},
       {"split", manifest.split},
       {"documents", Str(manifest.documents)},
       {"tokens", Str(manifest.tokens)},
       {"vocabulary", Str(manifest.vocab_size)},
       {"tokenizer", Str(manifest.tokenizer_sha256, report.has_tokenizer ? "" : " (file missing)")},
       {"shards", Str(manifest.shards.size())},
       {"document tokens",
        Str("min ", report.document_tokens_min, ", median ", report.document_tokens_median,
            ", p99 ", report.document_tokens_p99, ", max ", report.document_tokens_max)},
       {"bytes a token", FormatFixed(report.bytes_per_token, 3)},
       {"checksums", report.verified ? "all read and right" : "not read (--verify)"}}));
  return 0;
}

StatusOr<int> Sample(const DataState& state, const CommandContext& context) {
  ASSIGN_OR_RETURN(const std::vector<pack::SampledDocument> documents,
                   pack::Sample(state.dir, {.documents = state.documents,
                                            .seed = static_cast<uint64_t>(state.seed)}));
  for (const pack::SampledDocument& document : documents) {
    if (context.json()) {
      PrintText(
          Str("{\"document\":", document.document, ",\"text\":", JsonQuote(document.text), "}\n"));
    } else {
      PrintText(
          Str("--- document ", document.document, "\n", Printable(document.text, true), "\n"));
    }
  }
  return 0;
}

StatusOr<std::string> ReadText(const std::string& path) {
  std::error_code error;
  if (std::filesystem::exists(path, error) && !std::filesystem::is_regular_file(path, error)) {
    return InvalidArgument(Str(path, ": not a regular file"));
  }
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    return FromErrno("cannot open", path);
  }
  std::ostringstream text;
  text << file.rdbuf();
  if (file.bad()) {
    return FromErrno("cannot read", path);
  }
  return text.str();
}

StatusOr<int> Encode(const DataState& state, const CommandContext& context) {
  ASSIGN_OR_RETURN(const std::string text, ReadText(state.input));
  ASSIGN_OR_RETURN(const std::unique_ptr<tokenizer::Tokenizer> tokenizer,
                   tokenizer::Tokenizer::Load(state.tokenizer));
  ASSIGN_OR_RETURN(const std::vector<uint32_t> ids, tokenizer->Encode(text));
  std::string line = context.json() ? "{\"ids\":[" : "";
  for (size_t i = 0; i < ids.size(); ++i) {
    line += Str(i == 0 ? "" : context.json() ? "," : " ", ids[i]);
  }
  PrintText(line + (context.json() ? "]}\n" : "\n"));
  return 0;
}

template <typename Function>
Verb Make(const char* name, const char* doc, Function function,
          std::vector<Option> (*options)(DataState*)) {
  return MakeVerb<DataState>({"data", name}, doc, [=](Verb* verb, DataState* state) {
    verb->options = options(state);
    verb->run = [=](const CommandContext& context) { return function(*state, context); };
  });
}

std::vector<Option> PrepareOptions(DataState* state) {
  return {{"--input", "files and folders", &state->inputs, true},
          {"--tokenizer", "tokenizer.json, or bpe:SIZE to train one", &state->tokenizer, true},
          {"--out", "folder of the data set", &state->out, true},
          {"--extension", "of files in folders, such as .py", &state->extensions},
          {"--eval-fraction", "share of documents kept for evaluation", &state->eval_fraction},
          {"--threads", "0: all", &state->threads},
          {"--seed", "of the split", &state->seed}};
}

std::vector<Option> InspectOptions(DataState* state) {
  return {{"dir", "data set", &state->dir, true},
          {"--verify", "read and check every byte", &state->verify}};
}

std::vector<Option> SampleOptions(DataState* state) {
  return {{"dir", "data set", &state->dir, true},
          {"--documents", "how many", &state->documents},
          {"--seed", "which", &state->seed}};
}

std::vector<Option> EncodeOptions(DataState* state) {
  return {{"--tokenizer", "tokenizer.json", &state->tokenizer, true},
          {"--input", "text file", &state->input, true}};
}

}  // namespace

std::vector<Verb> DataVerbs() {
  return {Make("prepare", "read, tokenize and pack text", Prepare, PrepareOptions),
          Make("inspect", "what a data set holds", Inspect, InspectOptions),
          Make("sample", "some documents of a data set", Sample, SampleOptions),
          Make("encode", "token ids of a text file", Encode, EncodeOptions)};
}

}  // namespace heddle::cli
