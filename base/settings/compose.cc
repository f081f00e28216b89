#include "base/settings/compose.h"

#include <google/protobuf/descriptor.h>
#include <sys/stat.h>

#include <algorithm>

#include "base/settings/bind.h"
#include "base/settings/scalar.h"
#include "base/settings/yaml_reader.h"
#include "heddle/v1/config.pb.h"

namespace heddle::settings {
namespace {

using google::protobuf::FieldDescriptor;

constexpr int kDefaultsDepthMax = 8;

bool IsGroup(const FieldDescriptor& field) {
  return field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE && !field.is_repeated();
}

bool IsFile(const std::string& path) {
  struct stat info = {};
  return stat(path.c_str(), &info) == 0 && S_ISREG(info.st_mode);
}

bool IsPresetGroup(const std::string& name) {
  const std::vector<std::string>& groups = PresetGroups();
  return std::find(groups.begin(), groups.end(), name) != groups.end();
}

// A preset's name never leaves its folder.
bool IsPresetName(const std::string& name) {
  return !name.empty() && name[0] != '.' && std::all_of(name.begin(), name.end(), [](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' ||
           c == '_' || c == '.';
  });
}

bool IsGroupChoice(const Override& override) {
  return IsPresetGroup(override.key) && override.kind != Override::Kind::kDelete &&
         override.choices.size() == 1 && override.choices[0].kind == Value::Kind::kScalar;
}

std::string Origin(const Override& override) { return Str("override '", override.text, "'"); }

// Keys of which only one can hold: setting one in a later layer drops the other.
const std::vector<std::pair<std::string, std::string>>& Rivals() {
  static const std::vector<std::pair<std::string, std::string>> pairs = {
      {"model.attention.kind", "model.attention.pattern"},
      {"data.path", "data.mixture"},
  };
  return pairs;
}

}  // namespace

const std::vector<std::string>& PresetGroups() {
  static const std::vector<std::string> groups = {"model",    "training",   "data",     "memory",
                                                  "parallel", "checkpoint", "schedule", "logging"};
  return groups;
}

std::string FindPreset(const std::string& group, const std::string& option,
                       const std::vector<std::string>& search_path) {
  for (const std::string& folder : search_path) {
    std::string path = Str(folder, group.empty() ? "" : "/", group, "/", option, ".yaml");
    if (IsFile(path)) {
      return path;
    }
  }
  return "";
}

std::vector<std::string> SearchPathOf(const std::string& path, const LoadOptions& options) {
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "." : path.substr(0, slash);
  std::vector<std::string> out = {folder, folder + "/configs"};
  out.insert(out.end(), options.search_path.begin(), options.search_path.end());
  return out;
}

Composer::Composer(const Schema& schema, const LoadOptions& options)
    : schema_(schema), options_(options) {}

std::string Composer::At(const std::string& source, int line, int column) const {
  return Str(source, ":", line, ":", column);
}

void Composer::Compose(const std::string& path, const Value& root,
                       const std::vector<Override>& overrides) {
  search_path_ = SearchPathOf(path, options_);
  LoadFile(path, root, "", "", &overrides, 0);
  AddOverrides(overrides);
}

void Composer::AddText(const std::string& source, const Value& root) {
  ++layer_;
  if (root.kind != Value::Kind::kMap) {
    problems_.Add(At(source, root.line, root.column), "", "a map of keys is needed");
    return;
  }
  Flatten(root, "", source, "");
}

void Composer::AddOverrides(const std::vector<Override>& overrides) {
  ++layer_;
  for (const Override& override : overrides) {
    if (!IsGroupChoice(override)) {
      ApplyOverride(override);
    }
  }
}

// ---- files and defaults lists
// ----------------------------------------------------------------------

void Composer::LoadFile(const std::string& path, const Value& root, const std::string& package,
                        const std::string& own_group, const std::vector<Override>* overrides,
                        int depth) {
  if (depth > kDefaultsDepthMax) {
    problems_.Add(path, "defaults", Str("defaults lists nest deeper than ", kDefaultsDepthMax));
    return;
  }
  if (root.kind != Value::Kind::kMap) {
    problems_.Add(At(path, root.line, root.column), "", "a map of keys is needed");
    return;
  }
  Value content = root;
  std::vector<Selection> selections;
  bool self_last = true;
  size_t self_index = 0;
  for (size_t i = 0; i < content.members.size(); ++i) {
    if (content.members[i].first.text == "defaults") {
      ReadDefaults(content.members[i].second, path, own_group, selections, self_last, self_index);
      content.members.erase(content.members.begin() + static_cast<std::ptrdiff_t>(i));
      break;
    }
  }
  if (self_last) {
    self_index = selections.size();
  }
  if (overrides != nullptr) {
    const size_t before = selections.size();
    ChooseGroups(*overrides, selections);
    // Groups that only the command line names stand before the file's own keys.
    self_index = self_last ? selections.size() : std::min(self_index, before);
  }
  for (size_t i = 0; i <= selections.size(); ++i) {
    if (i == self_index) {
      ++layer_;
      Flatten(content, package, path, "");
    }
    if (i < selections.size()) {
      ApplySelection(selections[i], depth);
    }
  }
}

bool Composer::ReadDefaults(const Value& list, const std::string& source,
                            const std::string& own_group, std::vector<Selection>& out,
                            bool& self_last, size_t& self_index) {
  if (list.kind != Value::Kind::kList) {
    problems_.Add(At(source, list.line, list.column), "defaults",
                  "needs a list such as [{model: tiny-dense}, _self_]");
    return false;
  }
  for (const Value& item : list.items) {
    if (item.kind == Value::Kind::kScalar && item.text == "_self_") {
      if (!self_last) {
        problems_.Add(At(source, item.line, item.column), "defaults", "_self_ stands twice");
      }
      self_last = false;
      self_index = out.size();
      continue;
    }
    Selection selection;
    if (!ReadDefault(item, source, own_group, selection)) {
      continue;
    }
    if (selection.where.rfind("override ", 0) == 0) {
      selection.where = selection.where.substr(9);
      const auto found = std::find_if(out.begin(), out.end(), [&](const Selection& other) {
        return other.group == selection.group && other.package == selection.package;
      });
      if (found == out.end()) {
        problems_.Add(selection.where, "defaults",
                      Str("nothing chose ", selection.group, " before this override"));
      } else {
        *found = selection;
      }
      continue;
    }
    out.push_back(selection);
  }
  return true;
}

// One entry: `option`, `{group: option}`, `{group@package: option}`, with `optional` or `override`
// before the group. An override is marked in `where`.
bool Composer::ReadDefault(const Value& item, const std::string& source,
                           const std::string& own_group, Selection& out) {
  const std::string where = At(source, item.line, item.column);
  const auto refuse = [&](const std::string& text) {
    problems_.Add(where, "defaults", text);
    return false;
  };
  std::string group = own_group;
  bool is_override = false;
  if (item.kind == Value::Kind::kScalar) {
    out.option = item.text;
  } else if (item.kind == Value::Kind::kMap && item.members.size() == 1) {
    const Value& option = item.members[0].second;
    group = item.members[0].first.text;
    if (group.rfind("optional ", 0) == 0) {
      out.optional = true;
      group = group.substr(9);
    } else if (group.rfind("override ", 0) == 0) {
      is_override = true;
      group = group.substr(9);
    }
    if (option.kind == Value::Kind::kNull) {
      return false;  // Hydra: a place in the order, nothing chosen
    }
    if (option.kind != Value::Kind::kScalar) {
      return refuse(Str(group, ": needs the name of one preset (lists are not supported)"));
    }
    out.option = option.text;
  } else {
    return refuse("an entry is `group: option` or `option`");
  }
  if (is_override && !own_group.empty()) {
    return refuse("`override` works in the main file only");
  }
  out.package.clear();
  bool has_package = false;
  if (const size_t at = group.find('@'); at != std::string::npos) {
    out.package = group.substr(at + 1);
    out.package = out.package == "_global_" ? "" : out.package;
    group = group.substr(0, at);
    has_package = true;
  }
  const bool absolute = !group.empty() && group[0] == '/';
  group = absolute ? group.substr(1) : group;
  const bool relative_to_group = item.kind == Value::Kind::kMap && !own_group.empty() && !absolute;
  if ((!group.empty() && !IsPresetGroup(group)) || relative_to_group) {
    const std::string nearest = NearestOf(group, PresetGroups());
    return refuse(relative_to_group
                      ? Str(group, ": write /", group, " in the defaults list of a group")
                      : Str(group, ": unknown group", nearest.empty() ? "" : " (nearest name: ",
                            nearest, nearest.empty() ? "" : ")"));
  }
  out.group = group;
  out.package = has_package ? out.package : group;
  out.where = is_override ? "override " + where : where;
  return true;
}

// Applies `group=option`, `group@package=option` and `~group` to the main file's defaults list.
void Composer::ChooseGroups(const std::vector<Override>& overrides,
                            std::vector<Selection>& selections) {
  for (const Override& override : overrides) {
    if (!IsPresetGroup(override.key)) {
      continue;
    }
    const std::string package = override.package.empty()         ? override.key
                                : override.package == "_global_" ? ""
                                                                 : override.package;
    const auto same = [&](const Selection& selection) {
      return selection.group == override.key && selection.package == package;
    };
    const auto found = std::find_if(selections.begin(), selections.end(), same);
    if (override.kind == Override::Kind::kDelete) {
      if (found != selections.end()) {
        selections.erase(found);
      }
      continue;
    }
    if (!IsGroupChoice(override)) {
      continue;
    }
    if (found != selections.end() && override.kind == Override::Kind::kAdd) {
      problems_.Add(Origin(override), override.key,
                    "is chosen already; write it without + to replace the choice");
      continue;
    }
    Selection selection;
    selection.group = override.key;
    selection.option = override.choices[0].text;
    selection.package = package;
    selection.where = Origin(override);
    if (found != selections.end()) {
      *found = selection;
    } else {
      selections.push_back(selection);
    }
  }
}

void Composer::ApplySelection(const Selection& selection, int depth) {
  const std::string shown =
      selection.group.empty() ? selection.option : Str(selection.group, "/", selection.option);
  const std::string path = IsPresetName(selection.option)
                               ? FindPreset(selection.group, selection.option, search_path_)
                               : "";
  if (path.empty()) {
    if (selection.optional) {
      return;
    }
    const std::string nearest =
        NearestOf(selection.option, ListPresets(selection.group, search_path_));
    problems_.Add(
        selection.where, selection.group,
        Str("no preset ", shown,
            nearest.empty() ? " in the search path" : Str(" (nearest name: ", nearest, ")")));
    return;
  }
  const StatusOr<std::string> text = ReadConfigFile(path);
  if (!text.ok()) {
    problems_.Add("", "", Message(text.status()));
    return;
  }
  if (text->rfind("# @package", 0) == 0) {
    problems_.Add(At(path, 1, 1), "", "`# @package` is not supported; write group@package");
    return;
  }
  const StatusOr<Value> root = ReadYaml(*text, path);
  if (!root.ok()) {
    problems_.Add("", "", Message(root.status()));
    return;
  }
  LoadFile(path, *root, selection.package, selection.group, nullptr, depth + 1);
}

// ---- keys
// ------------------------------------------------------------------------------------------

void Composer::Flatten(const Value& value, const std::string& prefix, const std::string& source,
                       const std::string& override_origin) {
  for (const auto& [key, member] : value.members) {
    FlattenMember(key, member, prefix, source, override_origin);
  }
}

void Composer::FlattenMember(const Value::Key& key, const Value& value, const std::string& prefix,
                             const std::string& source, const std::string& override_origin) {
  const std::string dotted = prefix.empty() ? key.text : prefix + "." + key.text;
  const std::string origin =
      override_origin.empty() ? At(source, key.line, key.column) : override_origin;
  const std::string shown = dotted.substr(0, 200);
  if (key.text == "swa_layers_per_cycle" || key.text == "mla_layers_per_cycle") {
    problems_.Add(origin, shown, "write model.attention.pattern, such as [swa, swa, mla]");
    return;
  }
  const StatusOr<KeyRef> found = schema_.Find(dotted);
  if (!found.ok()) {
    problems_.Add(origin, shown, Message(found.status()));
    return;
  }
  const FieldDescriptor& field = *found->leaf();
  if (field.is_map() && found->map_key.empty() && value.kind == Value::Kind::kMap) {
    Flatten(value, dotted, source, override_origin);
    return;
  }
  if (!IsGroup(field)) {
    Assign(*found, dotted, value, source, origin);
    return;
  }
  if (value.kind == Value::Kind::kMap && !value.members.empty()) {
    Flatten(value, dotted, source, override_origin);
    return;
  }
  const auto& number_sets = OptionsOf(field).number_sets();
  if (value.kind == Value::Kind::kScalar && !number_sets.empty()) {
    for (const std::string& name : number_sets) {
      FlattenMember({name, key.line, key.column}, value, dotted, source, override_origin);
    }
    return;
  }
  if (value.kind == Value::Kind::kScalar || value.kind == Value::Kind::kList) {
    problems_.Add(origin, shown, Str("is a group of keys, not a value (is ", Shown(value), ")"));
    return;
  }
  if (OptionsOf(field).optional_group()) {
    Assign(*found, dotted, value, source, origin);  // marks it as present
  }
}

void Composer::Assign(const KeyRef& key, const std::string& spelled, const Value& value,
                      const std::string& source, const std::string& origin) {
  const bool from_override = source.empty();
  const auto old = assignments_.find(key.canonical);
  if (old != assignments_.end() && old->second.layer == layer_ &&
      !SameContent(old->second.value, value)) {
    if (old->second.spelled != spelled) {
      problems_.Add(
          origin, spelled,
          Str("is another name of ", key.canonical, ", which ", old->second.spelled, " sets to ",
              Shown(old->second.value), " at ", old->second.origin, "; this says ", Shown(value)));
      return;
    }
    if (!from_override) {
      problems_.Add(origin, spelled, Str("is given twice, first at ", old->second.origin));
      return;
    }
  }
  DropRivals(key);
  Assignment assignment;
  assignment.key = key;
  assignment.value = value;
  assignment.source = source;
  assignment.origin = origin;
  assignment.spelled = spelled;
  assignment.layer = layer_;
  assignments_[key.canonical] = std::move(assignment);
}

void Composer::DropRivals(const KeyRef& key) {
  for (const auto& [a, b] : Rivals()) {
    if (key.canonical != a && key.canonical != b) {
      continue;
    }
    const auto rival = assignments_.find(key.canonical == a ? b : a);
    if (rival != assignments_.end() && rival->second.layer < layer_) {
      assignments_.erase(rival);
    }
  }
}

void Composer::ApplyOverride(const Override& override) {
  const std::string origin = Origin(override);
  if (!override.package.empty()) {
    problems_.Add(origin, override.key, "only a group takes @package");
    return;
  }
  if (override.key.find('/') != std::string::npos) {
    const std::string group = override.key.substr(0, override.key.find('/'));
    problems_.Add(origin, override.key,
                  IsPresetGroup(group) ? Str("groups have one level; write ", group, "=OPTION")
                                       : std::string("unknown group"));
    return;
  }
  if (override.kind != Override::Kind::kDelete) {
    if (override.kind == Override::Kind::kAdd) {
      const StatusOr<KeyRef> key = schema_.Find(override.key);
      const auto old = key.ok() ? assignments_.find(key->canonical) : assignments_.end();
      if (old != assignments_.end() && old->second.layer < layer_) {
        problems_.Add(origin, override.key,
                      Str("is set already at ", old->second.origin, "; write ++ to replace it"));
        return;
      }
    }
    FlattenMember({override.key, 0, 0}, override.choices[0], "", "", origin);
    return;
  }
  const StatusOr<KeyRef> key = schema_.Find(override.key);
  if (!key.ok()) {
    problems_.Add(origin, override.key, Message(key.status()));
    return;
  }
  bool erased = false;
  const std::string below = key->canonical + ".";
  for (auto it = assignments_.lower_bound(key->canonical); it != assignments_.end();) {
    const bool inside =
        it->first == key->canonical || it->first.compare(0, below.size(), below) == 0;
    if (inside && override.has_value && !SameContent(it->second.value, override.choices[0])) {
      problems_.Add(origin, override.key, Str("its value is ", Shown(it->second.value)));
      return;
    }
    erased = erased || inside;
    if (!inside && it->first.compare(0, key->canonical.size(), key->canonical) != 0) {
      break;
    }
    it = inside ? assignments_.erase(it) : std::next(it);
  }
  if (!erased && !IsPresetGroup(override.key)) {
    warnings_.push_back(Str(origin, ": ", key->canonical, " has its default already"));
  }
}

}  // namespace heddle::settings
