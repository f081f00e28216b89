// ckpt ls, show, verify, pin, unpin, export.
#include <cstdio>

#include "cli/commands/client.h"
#include "cli/commands/model_program.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"
#include "cli/output/table.h"

namespace heddle::cli {
namespace {

struct CheckpointArgument {
  std::string name;
  std::string out;
  std::vector<std::string> extras;
};

StatusOr<int> List(const CheckpointArgument& argument, const CommandContext& context) {
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  ASSIGN_OR_RETURN(const v1::CheckpointList list, client->Checkpoints(argument.name));
  if (context.json()) {
    PrintJson(list);
    return 0;
  }
  std::vector<std::vector<std::string>> rows;
  for (const v1::Checkpoint& checkpoint : list.checkpoints()) {
    std::string flags;
    flags += checkpoint.pinned() ? "pinned " : "";
    flags += checkpoint.verified() ? "verified " : "";
    flags += checkpoint.damaged() ? "DAMAGED" : "";
    rows.push_back(
        {checkpoint.id(), checkpoint.state(), Str(checkpoint.fence()), Str(checkpoint.ranks()),
         Str(checkpoint.bytes()), FormatTime(checkpoint.created_at()),
         checkpoint.parent().empty() ? "-" : checkpoint.parent(), flags.empty() ? "-" : flags});
  }
  PrintText(FormatTable(
      {"CHECKPOINT", "STATE", "FENCE", "RANKS", "BYTES", "CREATED", "PARENT", "FLAGS"}, rows));
  return 0;
}

StatusOr<int> Show(const CheckpointArgument& argument, const CommandContext& context) {
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  ASSIGN_OR_RETURN(v1::CheckpointDetail detail, client->GetCheckpoint(argument.name));
  detail.mutable_record()->mutable_train_state()->clear_resolved_config();
  if (context.json()) {
    PrintJson(detail);
    return 0;
  }
  const v1::Checkpoint& checkpoint = detail.checkpoint();
  const v1::TrainState& train = detail.record().train_state();
  PrintText(FormatTable({"CHECKPOINT", checkpoint.id()},
                        {{"state", checkpoint.state()},
                         {"folder", Str(detail.root(), "/", detail.record().dir())},
                         {"fence", Str(checkpoint.fence())},
                         {"ranks", Str(checkpoint.ranks())},
                         {"bytes", Str(checkpoint.bytes())},
                         {"created", FormatTime(checkpoint.created_at())},
                         {"parent", checkpoint.parent().empty() ? "-" : checkpoint.parent()},
                         {"tensors", Str(detail.record().tensors_size())},
                         {"data position", Str(train.data_position())},
                         {"manifest", train.manifest_hash()},
                         {"config", train.config_hash()},
                         {"torch", Str(train.torch_version(), ", ", train.isa(), ", ",
                                       train.threads_per_rank(), " threads a rank")}}));
  std::vector<std::vector<std::string>> rows;
  for (const v1::RankSeal& seal : detail.record().seals()) {
    for (const v1::ShardFile& file : seal.files()) {
      rows.push_back({Str(seal.rank()), file.name(), Str(file.bytes()), Str(file.entries())});
    }
  }
  PrintText("\n" + FormatTable({"RANK", "FILE", "BYTES", "ENTRIES"}, rows));
  return 0;
}

StatusOr<int> Verify(const CheckpointArgument& argument, const CommandContext& context) {
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  ASSIGN_OR_RETURN(const v1::VerifyReply reply, client->VerifyCheckpoint(argument.name));
  if (context.json()) {
    PrintJson(reply);
  } else if (reply.ok()) {
    PrintText(Str(argument.name, ": ", reply.files(), " files, ", reply.bytes(),
                  " bytes, every digest and block is right\n"));
  }
  for (const std::string& problem : reply.problems()) {
    fprintf(stderr, "heddle: ckpt verify: %s: %s\n", argument.name.c_str(), problem.c_str());
  }
  return reply.ok() ? 0 : 1;
}

StatusOr<int> Pin(bool pinned, const CheckpointArgument& argument, const CommandContext& context) {
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  v1::PinRequest request;
  request.set_checkpoint(argument.name);
  request.set_pinned(pinned);
  request.set_request_id(NewRequestId());
  ASSIGN_OR_RETURN(const v1::Checkpoint checkpoint, client->Pin(request));
  if (context.json()) {
    PrintJson(checkpoint);
  } else {
    PrintText(Str(checkpoint.id(), checkpoint.pinned() ? " is pinned\n" : " is not pinned\n"));
  }
  return 0;
}

StatusOr<int> Export(const CheckpointArgument& argument, const CommandContext& context) {
  std::vector<std::string> words = {"--out", argument.out};
  words.insert(words.end(), argument.extras.begin(), argument.extras.end());
  return RunModelProgram(context, "export", argument.name, words);
}

template <typename Function>
Verb Make(const char* name, const char* doc, const char* what, Function function) {
  return MakeVerb<CheckpointArgument>(
      {"ckpt", name}, doc, [=](Verb* verb, CheckpointArgument* argument) {
        verb->options = {
            {what, what[0] == 'j' ? "job id" : "JOB@STEP or JOB@latest", &argument->name, true}};
        verb->run = [=](const CommandContext& context) { return function(*argument, context); };
      });
}

}  // namespace

std::vector<Verb> CheckpointVerbs() {
  std::vector<Verb> verbs = {
      Make("ls", "checkpoints of a job", "job", List),
      Make("show", "one checkpoint with its files", "checkpoint", Show),
      Make("verify", "read every byte and compare", "checkpoint", Verify),
      Make("pin", "keep a checkpoint from retention", "checkpoint",
           [](const CheckpointArgument& argument, const CommandContext& context) {
             return Pin(true, argument, context);
           }),
      Make("unpin", "give a checkpoint back to retention", "checkpoint",
           [](const CheckpointArgument& argument, const CommandContext& context) {
             return Pin(false, argument, context);
           })};
  verbs.push_back(MakeVerb<CheckpointArgument>(
      {"ckpt", "export"}, "write a model folder (safetensors) from a checkpoint",
      [](Verb* verb, CheckpointArgument* argument) {
        verb->options = {{"checkpoint", "JOB@STEP or JOB@latest", &argument->name, true},
                         {"out", "folder to make", &argument->out, true}};
        verb->run = [argument](const CommandContext& context) {
          return Export(*argument, context);
        };
      }));
  return verbs;
}

}  // namespace heddle::cli
