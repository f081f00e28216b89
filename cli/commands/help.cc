// help: what --help prints, of the program or of a verb.
#include <algorithm>

#include "cli/commands/parser.h"
#include "cli/commands/verbs.h"

namespace heddle::cli {
namespace {

struct HelpState {
  std::vector<std::string> words;
};

// A verb, or the first word of some.
bool IsVerb(const std::vector<Verb>& verbs, const std::vector<std::string>& words) {
  return std::any_of(verbs.begin(), verbs.end(), [&words](const Verb& verb) {
    return words.size() <= verb.path.size() &&
           std::equal(words.begin(), words.end(), verb.path.begin());
  });
}

StatusOr<int> Help(const HelpState& state, const CommandContext& context) {
  const std::vector<Verb> verbs = AllVerbs();
  std::vector<const char*> argv = {"heddle"};
  std::string all = "heddle";
  for (const std::string& word : state.words) {
    argv.push_back(word.c_str());
    all += " " + word;
  }
  if (!IsVerb(verbs, state.words)) {
    return InvalidArgument(Str("no verb `", all, "` (see heddle --help)"));
  }
  argv.push_back("--help");
  CommandContext unused = context;
  return ParseAndRun(static_cast<int>(argv.size()), argv.data(), verbs, &unused);
}

}  // namespace

std::vector<Verb> HelpVerbs() {
  return {MakeVerb<HelpState>(
      {"help"}, "of all verbs, or of one: heddle help VERB", [](Verb* verb, HelpState* state) {
        verb->options = {{"verb", "its one or two words", &state->words}};
        verb->run = [state](const CommandContext& context) { return Help(*state, context); };
      })};
}

}  // namespace heddle::cli
