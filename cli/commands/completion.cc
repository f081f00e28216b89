// completion bash|zsh|fish: a script made from the list of verbs and the keys of the configuration.
#include "base/settings/explain.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"

namespace heddle::cli {
namespace {

struct CompletionState {
  std::string shell;
};

constexpr const char* kGlobals = "-o --output --coordinator --timeout --help";

// The dashed names of an option list: "-f --follow --tail".
std::string Flags(const Verb& verb) {
  std::string out;
  for (const Option& option : verb.options) {
    std::string names = option.names;
    for (char& c : names) {
      c = c == ',' ? ' ' : c;
    }
    out += !names.empty() && names[0] == '-' ? names + " " : "";
  }
  for (const PassedOption& option : verb.passed) {
    out += option.names[0] == '-' ? option.names.substr(0, option.names.find(' ')) + " " : "";
  }
  return out + kGlobals;
}

bool TakesOverrides(const Verb& verb) {
  for (const Option& option : verb.options) {
    if (option.names == "overrides") {
      return true;
    }
  }
  return false;
}

std::string Keys() {
  std::string out;
  for (const settings::KeyInfo& key : settings::AllKeys()) {
    out += key.is_group ? "" : (out.empty() ? "" : " ") + key.key + "=";
  }
  return out;
}

// The first words, each once, and the second words of `first`.
std::string FirstWords(const std::vector<Verb>& verbs) {
  std::string out;
  std::string last;
  for (const Verb& verb : verbs) {
    out += verb.path[0] == last ? "" : (out.empty() ? "" : " ") + verb.path[0];
    last = verb.path[0];
  }
  return out;
}

std::string SecondWords(const std::vector<Verb>& verbs, const std::string& first) {
  std::string out;
  for (const Verb& verb : verbs) {
    if (verb.path.size() == 2 && verb.path[0] == first) {
      out += (out.empty() ? "" : " ") + verb.path[1];
    }
  }
  return out;
}

std::string BashScript(const std::vector<Verb>& verbs) {
  std::string out =
      Str("_heddle() {\n"
          "  local cur=\"${COMP_WORDS[COMP_CWORD]}\" words=\"\" keys=\"\"\n"
          "  if [ \"$COMP_CWORD\" -eq 1 ]; then\n    words=\"",
          FirstWords(verbs), "\"\n  else\n    case \"${COMP_WORDS[1]} ${COMP_WORDS[2]}\" in\n");
  std::string groups;
  for (const Verb& verb : verbs) {
    const bool pair = verb.path.size() == 2;
    const std::string pattern =
        pair ? Str("\"", verb.path[0], " ", verb.path[1], "\"") : Str("\"", verb.path[0], " \"*");
    out += Str("      ", pattern, ") words=\"", Flags(verb), "\"",
               TakesOverrides(verb) ? "; keys=1" : "", " ;;\n");
    const std::string group = Str("      \"", verb.path[0], " \"*) words=\"",
                                  SecondWords(verbs, verb.path[0]), "\" ;;\n");
    if (pair && groups.find(group) == std::string::npos) {
      groups += group;
    }
  }
  return out + groups +
         Str("    esac\n  fi\n"
             "  if [ -n \"$keys\" ] && [ \"${cur#-}\" = \"$cur\" ]; then\n"
             "    words=\"$words ",
             Keys(),
             "\"\n    compopt -o nospace 2>/dev/null\n  fi\n"
             "  COMPREPLY=($(compgen -W \"$words\" -- \"$cur\"))\n"
             "}\n"
             "complete -o default -F _heddle heddle\n");
}

std::string FishScript(const std::vector<Verb>& verbs) {
  std::string out = "complete -c heddle -f\n";
  std::string first;
  for (const Verb& verb : verbs) {
    if (verb.path.size() == 2) {
      out += Str("complete -c heddle -n '__fish_seen_subcommand_from ", verb.path[0], "' -a ",
                 verb.path[1], " -d \"", verb.doc, "\"\n");
    }
    if (verb.path[0] != first) {
      out += Str("complete -c heddle -n __fish_use_subcommand -a ", verb.path[0],
                 verb.path.size() == 1 ? Str(" -d \"", verb.doc, "\"") : "", "\n");
    }
    first = verb.path[0];
    for (const Option& option : verb.options) {
      const size_t dashes = option.names.rfind("--");
      if (dashes != std::string::npos) {
        out += Str("complete -c heddle -n '__fish_seen_subcommand_from ", verb.path.back(), "' -l ",
                   option.names.substr(dashes + 2), " -d \"", option.doc, "\"\n");
      }
    }
    if (TakesOverrides(verb)) {
      out += Str("complete -c heddle -n '__fish_seen_subcommand_from ", verb.path.back(),
                 "' -F -a \"", Keys(), "\"\n");
    }
  }
  return out;
}

StatusOr<int> Completion(const CompletionState& state) {
  const std::vector<Verb> verbs = AllVerbs();
  if (state.shell == "bash") {
    PrintText(BashScript(verbs));
  } else if (state.shell == "zsh") {
    PrintText("autoload -U +X bashcompinit && bashcompinit\n" + BashScript(verbs));
  } else if (state.shell == "fish") {
    PrintText(FishScript(verbs));
  } else {
    return InvalidArgument(Str(state.shell, ": must be bash, zsh or fish"));
  }
  return 0;
}

}  // namespace

std::vector<Verb> CompletionVerbs() {
  return {MakeVerb<CompletionState>(
      {"completion"}, "a script for bash, zsh or fish", [](Verb* verb, CompletionState* state) {
        verb->options = {{"shell", "bash, zsh or fish", &state->shell, true}};
        verb->run = [state](const CommandContext&) { return Completion(*state); };
      })};
}

}  // namespace heddle::cli
