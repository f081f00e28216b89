// The run configuration: YAML files and Hydra overrides -> heddle.v1.RunConfig, driven by the
// message descriptors alone. Order: schema default < defaults list < file < overrides. Every
// problem of a config is reported at once; nothing is ignored. Source: product.md section 5,
// formats.md section 8.
//
// Limits: a file has at most 1 MiB, depth 64, 100,000 nodes. Blocking file reads; no globals; every
// function is thread-safe.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "heddle/v1/config.pb.h"

namespace heddle::settings {

struct LoadOptions {
  // Folders that hold groups (`model/tiny-dense.yaml`), first match wins. The folder of the config
  // file and its `configs` sub-folder come before them. Usually DefaultSearchPath().
  std::vector<std::string> search_path;
  // What ${oc.env:NAME} may read; names outside the allow-list are refused whatever this holds.
  std::map<std::string, std::string> environment;
  // false: schema and cross-field checks only, for `config show` of presets that this version
  // cannot run yet.
  bool require_implemented = true;
};

struct ResolvedConfig {
  // Every scalar of every group that is not marked optional is set, defaults included.
  v1::RunConfig config;
  // Canonical dotted key -> where its value comes from: "default", "FILE:LINE:COLUMN" or
  // "override 'a.b=v'". Holds every key of `config`.
  std::map<std::string, std::string> origins;
  // Options that are legal but have no effect here, one sentence each.
  std::vector<std::string> warnings;
  // The sweep values that made this element, "key=value"; empty without a sweep.
  std::vector<std::string> sweep;
};

// Folders of presets: HEDDLE_CONFIGS (':'-separated) if set, else `configs` beside or above the
// running program and share/heddle/configs of its prefix; only folders that exist.
std::vector<std::string> DefaultSearchPath();

// Reads `path` and applies `overrides` in order. INVALID_ARGUMENT: the message lists every problem,
// one a line, "FILE:LINE:COLUMN: KEY: PROBLEM (nearest name: X)" or "override 'TEXT': KEY:
// PROBLEM". NOT_FOUND: no such file. A sweep is INVALID_ARGUMENT here.
StatusOr<ResolvedConfig> Load(const std::string& path, const std::vector<std::string>& overrides,
                              const LoadOptions& options);

// As Load; comma lists, choice() and range() give the cartesian product, first key slowest. At most
// 10,000 elements; without a sweep one.
StatusOr<std::vector<ResolvedConfig>> LoadSweep(const std::string& path,
                                                const std::vector<std::string>& overrides,
                                                const LoadOptions& options);

// Merges YAML or JSON `text` (named `source` in errors) into any message by its descriptor: model
// folders' config.json, daemon settings. Same grammar, limits and errors as Load; aliases of fields
// hold, groups and interpolation do not.
Status MergeText(const std::string& text, const std::string& source,
                 google::protobuf::Message* message);

// Applies plain `a.b=v` overrides to a resolved config and validates the result; used by resume.
// Errors as Load; on error `config` is unchanged.
Status ApplyOverrides(const std::vector<std::string>& overrides, v1::RunConfig* config);

// Ranges of every field and the cross-field rules (attention-and-moe.md section 1.1). The check the
// server repeats. INVALID_ARGUMENT lists all problems, one a line, "KEY: PROBLEM".
Status Validate(const v1::RunConfig& config);

// INVALID_ARGUMENT, one line per option that this version accepts as a word but cannot run yet.
Status CheckImplemented(const v1::RunConfig& config);

// Sets every scalar that is unset to its default, in groups not marked optional and in optional
// groups that are present.
void FillDefaults(google::protobuf::Message* message);

// Deterministic YAML of the set fields in declaration order, units as numbers. With `origins` each
// line ends in a comment that names its origin.
std::string ToYaml(const google::protobuf::Message& message,
                   const std::map<std::string, std::string>* origins = nullptr);

// 32 hex digits of XXH3-128 over the filled config without `name`, `schedule` and `logging`, which
// change nothing that is computed.
std::string ConfigHash(const v1::RunConfig& config);

// Names of presets of `group` (empty: "group/name" of all groups) in the search path, sorted.
std::vector<std::string> ListPresets(const std::string& group,
                                     const std::vector<std::string>& search_path);

}  // namespace heddle::settings
