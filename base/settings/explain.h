// What the schema knows about its keys, for `heddle config explain`, the reference page, the JSON
// schema, completion and nearest-name hints. Reads descriptors and option (heddle.v1.key) only.
#pragma once

#include <string>
#include <vector>

#include "base/status/status.h"

namespace heddle::settings {

struct KeyInfo {
  std::string key;            // canonical, "model.attention.swa.window"
  std::string type;           // "integer", "number", "true|false", "text", "a|b|c", "group", ..
  std::string default_value;  // as a user would write it; empty: none
  std::string range;          // "1 .. 100", "> 0", empty
  std::string unit;           // "duration", "bytes", "time", "steps", "tokens", empty
  std::string doc;
  std::vector<std::string> aliases;  // whole keys
  std::vector<std::string> values;   // words of an enum
  std::string limitation;            // what this version does not implement; empty: nothing
  bool is_group = false;
};

// All keys in declaration order, groups before their members.
std::vector<KeyInfo> AllKeys();

// The key or alias `key`; of a group its members follow. NOT_FOUND names the nearest key.
StatusOr<std::vector<KeyInfo>> Explain(const std::string& key);

// docs: one Markdown table per group.
std::string ReferencePage();

// JSON schema (draft 2020-12) of a config file.
std::string JsonSchema();

}  // namespace heddle::settings
