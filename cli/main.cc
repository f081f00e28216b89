// heddle: the command line. Verbs are in cli/commands, one file each.
#include <signal.h>
#include <unistd.h>

#include <climits>
#include <cstdlib>
#include <string>

#include "cli/commands/context.h"
#include "cli/commands/parser.h"
#include "cli/commands/verbs.h"

namespace {

std::string ProgramFolder() {
  char path[PATH_MAX] = {};
  const ssize_t length = readlink("/proc/self/exe", path, sizeof(path) - 1);
  const std::string text(path, length > 0 ? static_cast<size_t>(length) : 0);
  return text.substr(0, text.rfind('/'));
}

void Interrupted(int) { _exit(130); }

}  // namespace

int main(int argc, char** argv) {
  signal(SIGINT, Interrupted);
  signal(SIGPIPE, SIG_DFL);
  heddle::cli::CommandContext context;
  context.home = heddle::cli::HomeFolder();
  context.program_dir = ProgramFolder();
  context.terminal = isatty(STDOUT_FILENO) != 0 && std::getenv("NO_COLOR") == nullptr;
  return heddle::cli::ParseAndRun(argc, argv, heddle::cli::AllVerbs(), &context);
}
