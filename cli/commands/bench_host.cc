// bench-host: hands over to heddle-model, which measures and keeps the figures.
#include <filesystem>

#include "cli/commands/context.h"
#include "cli/commands/host_figures.h"
#include "cli/commands/model_program.h"
#include "cli/commands/verbs.h"

namespace heddle::cli {
namespace {

struct BenchHostState {
  std::string dir;
};

// Where checkpoints go: the local cluster's folder, else that of the figures.
std::string DiskFolder(const std::string& home) {
  const StatusOr<LocalContext> local = ReadContext(home);
  if (local.ok() && !local->state.empty()) return local->state;
  std::error_code ignored;  // a folder that cannot be made is one that cannot be measured
  std::filesystem::create_directories(home, ignored);
  return home;
}

StatusOr<int> BenchHost(const BenchHostState& state, const CommandContext& context) {
  const std::string dir = state.dir.empty() ? DiskFolder(context.home) : state.dir;
  return RunModelVerb(context, "bench-host",
                      {"--dir", dir, "--out", HostFiguresPath(context.home)});
}

}  // namespace

std::vector<Verb> BenchHostVerbs() {
  return {MakeVerb<BenchHostState>(
      {"bench-host"},
      "measure this host for `heddle plan`: products, memory, disk; 20 s, kept in $HEDDLE_HOME",
      [](Verb* verb, BenchHostState* state) {
        verb->options = {{"--dir",
                          "folder on the disk of checkpoints and spilled experts; default: the "
                          "local cluster's, else $HEDDLE_HOME",
                          &state->dir}};
        verb->run = [state](const CommandContext& context) { return BenchHost(*state, context); };
      })};
}

}  // namespace heddle::cli
