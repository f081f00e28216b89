// Files, groups and overrides -> the final assignments `canonical key = value`, in the order schema
// default < defaults list < file < overrides. Internal to base/settings.
#pragma once

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/settings/override_parser.h"
#include "base/settings/schema.h"
#include "base/settings/settings.h"
#include "base/settings/value.h"

namespace heddle::settings {

// One key with its final value.
struct Assignment {
  KeyRef key;
  Value value;
  std::string source;   // file; empty for an override
  std::string origin;   // "FILE:LINE:COLUMN" or "override 'TEXT'"
  std::string spelled;  // the key as it was written
  int layer = 0;
};

using Assignments = std::map<std::string, Assignment>;

// Collects the assignments of layers; a later layer wins over an earlier one.
class Composer {
 public:
  Composer(const Schema& schema, const LoadOptions& options);

  // Reads the main file (already parsed as `root`), its defaults list and the groups that
  // `overrides` choose, then the overrides. Sweeps must be resolved: one choice per override.
  void Compose(const std::string& path, const Value& root, const std::vector<Override>& overrides);

  // One text without groups; for MergeText.
  void AddText(const std::string& source, const Value& root);

  // Adds overrides to what is there; for ApplyOverrides.
  void AddOverrides(const std::vector<Override>& overrides);

  // Replaces ${...} in every value.
  void Interpolate();

  const Assignments& assignments() const { return assignments_; }
  Problems& problems() { return problems_; }
  const std::vector<std::string>& warnings() const { return warnings_; }

 private:
  struct Selection {
    std::string group;
    std::string option;
    std::string package;  // where its keys go
    std::string where;
    bool optional = false;
  };

  std::string At(const std::string& source, int line, int column) const;
  void Flatten(const Value& value, const std::string& prefix, const std::string& source,
               const std::string& override_origin);
  void FlattenMember(const Value::Key& key, const Value& value, const std::string& prefix,
                     const std::string& source, const std::string& override_origin);
  void Assign(const KeyRef& key, const std::string& spelled, const Value& value,
              const std::string& source, const std::string& origin);
  void DropRivals(const KeyRef& key);
  bool ReadDefaults(const Value& list, const std::string& source, const std::string& own_group,
                    std::vector<Selection>& out, bool& self_last, size_t& self_index);
  bool ReadDefault(const Value& item, const std::string& source, const std::string& own_group,
                   Selection& out);
  void ApplySelection(const Selection& selection, int depth);
  void LoadFile(const std::string& path, const Value& root, const std::string& package,
                const std::string& own_group, const std::vector<Override>* overrides, int depth);
  void ChooseGroups(const std::vector<Override>& overrides, std::vector<Selection>& selections);
  void ApplyOverride(const Override& override);
  std::string Resolve(const std::string& expression, int depth, std::string& problem,
                      const Value** whole);
  void InterpolateValue(Value& value, const Assignment& owner, int depth);

  const Schema& schema_;
  const LoadOptions& options_;
  std::vector<std::string> search_path_;
  Assignments assignments_;
  Problems problems_;
  std::vector<std::string> warnings_;
  int layer_ = 0;
};

// Top-level groups of RunConfig that have presets.
const std::vector<std::string>& PresetGroups();

// The file of `group`/`option` in the first folder that has it; empty if none.
std::string FindPreset(const std::string& group, const std::string& option,
                       const std::vector<std::string>& search_path);

// The search path of a config file: its folder, `configs` beside it, then options.search_path.
std::vector<std::string> SearchPathOf(const std::string& path, const LoadOptions& options);

}  // namespace heddle::settings
