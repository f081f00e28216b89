#include "cli/commands/model_program.h"

#include <stdlib.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <utility>

#include "cli/commands/client.h"
#include "cli/commands/verb.h"

namespace heddle::cli {
namespace {

// A file that goes away with this object.
struct TemporaryFile {
  ~TemporaryFile() {
    if (!path.empty()) {
      unlink(path.c_str());
    }
  }
  std::string path;
};

Status WriteRecord(const v1::CheckpointRecord& record, TemporaryFile* file) {
  char name[] = "/tmp/heddle-record-XXXXXX";
  const int fd = mkstemp(name);
  if (fd < 0) {
    return FromErrno("cannot make", name);
  }
  file->path = name;
  const bool written = record.SerializeToFileDescriptor(fd);
  close(fd);
  return written ? OkStatus() : FromErrno("cannot write", name);
}

StatusOr<int> RunProgram(const std::vector<std::string>& arguments) {
  std::vector<char*> argv;
  for (const std::string& word : arguments) {
    argv.push_back(const_cast<char*>(word.c_str()));
  }
  argv.push_back(nullptr);
  const pid_t child = fork();
  if (child < 0) {
    return FromErrno("cannot fork for", arguments[0]);
  }
  if (child == 0) {
    execv(argv[0], argv.data());
    fprintf(stderr, "heddle: cannot run %s\n", argv[0]);
    _exit(127);
  }
  int status = 0;
  while (waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

// In the format that this program was asked for.
StatusOr<int> RunWithOutput(const CommandContext& context, std::vector<std::string> arguments) {
  if (context.json()) {
    arguments.insert(arguments.end(), {"-o", "json"});
  } else if (context.output == OutputFormat::kWide) {
    arguments.insert(arguments.end(), {"-o", "wide"});
  }
  return RunProgram(arguments);
}

bool IsFolder(const std::string& path) {
  struct stat info = {};
  return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

}  // namespace

StatusOr<int> RunModelProgram(const CommandContext& context, const std::string& verb,
                              const std::string& target, const std::vector<std::string>& words) {
  std::vector<std::string> arguments = {context.program_dir + "/heddle-model", verb};
  TemporaryFile record;
  // `show` also knows the presets; the program says so if there is none of that name.
  const bool preset = verb == "show" && target.find_first_of("@/") == std::string::npos;
  if (IsFolder(target) || preset) {
    arguments.push_back(target);
  } else if (target.find('@') != std::string::npos) {
    ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
    ASSIGN_OR_RETURN(const v1::CheckpointDetail detail, client->GetCheckpoint(target));
    RETURN_IF_ERROR(WriteRecord(detail.record(), &record));
    arguments.insert(arguments.end(), {"--record", record.path, "--root", detail.root()});
  } else {
    return NotFound(Str(target, ": no such model folder, and not a checkpoint (JOB@STEP)"));
  }
  arguments.insert(arguments.end(), words.begin(), words.end());
  return RunWithOutput(context, std::move(arguments));
}

StatusOr<int> RunModelVerb(const CommandContext& context, const std::string& verb,
                           const std::vector<std::string>& words) {
  std::vector<std::string> arguments = {context.program_dir + "/heddle-model", verb};
  arguments.insert(arguments.end(), words.begin(), words.end());
  return RunWithOutput(context, std::move(arguments));
}

}  // namespace heddle::cli
