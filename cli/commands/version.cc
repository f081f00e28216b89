// version: of this program; touches no network.
#include "base/settings/json.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"

#ifndef HEDDLE_VERSION
#error "HEDDLE_VERSION comes from CMake"
#endif

namespace heddle::cli {
namespace {
struct NoState {};
}  // namespace

std::vector<Verb> VersionVerbs() {
  return {MakeVerb<NoState>({"version"}, "of this program", [](Verb* verb, NoState*) {
    verb->run = [](const CommandContext& context) -> StatusOr<int> {
      PrintText(context.json() ? Str("{\"version\":", settings::JsonQuote(HEDDLE_VERSION), "}\n")
                               : Str("heddle ", HEDDLE_VERSION, "\n"));
      return 0;
    };
  })};
}

}  // namespace heddle::cli
