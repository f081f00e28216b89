// Starts `heddle-model`, the one program beside the trainer that links LibTorch. The command line
// resolves JOB@STEP first, so that heddle-model needs no network (architecture P5).
#pragma once

#include <string>
#include <vector>

#include "base/status/status.h"

namespace heddle::cli {

struct CommandContext;

// Runs `heddle-model VERB TARGET WORDS...` and returns its exit status. `target` is a model folder,
// or a checkpoint (JOB@STEP, JOB@latest): then its record is written to a temporary file and TARGET
// becomes `--record FILE --root CHECKPOINT_ROOT`. NOT_FOUND: neither.
StatusOr<int> RunModelProgram(const CommandContext& context, const std::string& verb,
                              const std::string& target, const std::vector<std::string>& words);

// The same for a verb without a model.
StatusOr<int> RunModelVerb(const CommandContext& context, const std::string& verb,
                           const std::vector<std::string>& words);

}  // namespace heddle::cli
