// config show, explain, presets, reference, schema: what a configuration means.
#include "base/settings/explain.h"
#include "base/settings/json.h"
#include "base/settings/settings.h"
#include "cli/commands/context.h"
#include "cli/commands/print.h"
#include "cli/commands/verbs.h"
#include "cli/output/table.h"

namespace heddle::cli {
namespace {

struct ConfigState {
  std::string config;
  std::vector<std::string> overrides;
  std::string key;
};

// The configuration, and `warnings` where there are any.
std::string ConfigJson(const settings::ResolvedConfig& resolved) {
  std::string json = settings::ToJson(resolved.config, {.print_unset = true});
  std::string warnings;
  for (const std::string& warning : resolved.warnings) {
    warnings += Str(warnings.empty() ? "" : ",", settings::JsonQuote(warning));
  }
  if (!warnings.empty()) {
    json.insert(json.rfind('}'), Str(",\"warnings\":[", warnings, "]"));
  }
  return json + "\n";
}

StatusOr<int> Show(const ConfigState& state, const CommandContext& context) {
  settings::LoadOptions options;
  options.search_path = settings::DefaultSearchPath();
  options.environment = EnvironmentMap();
  options.require_implemented = false;
  ASSIGN_OR_RETURN(const settings::ResolvedConfig resolved,
                   settings::Load(state.config, state.overrides, options));
  if (context.json()) {
    PrintText(ConfigJson(resolved));
  } else {
    PrintText(settings::ToYaml(resolved.config, &resolved.origins));
  }
  for (const std::string& warning : resolved.warnings) {
    fprintf(stderr, "heddle: warning: %s\n", warning.c_str());
  }
  return 0;
}

std::string OrDash(const std::string& text) { return text.empty() ? "-" : text; }

StatusOr<int> Explain(const ConfigState& state, const CommandContext& context) {
  ASSIGN_OR_RETURN(const std::vector<settings::KeyInfo> keys, settings::Explain(state.key));
  if (context.json()) {
    for (const settings::KeyInfo& key : keys) {
      PrintText(Str(
          "{\"key\":", settings::JsonQuote(key.key), ",\"type\":", settings::JsonQuote(key.type),
          ",\"default\":", settings::JsonQuote(key.default_value),
          ",\"range\":", settings::JsonQuote(key.range),
          ",\"unit\":", settings::JsonQuote(key.unit), ",\"doc\":", settings::JsonQuote(key.doc),
          ",\"limitation\":", settings::JsonQuote(key.limitation), "}\n"));
    }
    return 0;
  }
  for (const settings::KeyInfo& key : keys) {
    PrintText(Str(key.key, "  ", key.type, "\n  ", key.doc, "\n"));
    if (!key.is_group) {
      PrintText(Str("  default ", OrDash(key.default_value), ", range ", OrDash(key.range),
                    ", unit ", OrDash(key.unit), "\n"));
    }
    std::string aliases;
    for (const std::string& alias : key.aliases) {
      aliases += aliases.empty() ? alias : ", " + alias;
    }
    if (!aliases.empty()) {
      PrintText(Str("  also written ", aliases, "\n"));
    }
    if (!key.limitation.empty()) {
      PrintText(Str("  limitation: ", key.limitation, "\n"));
    }
  }
  return 0;
}

StatusOr<int> Presets(const ConfigState& state, const CommandContext& context) {
  const std::vector<std::string> names =
      settings::ListPresets(state.key, settings::DefaultSearchPath());
  for (const std::string& name : names) {
    PrintText(context.json() ? Str("{\"preset\":", settings::JsonQuote(name), "}\n") : name + "\n");
  }
  return 0;
}

}  // namespace

std::vector<Verb> ConfigVerbs() {
  return {MakeVerb<ConfigState>(
              {"config", "show"}, "the resolved configuration with the origin of each value",
              [](Verb* verb, ConfigState* state) {
                verb->options = {{"config", "configuration file", &state->config, true},
                                 {"overrides", "key=value, group=option", &state->overrides}};
                verb->run = [state](const CommandContext& context) {
                  return Show(*state, context);
                };
              }),
          MakeVerb<ConfigState>({"config", "explain"}, "what a key means",
                                [](Verb* verb, ConfigState* state) {
                                  verb->options = {{"key", "key or group", &state->key, true}};
                                  verb->run = [state](const CommandContext& context) {
                                    return Explain(*state, context);
                                  };
                                }),
          MakeVerb<ConfigState>({"config", "presets"}, "presets, of one group or all",
                                [](Verb* verb, ConfigState* state) {
                                  verb->options = {{"group", "such as model", &state->key}};
                                  verb->run = [state](const CommandContext& context) {
                                    return Presets(*state, context);
                                  };
                                }),
          MakeVerb<ConfigState>({"config", "reference"}, "all keys as Markdown tables",
                                [](Verb* verb, ConfigState*) {
                                  verb->run = [](const CommandContext&) -> StatusOr<int> {
                                    PrintText(settings::ReferencePage());
                                    return 0;
                                  };
                                }),
          MakeVerb<ConfigState>({"config", "schema"}, "JSON schema of a configuration file",
                                [](Verb* verb, ConfigState*) {
                                  verb->run = [](const CommandContext&) -> StatusOr<int> {
                                    PrintText(settings::JsonSchema() + "\n");
                                    return 0;
                                  };
                                })};
}

}  // namespace heddle::cli
