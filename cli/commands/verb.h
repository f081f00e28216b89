// What a verb of the command line is, as data: its words, options and the function that runs it.
// Verbs stand in one file each; only parser.cc knows the library that reads argv, so that adding a
// verb costs one small translation unit.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <variant>
#include <vector>

#include "base/net/endpoint.h"
#include "base/status/status.h"

namespace heddle::cli {

class Client;

enum class OutputFormat { kTable, kWide, kJson };

// What every verb is given. Built by main(), borrowed for the call.
struct CommandContext {
  OutputFormat output = OutputFormat::kTable;
  std::string coordinator;  // --coordinator, else empty
  net::TlsFiles tls;        // --tls-ca, --tls-cert, --tls-key
  bool insecure_loopback = false;
  int64_t timeout_ms = 0;   // --timeout; 0 = the verb's own default
  std::string home;         // $HEDDLE_HOME, else ~/.heddle
  std::string program_dir;  // folder of the running program
  bool terminal = false;    // standard output is a terminal and NO_COLOR is unset

  bool json() const { return output == OutputFormat::kJson; }
};

// One option or positional argument; the pointer's target outlives parsing (Verb::state).
struct Option {
  std::string names;  // "--hold", "-f,--follow"; without dashes: positional, "config"
  std::string doc;
  std::variant<bool*, std::string*, int64_t*, double*, std::vector<std::string>*> target;
  bool required = false;
};

// An option of the program that a verb starts: for help and completion, read over there.
struct PassedOption {
  std::string names;  // "--lengths N,N"
  std::string doc;
};

struct Verb {
  std::vector<std::string> path;  // {"ckpt", "ls"}
  std::string doc;
  std::vector<Option> options;
  // Words that no option takes are passed on here instead of being refused; for verbs that start
  // another program. Null: refuse.
  std::vector<std::string>* extras = nullptr;
  std::vector<PassedOption> passed;
  // Runs after parsing. The value is the exit status; a Status is printed as "heddle: WHAT: WHY"
  // and mapped by ExitCode().
  std::function<StatusOr<int>(const CommandContext&)> run;
  // Owns what the options point to.
  std::shared_ptr<void> state;
};

// Exit status of the contract (product.md section 4): 2 usage, 3 not found, 4 not reachable, 5 not
// allowed, 6 conflict, else 1. REQUIRES: !status.ok().
int ExitCode(const Status& status);

// Makes a verb whose options live in a State; `fill` adds options and run.
template <typename State, typename Fill>
Verb MakeVerb(std::vector<std::string> path, std::string doc, Fill fill) {
  auto state = std::make_shared<State>();
  Verb verb{.path = std::move(path),
            .doc = std::move(doc),
            .options = {},
            .extras = nullptr,
            .passed = {},
            .run = nullptr,
            .state = state};
  fill(&verb, state.get());
  return verb;
}

}  // namespace heddle::cli
