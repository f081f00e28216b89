// Reads argv into a verb and the global options. The only user of the argument library.
#pragma once

#include <vector>

#include "cli/commands/verb.h"

namespace heddle::cli {

// Parses argv against `verbs`, fills `context` and the chosen verb's options, runs it and returns
// the exit status. Help goes to standard output (status 0); a usage error to standard error as
// "heddle: usage: WHY" (status 2).
int ParseAndRun(int argc, const char* const* argv, const std::vector<Verb>& verbs,
                CommandContext* context);

}  // namespace heddle::cli
