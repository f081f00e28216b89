// heddle-model: what needs LibTorch but no cluster. `heddle` execs it for `model`, `generate` and
// `ckpt export`, with a checkpoint already resolved to its record (architecture.md P5).
//   heddle-model show|logits|recall|generate|export|import DIR | --record FILE --root DIR ... [-o
//   json]
//   heddle-model bench-host [--dir DIR] [--out FILE] [-o json]
#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <string>

#include "model/tool/verbs.h"

namespace {

using heddle::Status;
using heddle::StatusCode;

// Exit status of the contract (product.md section 4).
int ExitCode(const Status& status) {
  switch (status.code()) {
    case StatusCode::kOk:
      return 0;
    case StatusCode::kInvalidArgument:
      return 2;
    case StatusCode::kNotFound:
      return 3;
    case StatusCode::kUnavailable:
    case StatusCode::kDeadlineExceeded:
      return 4;
    case StatusCode::kPermissionDenied:
    case StatusCode::kUnauthenticated:
      return 5;
    case StatusCode::kAborted:
    case StatusCode::kAlreadyExists:
    case StatusCode::kFailedPrecondition:
      return 6;
    default:
      return 1;
  }
}

int Finish(const char* verb, const Status& status) {
  if (!status.ok()) {
    std::fprintf(stderr, "heddle: %s: %s\n", verb, heddle::Message(status).c_str());
  }
  return ExitCode(status);
}

void AddSource(CLI::App* verb, heddle::tool::SourceOptions* source) {
  verb->add_option("dir", source->dir, "Model folder");
  verb->add_option("--record", source->record, "File with a checkpoint's record");
  verb->add_option("--root", source->root, "Folder of checkpoint files");
  verb->add_option("--tokenizer", source->tokenizer, "tokenizer.json to use");
  verb->add_option("--precision", source->precision, "fp32 or bf16");
}

struct Options {
  heddle::tool::ShowOptions show;
  heddle::tool::LogitsOptions logits;
  heddle::tool::GenerateVerbOptions generate;
  heddle::tool::RecallOptions recall;
  heddle::tool::ExportVerbOptions write;
  heddle::tool::BenchHostOptions bench_host;
  std::string output = "table";
};

void AddOutput(CLI::App* verb, Options* options) {
  verb->add_option("-o,--output", options->output, "table, wide or json")
      ->check(CLI::IsMember({"table", "wide", "json"}));
}

void Declare(CLI::App* app, Options* options) {
  app->require_subcommand(1);
  CLI::App* show = app->add_subcommand("show", "Parameters, FLOPs and tensors");
  AddSource(show, &options->show.source);
  AddOutput(show, options);
  show->add_option("--lengths", options->show.lengths, "Sequence lengths 2048,16384")
      ->delimiter(',');

  CLI::App* logits = app->add_subcommand("logits", "Logits of token ids");
  AddSource(logits, &options->logits.source);
  AddOutput(logits, options);
  logits->add_option("--input", options->logits.input, "safetensors with input_ids")->required();
  logits->add_option("--out", options->logits.out, "safetensors to write")->required();

  CLI::App* generate = app->add_subcommand("generate", "Continue a prompt");
  heddle::tool::GenerateVerbOptions* g = &options->generate;
  AddSource(generate, &g->source);
  AddOutput(generate, options);
  generate->add_option("overrides", g->overrides, "memory.kv_cache.quantization=fp8 ...");
  // One value per occurrence, so that an override may follow.
  generate->add_option("--prompt", g->prompts, "Text; repeat it for a batch")
      ->allow_extra_args(false);
  generate->add_option("--ids", g->ids, "Token ids 1,2,3; repeat it for a batch")
      ->allow_extra_args(false);
  generate->add_option("--max-new-tokens", g->max_new_tokens, "Tokens to add");
  generate->add_option("--temperature", g->temperature, "0: greedy");
  generate->add_option("--top-k", g->top_k, "0: all");
  generate->add_option("--top-p", g->top_p, "Probability mass kept");
  generate->add_option("--seed", g->seed, "Seed of the draws");

  CLI::App* recall = app->add_subcommand("recall", "Attention mass on the indexers' selections");
  AddSource(recall, &options->recall.source);
  AddOutput(recall, options);
  recall->add_option("--data", options->recall.data, "Packed data set")->required();
  recall->add_option("--tokens", options->recall.tokens, "Tokens to measure on");
  recall->add_option("--sequence-length", options->recall.sequence_length, "Longest document");
  recall->add_option("--seed", options->recall.seed, "Seed of the random selections");

  CLI::App* bench = app->add_subcommand("bench-host", "Rates of this host");
  AddOutput(bench, options);
  bench->add_option("--dir", options->bench_host.dir, "Folder on the disk to measure");
  bench->add_option("--out", options->bench_host.out, "File that keeps the figures");

  for (const char* name : {"export", "import"}) {
    CLI::App* write = app->add_subcommand(name, "Write a model folder");
    AddSource(write, &options->write.source);
    AddOutput(write, options);
    write->add_option("--out", options->write.out, "Folder to write")->required();
    write->add_flag("--allow-nonfinite", options->write.source.allow_nonfinite,
                    "Take NaN and Inf as they are");
    write->add_flag("--dense", options->write.dense, "Drop what sparse layers add");
    write->add_option("--seed", options->write.seed, "Seed of what a new attention kind adds");
    write->add_option("overrides", options->write.overrides, "model.attention.kind=swa ...");
  }
}

Status Run(const CLI::App& app, Options* options) {
  const bool json = options->output == "json";
  options->show.wide = options->output == "wide";
  options->show.json = options->generate.json = options->write.json = options->recall.json =
      options->bench_host.json = json;
  if (app.got_subcommand("show")) return heddle::tool::RunShow(options->show);
  if (app.got_subcommand("logits")) return heddle::tool::RunLogits(options->logits);
  if (app.got_subcommand("generate")) return heddle::tool::RunGenerate(options->generate);
  if (app.got_subcommand("recall")) return heddle::tool::RunRecall(options->recall);
  if (app.got_subcommand("bench-host")) return heddle::tool::RunBenchHost(options->bench_host);
  return heddle::tool::RunExport(options->write);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"heddle-model: show, run, import and export models", "heddle-model"};
  Options options;
  Declare(&app, &options);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) return app.exit(error);
    std::fprintf(stderr, "heddle: usage: %s\n", error.what());
    return 2;
  }
  const char* verb = app.get_subcommands().front()->get_name().c_str();
  try {
    return Finish(verb, Run(app, &options));
  } catch (const std::exception& error) {  // LibTorch throws (S25)
    return Finish(verb, heddle::Internal(error.what()));
  }
}
