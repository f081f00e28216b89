// model show, logits, recall, import, export and generate: hand over to heddle-model.
#include "cli/commands/model_program.h"
#include "cli/commands/verbs.h"

namespace heddle::cli {
namespace {

struct ModelState {
  std::string target;
  std::vector<std::string> rest;
};

// `heddle generate TARGET --prompt ...`: all words after the verb are taken unread; the first is
// the target, global options among the rest belong to this program.
Status TakeGlobals(const std::vector<std::string>& words, CommandContext* context,
                   std::vector<std::string>* rest) {
  for (size_t i = 0; i < words.size(); ++i) {
    const std::string& word = words[i];
    if ((word == "-o" || word == "--output" || word == "--coordinator") && i + 1 < words.size()) {
      const std::string& value = words[++i];
      if (word == "--coordinator") {
        context->coordinator = value;
      } else if (value == "json") {
        context->output = OutputFormat::kJson;
      } else if (value == "wide") {
        context->output = OutputFormat::kWide;
      } else if (value != "table") {
        return InvalidArgument(Str(word, " ", value, ": must be table, wide or json"));
      }
    } else {
      rest->push_back(word);
    }
  }
  return OkStatus();
}

StatusOr<int> Run(const std::string& verb, const ModelState& state, const CommandContext& given) {
  CommandContext context = given;
  std::vector<std::string> words;
  RETURN_IF_ERROR(TakeGlobals(state.rest, &context, &words));
  if (words.empty()) {
    return InvalidArgument("needs a model folder or a checkpoint (JOB@STEP)");
  }
  const std::string target = words.front();
  words.erase(words.begin());
  return RunModelProgram(context, verb, target, words);
}

Verb Make(std::vector<std::string> path, const char* doc, std::vector<PassedOption> options) {
  const std::string name = path.back();
  return MakeVerb<ModelState>(std::move(path), doc, [&](Verb* verb, ModelState* state) {
    verb->extras = &state->rest;
    verb->passed = std::move(options);
    verb->passed.push_back({"--tokenizer FILE", "tokenizer.json to use"});
    verb->passed.push_back({"--precision fp32|bf16", "precision of the weights in memory"});
    verb->run = [name, state](const CommandContext& context) { return Run(name, *state, context); };
  });
}

// Import and export are one program with one set of options.
std::vector<PassedOption> WriteOptions() {
  return {{"--out DIR", "folder to write (required)"},
          {"--allow-nonfinite", "take NaN and Inf as they are"},
          {"--dense", "drop what sparse layers add"},
          {"--seed N", "seed of what a new attention kind adds"},
          {"KEY=VALUE ...", "changes of the model: model.attention.kind=gsa"}};
}

std::vector<PassedOption> GenerateOptions() {
  return {{"--prompt TEXT", "text to continue; repeat it for a batch"},
          {"--ids 1,2,3", "token ids instead of text; repeat it for a batch"},
          {"--max-new-tokens N", "tokens to add"},
          {"--temperature T", "0: greedy"},
          {"--top-k K", "0: all"},
          {"--top-p P", "probability mass kept"},
          {"--seed N", "seed of the draws"},
          {"KEY=VALUE ...", "memory.kv_cache.quantization=fp8"}};
}

}  // namespace

// Options as model/tool/main.cc reads them; tests/cli compares the two.
std::vector<Verb> ModelVerbs() {
  return {
      Make({"model", "show"},
           "DIR|CKPT|PRESET [--lengths 2048,16384]: parameters, FLOPs, caches of a model",
           {{"--lengths N,N", "sequence lengths to compare with dense: 2048,16384"}}),
      Make({"model", "logits"}, "DIR|CKPT --input FILE --out FILE: logits of token ids",
           {{"--input FILE", "safetensors with input_ids (required)"},
            {"--out FILE", "safetensors to write (required)"}}),
      Make({"model", "recall"},
           "DIR|CKPT --data DIR [--tokens N]: attention mass on what the indexers select",
           {{"--data DIR", "packed data set (required)"},
            {"--tokens N", "tokens to measure on"},
            {"--sequence-length N", "longest document"},
            {"--seed N", "seed of the random selections"}}),
      Make({"model", "import"},
           "HF_DIR --out DIR [model.attention.kind=gsa ...] [--allow-nonfinite]: read a Hugging "
           "Face folder",
           WriteOptions()),
      Make({"model", "export"}, "DIR|CKPT --out HF_DIR [--dense]: write a Hugging Face folder",
           WriteOptions()),
      Make({"generate"},
           "DIR|CKPT --prompt TEXT|--ids 1,2,3 [--max-new-tokens N] [--temperature T] [--top-k K] "
           "[--top-p P] [--seed S] [memory.kv_cache.quantization=fp8]; repeat --prompt for a "
           "batch",
           GenerateOptions())};
}

}  // namespace heddle::cli
