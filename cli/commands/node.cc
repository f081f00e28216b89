// node ls, describe, cordon, drain, reopen, forget.
#include "base/units/units.h"
#include "cli/commands/client.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"
#include "cli/output/table.h"

namespace heddle::cli {
namespace {

struct NodeState {
  std::string node;
  std::string reason;
  std::string grace;
};

StatusOr<int> List(const CommandContext& context) {
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  ASSIGN_OR_RETURN(const v1::NodeList list, client->Nodes());
  if (context.json()) {
    PrintJson(list);
    return 0;
  }
  std::vector<std::vector<std::string>> rows;
  for (const v1::Node& node : list.nodes()) {
    rows.push_back({node.id(), Printable(node.host()), node.state(), node.admin(), node.health(),
                    Str(node.cpus_free(), "/", node.cpus()),
                    ApproximateBytes(static_cast<int64_t>(node.memory_free_bytes())),
                    Str(node.gpus()), Str(node.ranks_running()),
                    FormatAge(node.last_heartbeat_ms())});
  }
  PrintText(FormatTable({"ID", "HOST", "STATE", "ADMIN", "HEALTH", "CPUS FREE", "MEMORY FREE",
                         "GPUS", "RANKS", "HEARD"},
                        rows));
  return 0;
}

// Why nothing starts on the node, until when, and what ends that sooner.
void AddHealth(const v1::Node& node, std::vector<std::vector<std::string>>* rows) {
  if (!node.health_reason().empty()) {
    rows->push_back({"why", Printable(node.health_reason())});
  }
  if (node.has_quarantined_until_ms()) {
    rows->push_back({"until", FormatTime(node.quarantined_until_ms())});
    rows->push_back({"advice", Str("once its fault is mended: heddle node reopen ", node.id())});
  }
}

int PrintNode(const v1::Node& node, const CommandContext& context) {
  if (context.json()) {
    PrintJson(node);
    return 0;
  }
  std::string jobs;
  for (const std::string& job : node.jobs()) {
    jobs += jobs.empty() ? job : ", " + job;
  }
  std::vector<std::vector<std::string>> rows = {{"host", Printable(node.host())},
                                                {"state", node.state()},
                                                {"admin", node.admin()},
                                                {"health", node.health()}};
  AddHealth(node, &rows);
  rows.insert(rows.end(), {{"cpus", Str(node.cpus(), ", ", node.cpus_free(), " free")},
                           {"memory", FormatBytes(static_cast<int64_t>(node.memory_bytes()))},
                           {"ranks", Str(node.ranks_running())},
                           {"jobs", jobs.empty() ? "-" : jobs},
                           {"version", node.version()}});
  PrintText(FormatTable({"NODE", node.id()}, rows));
  return 0;
}

StatusOr<int> Administer(v1::NodeVerb what, const NodeState& state, const CommandContext& context) {
  v1::NodeAdminRequest request;
  request.set_node(state.node);
  request.set_verb(what);
  request.set_reason(state.reason);
  request.set_request_id(NewRequestId());
  if (!state.grace.empty()) {
    ASSIGN_OR_RETURN(const std::chrono::nanoseconds grace, ParseDuration(state.grace));
    request.set_grace_ms(std::chrono::duration_cast<std::chrono::milliseconds>(grace).count());
  }
  ASSIGN_OR_RETURN(std::unique_ptr<Client> client, Client::Open(context));
  ASSIGN_OR_RETURN(const v1::Node node, client->Administer(request));
  return PrintNode(node, context);
}

Verb MakeAdmin(const char* name, const char* doc, v1::NodeVerb what) {
  return MakeVerb<NodeState>({"node", name}, doc, [what](Verb* verb, NodeState* state) {
    verb->options = {{"node", "node id", &state->node, true},
                     {"--reason", "kept in the events", &state->reason}};
    if (what == v1::NODE_VERB_DRAIN) {
      verb->options.push_back({"--grace", "time for jobs to save and leave", &state->grace});
    }
    verb->run = [what, state](const CommandContext& context) {
      return Administer(what, *state, context);
    };
  });
}

}  // namespace

std::vector<Verb> NodeVerbs() {
  return {
      MakeVerb<NodeState>({"node", "ls"}, "all workers",
                          [](Verb* verb, NodeState*) { verb->run = List; }),
      MakeVerb<NodeState>({"node", "describe"}, "one worker",
                          [](Verb* verb, NodeState* state) {
                            verb->options = {{"node", "node id", &state->node, true}};
                            verb->run = [state](const CommandContext& context) -> StatusOr<int> {
                              ASSIGN_OR_RETURN(std::unique_ptr<Client> client,
                                               Client::Open(context));
                              ASSIGN_OR_RETURN(const v1::Node node, client->GetNode(state->node));
                              return PrintNode(node, context);
                            };
                          }),
      MakeAdmin("cordon", "start nothing new on a worker", v1::NODE_VERB_CORDON),
      MakeAdmin("drain", "move a worker's jobs away, through a checkpoint", v1::NODE_VERB_DRAIN),
      MakeAdmin("reopen", "end a cordon, drain or quarantine", v1::NODE_VERB_REOPEN),
      MakeAdmin("forget", "declare a lost worker's processes dead", v1::NODE_VERB_FORGET)};
}

}  // namespace heddle::cli
