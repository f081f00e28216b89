#include "cli/commands/parser.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <iostream>
#include <map>
#include <sstream>
#include <string>

#include "base/units/units.h"

namespace heddle::cli {
namespace {

constexpr size_t kHelpColumn = 36;

void AddOption(const Option& option, CLI::App* app) {
  CLI::Option* made = nullptr;
  if (bool* const* flag = std::get_if<bool*>(&option.target)) {
    made = app->add_flag(option.names, **flag, option.doc);
  } else if (std::string* const* text = std::get_if<std::string*>(&option.target)) {
    made = app->add_option(option.names, **text, option.doc);
  } else if (int64_t* const* number = std::get_if<int64_t*>(&option.target)) {
    made = app->add_option(option.names, **number, option.doc);
  } else if (double* const* real = std::get_if<double*>(&option.target)) {
    made = app->add_option(option.names, **real, option.doc);
  } else {
    made = app->add_option(option.names, *std::get<std::vector<std::string>*>(option.target),
                           option.doc);
  }
  made->required(option.required);
}

struct Globals {
  std::string output = "table";
  std::string timeout;
};

void AddGlobals(CLI::App* app, CommandContext* context, Globals* globals) {
  app->add_option("-o,--output", globals->output, "table, wide or json")
      ->check(CLI::IsMember({"table", "wide", "json"}));
  app->add_option("--coordinator", context->coordinator, "HOST:PORT or unix:PATH");
  app->add_option("--timeout", globals->timeout, "longest time to wait, such as 30s");
  app->add_option("--tls-ca", context->tls.ca, "PEM file of the cluster's CA");
  app->add_option("--tls-cert", context->tls.cert, "PEM file of the own certificate");
  app->add_option("--tls-key", context->tls.key, "PEM file of the own key");
  app->add_flag("--insecure-loopback", context->insecure_loopback,
                "allow loopback TCP without TLS");
}

// As the library writes the verb's own options.
std::string PassedHelp(const std::vector<PassedOption>& options) {
  std::string text = options.empty() ? "" : "Options of the verb:\n";
  for (const PassedOption& option : options) {
    const std::string names = "  " + option.names;
    const size_t width = std::max<size_t>(kHelpColumn, names.size() + 1);
    text += names + std::string(width - names.size(), ' ') + option.doc + "\n";
  }
  return text;
}

Status ReadGlobals(const Globals& globals, CommandContext* context) {
  context->output = globals.output == "json"   ? OutputFormat::kJson
                    : globals.output == "wide" ? OutputFormat::kWide
                                               : OutputFormat::kTable;
  if (!globals.timeout.empty()) {
    ASSIGN_OR_RETURN(const std::chrono::nanoseconds timeout, ParseDuration(globals.timeout));
    context->timeout_ms = std::chrono::duration_cast<std::chrono::milliseconds>(timeout).count();
  }
  return OkStatus();
}

void PrintError(const std::string& verb, const Status& status) {
  std::cout.flush();
  // All problems of a config come as lines of one status; each is an error of its own to a reader.
  std::string message = Message(status);
  if (message.empty()) {  // as gRPC answers for a call that the other end does not know
    message = status.code() == StatusCode::kUnimplemented
                  ? "the coordinator does not know this call: it is older than this program"
                  : Str("failed without a reason: ", status.code());
  }
  std::istringstream lines(message);
  for (std::string line; std::getline(lines, line);) {
    std::cerr << "heddle: " << verb << ": " << line << "\n";
  }
}

// The library says that a subcommand is required also when there was one that it does not know.
std::string UsageError(const CLI::App& app, const CLI::ParseError& error) {
  const CLI::App* at = &app;
  std::string words = "heddle";
  while (!at->get_subcommands().empty()) {
    at = at->get_subcommands().front();
    words += " " + at->get_name();
  }
  const std::vector<std::string> unread = at->remaining();
  const bool verb_wanted = !at->get_subcommands({}).empty();
  if (verb_wanted && !unread.empty() && unread.front().rfind('-', 0) != 0) {
    return Str("no verb `", words, " ", unread.front(), "` (see ", words, " --help)");
  }
  return Str(error.what(), " (see ", words, " --help)");
}

// The library's side of the verbs. Its values live as long as this object.
struct CommandLine {
  CLI::App app{"heddle: trains sparse-attention language models and does not lose the run",
               "heddle"};
  Globals globals;
  std::map<CLI::App*, const Verb*> owner;

  CommandLine(const std::vector<Verb>& verbs, CommandContext* context) {
    app.require_subcommand(1);
    app.get_formatter()->column_width(kHelpColumn);
    AddGlobals(&app, context, &globals);
    std::map<std::string, CLI::App*> groups;
    for (const Verb& verb : verbs) {
      CLI::App* parent = &app;
      if (verb.path.size() == 2) {
        CLI::App*& group = groups[verb.path[0]];
        if (group == nullptr) {
          group = app.add_subcommand(verb.path[0], "see heddle " + verb.path[0] + " --help");
          group->require_subcommand(1);
        }
        parent = group;
      }
      AddVerb(verb, parent, context);
    }
  }

  void AddVerb(const Verb& verb, CLI::App* parent, CommandContext* context) {
    CLI::App* sub = parent->add_subcommand(verb.path.back(), verb.doc);
    owner[sub] = &verb;
    AddGlobals(sub, context, &globals);
    for (const Option& option : verb.options) {
      AddOption(option, sub);
    }
    if (verb.extras != nullptr) {
      sub->prefix_command();
      sub->footer(PassedHelp(verb.passed));
    }
  }

  CLI::App* Chosen() {
    CLI::App* chosen = &app;
    while (!chosen->get_subcommands().empty()) {
      chosen = chosen->get_subcommands().front();
    }
    return chosen;
  }
};

int RunVerb(const Verb& verb, const CLI::App& chosen, const Globals& globals,
            CommandContext* context) {
  std::string words = verb.path[0];
  if (verb.path.size() == 2) {
    words += " " + verb.path[1];
  }
  if (verb.extras != nullptr) {
    *verb.extras = chosen.remaining();
  }
  if (const Status status = ReadGlobals(globals, context); !status.ok()) {
    PrintError(words, status);
    return 2;
  }
  const StatusOr<int> result = verb.run(*context);
  if (!result.ok()) {
    PrintError(words, result.status());
    return ExitCode(result.status());
  }
  // Who reads a file of ours must not take a part for the whole.
  if (!std::cout.flush()) {
    PrintError(words, Unavailable("cannot write to standard output"));
    return 1;
  }
  return *result;
}

}  // namespace

int ParseAndRun(int argc, const char* const* argv, const std::vector<Verb>& verbs,
                CommandContext* context) {
  CommandLine line(verbs, context);
  try {
    line.app.parse(argc, argv);
  } catch (const CLI::CallForHelp& help) {
    return line.app.exit(help);
  } catch (const CLI::ParseError& error) {
    std::cerr << "heddle: usage: " << UsageError(line.app, error) << "\n";
    return 2;
  }
  CLI::App* chosen = line.Chosen();
  return RunVerb(*line.owner.at(chosen), *chosen, line.globals, context);
}

}  // namespace heddle::cli
