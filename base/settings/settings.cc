#include "base/settings/settings.h"

#include <dirent.h>
#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <set>

#include "base/settings/bind.h"
#include "base/settings/checks.h"
#include "base/settings/compose.h"
#include "base/settings/override_parser.h"
#include "base/settings/schema.h"
#include "base/settings/yaml_reader.h"

namespace heddle::settings {
namespace {

using google::protobuf::FieldDescriptor;
using PbMessage = google::protobuf::Message;

constexpr size_t kSweepElementsMax = 10000;

bool IsFolder(const std::string& path) {
  struct stat info = {};
  return stat(path.c_str(), &info) == 0 && S_ISDIR(info.st_mode);
}

// "demo.yaml" -> "demo"; characters a name cannot have become '-'.
std::string NameFromPath(const std::string& path) {
  std::string stem = path.substr(path.rfind('/') + 1);
  stem = stem.substr(0, stem.rfind('.') == 0 ? std::string::npos : stem.rfind('.'));
  for (char& c : stem) {
    const bool good = (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
                      c == '-' || c == '_' || c == '.';
    c = good ? c : '-';
  }
  return stem.empty() || stem[0] == '.' || stem[0] == '-' ? "job" + stem : stem;
}

// A path as given, or the name of a whole config in the search path.
StatusOr<std::string> FindConfig(const std::string& path, const LoadOptions& options) {
  if (access(path.c_str(), F_OK) == 0 || path.find('/') != std::string::npos) {
    return path;
  }
  const std::string preset = FindPreset("", path, options.search_path);
  return preset.empty() ? NotFound(Str(path, ": no such config file"))
                        : StatusOr<std::string>(preset);
}

// Adds the overrides that can be read to `out`; the status lists the others.
Status ParseOverrides(const std::vector<std::string>& texts, std::vector<Override>* out) {
  std::string problems;
  for (const std::string& text : texts) {
    StatusOr<Override> parsed = ParseOverride(text);
    if (parsed.ok()) {
      out->push_back(std::move(*parsed));
    } else {
      problems += (problems.empty() ? "" : "\n") + Message(parsed.status());
    }
  }
  return problems.empty() ? OkStatus() : InvalidArgument(problems);
}

// The origin of the key, or of the nearest group or element above it.
std::string OriginOf(std::string key, const std::map<std::string, std::string>& origins,
                     const std::string& fallback) {
  while (true) {
    const auto found = origins.find(key);
    if (found != origins.end()) {
      return found->second == "default" ? fallback : found->second;
    }
    // A group: where its first member that somebody set comes from.
    for (auto it = origins.lower_bound(key + "."); it != origins.end(); ++it) {
      if (it->first.compare(0, key.size() + 1, key + ".") != 0) {
        break;
      }
      if (it->second != "default") {
        return it->second;
      }
    }
    const size_t cut = key.find_last_of(".[");
    if (cut == std::string::npos) {
      return fallback;
    }
    key = key.substr(0, cut);
  }
}

void Locate(const Problems& found, const std::map<std::string, std::string>& origins,
            const std::string& fallback, Problems& out) {
  for (const Problem& problem : found.all()) {
    out.Add(OriginOf(problem.key, origins, fallback), problem.key, problem.text);
  }
}

// Origins of everything that nobody assigned.
void AddDefaultOrigins(const PbMessage& message, const std::string& prefix,
                       std::map<std::string, std::string>& origins) {
  std::vector<const FieldDescriptor*> fields;
  message.GetReflection()->ListFields(message, &fields);
  for (const FieldDescriptor* field : fields) {
    const std::string key = prefix.empty() ? field->name() : prefix + "." + field->name();
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE && !field->is_repeated()) {
      AddDefaultOrigins(message.GetReflection()->GetMessage(message, field), key, origins);
    } else if (!field->is_map()) {
      origins.emplace(key, "default");
    }
  }
}

void WarnIdleKeys(const Assignments& assignments, const v1::RunConfig& config,
                  std::vector<std::string>& warnings) {
  for (const auto& [key, assignment] : assignments) {
    const std::string why = WhyIdle(config, key);
    const bool changed = assignment.key.leaf()->is_repeated() ||
                         FieldText(assignment.key, config) != DefaultText(*assignment.key.leaf());
    if (!why.empty() && changed) {
      warnings.push_back(Str(assignment.origin, ": ", key, " has no effect ", why));
    }
  }
}

// Defaults that depend on other groups: the sizes of attention.mla make MLA the core of dsa layers
// (product.md section 5).
void FillDependentDefaults(v1::RunConfig* config) {
  v1::AttentionConfig* attention = config->mutable_model()->mutable_attention();
  const auto& pattern = attention->pattern();
  const bool dsa = pattern.empty() ? attention->kind() == v1::ATTENTION_KIND_DSA
                                   : std::find(pattern.begin(), pattern.end(),
                                               v1::ATTENTION_KIND_DSA) != pattern.end();
  if (dsa && attention->has_mla() && !attention->dsa().has_core()) {
    attention->mutable_dsa()->set_core(v1::DsaConfig::CORE_MLA);
  }
  // The published values of Lion (training-runtime.md 11.1); the schema has AdamW's.
  v1::TrainingConfig* training = config->mutable_training();
  if (training->optimizer() == v1::TrainingConfig::OPTIMIZER_LION && !training->has_beta2()) {
    training->set_beta2(0.99);
  }
}

StatusOr<ResolvedConfig> Resolve(const std::string& path, const Value& root,
                                 const std::vector<Override>& overrides,
                                 const LoadOptions& options) {
  const Schema schema(*v1::RunConfig::descriptor());
  Composer composer(schema, options);
  composer.Compose(path, root, overrides);
  composer.Interpolate();
  Problems problems = composer.problems();
  ResolvedConfig out;
  for (const auto& [key, assignment] : composer.assignments()) {
    Bind(assignment.key, assignment.value, assignment.source, assignment.origin, &out.config,
         problems);
    out.origins[key] = assignment.origin;
  }
  if (!out.config.has_name()) {
    out.config.set_name(NameFromPath(path));
    out.origins["name"] = Str("name of ", path);
  }
  FillDependentDefaults(&out.config);
  FillDefaults(&out.config);
  AddDefaultOrigins(out.config, "", out.origins);
  Problems found;
  CheckRanges(out.config, found);
  CheckFields(out.config, found);
  if (options.require_implemented) {
    CheckTable(out.config, found);
  }
  Locate(found, out.origins, path, problems);
  RETURN_IF_ERROR(problems.ToStatus());
  out.warnings = composer.warnings();
  const std::vector<std::string> more = Warnings(out.config);
  out.warnings.insert(out.warnings.end(), more.begin(), more.end());
  WarnIdleKeys(composer.assignments(), out.config, out.warnings);
  return out;
}

// Fills in the options that a glob() matches.
Status ExpandGlobs(const std::string& path, const LoadOptions& options,
                   std::vector<Override>& overrides) {
  for (Override& override : overrides) {
    if (override.glob.empty()) {
      continue;
    }
    for (const std::string& name : ListPresets(override.key, SearchPathOf(path, options))) {
      if (name.find('/') == std::string::npos && MatchesGlob(override.glob, name)) {
        override.choices.push_back(Value::Scalar(name));
      }
    }
    if (override.choices.empty()) {
      return InvalidArgument(Str("override '", override.text, "': ", override.key,
                                 ": no preset matches (glob() works for groups)"));
    }
  }
  return OkStatus();
}

std::string KeyOf(const Override& override) {
  return override.package.empty() ? override.key : override.key + "@" + override.package;
}

}  // namespace

std::vector<std::string> DefaultSearchPath() {
  std::vector<std::string> candidates;
  if (const char* configured = std::getenv("HEDDLE_CONFIGS"); configured != nullptr) {
    const std::string text = configured;
    for (size_t start = 0; start <= text.size();) {
      const size_t end = std::min(text.find(':', start), text.size());
      candidates.push_back(text.substr(start, end - start));
      start = end + 1;
    }
  } else {
    std::array<char, 4096> buffer{};
    const ssize_t size = readlink("/proc/self/exe", buffer.data(), buffer.size() - 1);
    std::string folder(buffer.data(), size > 0 ? static_cast<size_t>(size) : 0);
    folder = folder.substr(0, folder.rfind('/') == std::string::npos ? 0 : folder.rfind('/'));
    candidates = {folder + "/configs", folder + "/../configs", folder + "/../../configs",
                  folder + "/../share/heddle/configs"};
  }
  std::vector<std::string> out;
  for (const std::string& path : candidates) {
    // Without the `..` of the candidates: these paths appear in every origin and message.
    std::unique_ptr<char, void (*)(void*)> real(realpath(path.c_str(), nullptr), std::free);
    if (real != nullptr && IsFolder(real.get())) {
      out.emplace_back(real.get());
    }
  }
  return out;
}

StatusOr<ResolvedConfig> Load(const std::string& path, const std::vector<std::string>& overrides,
                              const LoadOptions& options) {
  ASSIGN_OR_RETURN(std::vector<ResolvedConfig> configs, LoadSweep(path, overrides, options));
  if (configs.size() != 1 || !configs[0].sweep.empty()) {
    return InvalidArgument(Str("a sweep of ", configs.size(), " runs; one run is needed here"));
  }
  return std::move(configs[0]);
}

StatusOr<std::vector<ResolvedConfig>> LoadSweep(const std::string& path,
                                                const std::vector<std::string>& overrides,
                                                const LoadOptions& options) {
  ASSIGN_OR_RETURN(const std::string found, FindConfig(path, options));
  ASSIGN_OR_RETURN(const std::string text, ReadConfigFile(found));
  ASSIGN_OR_RETURN(const Value root, ReadYaml(text, found));
  std::vector<Override> parsed;
  const Status unreadable = ParseOverrides(overrides, &parsed);
  if (!unreadable.ok()) {
    // All problems at once: what the file and the other overrides say wrong comes after.
    for (Override& override : parsed) {
      override.choices.resize(1);
    }
    const StatusOr<ResolvedConfig> rest = Resolve(found, root, parsed, options);
    return rest.ok() ? unreadable
                     : InvalidArgument(Str(Message(unreadable), "\n", Message(rest.status())));
  }
  RETURN_IF_ERROR(ExpandGlobs(found, options, parsed));
  size_t total = 1;
  for (const Override& override : parsed) {
    total *= std::max<size_t>(1, override.choices.size());
    if (total > kSweepElementsMax) {
      return InvalidArgument(Str("a sweep of more than ", kSweepElementsMax, " runs"));
    }
  }
  std::vector<ResolvedConfig> out;
  for (size_t element = 0; element < total; ++element) {
    std::vector<Override> chosen = parsed;
    std::vector<std::string> sweep;
    size_t rest = element;
    for (size_t i = chosen.size(); i-- > 0;) {  // the last key changes fastest
      if (!chosen[i].is_sweep) {
        continue;
      }
      const Value value = chosen[i].choices[rest % parsed[i].choices.size()];
      rest /= parsed[i].choices.size();
      chosen[i].choices = {value};
      sweep.insert(sweep.begin(), Str(KeyOf(chosen[i]), "=", Shown(value)));
    }
    StatusOr<ResolvedConfig> config = Resolve(found, root, chosen, options);
    if (!config.ok()) {
      std::string where;
      for (const std::string& part : sweep) {
        where += (where.empty() ? "sweep element " : " ") + part;
      }
      return where.empty() ? config.status()
                           : InvalidArgument(Str(Message(config.status()), "\n(in ", where, ")"));
    }
    config->sweep = std::move(sweep);
    out.push_back(std::move(*config));
  }
  return out;
}

Status MergeText(const std::string& text, const std::string& source, PbMessage* message) {
  ASSIGN_OR_RETURN(const Value root, ReadYaml(text, source));
  const Schema schema(*message->GetDescriptor());
  const LoadOptions options;
  Composer composer(schema, options);
  composer.AddText(source, root);
  Problems problems = composer.problems();
  std::unique_ptr<PbMessage> merged(message->New());
  merged->CopyFrom(*message);
  for (const auto& [key, assignment] : composer.assignments()) {
    Bind(assignment.key, assignment.value, assignment.source, assignment.origin, merged.get(),
         problems);
  }
  Problems found;
  CheckRanges(*merged, found);
  std::map<std::string, std::string> origins;
  for (const auto& [key, assignment] : composer.assignments()) {
    origins[key] = assignment.origin;
  }
  Locate(found, origins, source, problems);
  RETURN_IF_ERROR(problems.ToStatus());
  message->CopyFrom(*merged);
  return OkStatus();
}

Status ApplyOverrides(const std::vector<std::string>& overrides, v1::RunConfig* config) {
  std::vector<Override> parsed;
  RETURN_IF_ERROR(ParseOverrides(overrides, &parsed));
  const Schema schema(*v1::RunConfig::descriptor());
  const LoadOptions options;
  Composer composer(schema, options);
  for (const Override& override : parsed) {
    if (override.is_sweep || override.kind == Override::Kind::kDelete) {
      return InvalidArgument(Str("override '", override.text, "': only KEY=VALUE works here"));
    }
    const std::vector<std::string>& groups = PresetGroups();
    if (std::find(groups.begin(), groups.end(), override.key) != groups.end()) {
      return InvalidArgument(Str("override '", override.text, "': a group cannot change here"));
    }
  }
  composer.AddOverrides(parsed);
  composer.Interpolate();
  Problems problems = composer.problems();
  v1::RunConfig changed = *config;
  std::map<std::string, std::string> origins;
  for (const auto& [key, assignment] : composer.assignments()) {
    Bind(assignment.key, assignment.value, "", assignment.origin, &changed, problems);
    origins[key] = assignment.origin;
  }
  FillDependentDefaults(&changed);
  FillDefaults(&changed);
  Problems found;
  CheckRanges(changed, found);
  CheckFields(changed, found);
  CheckTable(changed, found);
  Locate(found, origins, "", problems);
  RETURN_IF_ERROR(problems.ToStatus());
  *config = changed;
  return OkStatus();
}

Status Validate(const v1::RunConfig& config) {
  Problems problems;
  CheckRanges(config, problems);
  CheckFields(config, problems);
  return problems.ToStatus();
}

Status CheckImplemented(const v1::RunConfig& config) {
  Problems problems;
  CheckTable(config, problems);
  return problems.ToStatus();
}

void FillDefaults(PbMessage* message) {
  const google::protobuf::Reflection& r = *message->GetReflection();
  for (int i = 0; i < message->GetDescriptor()->field_count(); ++i) {
    const FieldDescriptor* field = message->GetDescriptor()->field(i);
    if (field->is_map()) {
      continue;
    }
    if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      if (field->is_repeated()) {
        for (int k = 0; k < r.FieldSize(*message, field); ++k) {
          FillDefaults(r.MutableRepeatedMessage(message, field, k));
        }
      } else if (r.HasField(*message, field) || !OptionsOf(*field).optional_group()) {
        FillDefaults(r.MutableMessage(message, field));
      }
      continue;
    }
    if (field->is_repeated() || r.HasField(*message, field) || !field->has_default_value()) {
      continue;
    }
    switch (field->cpp_type()) {
      case FieldDescriptor::CPPTYPE_INT32:
        r.SetInt32(message, field, field->default_value_int32());
        break;
      case FieldDescriptor::CPPTYPE_INT64:
        r.SetInt64(message, field, field->default_value_int64());
        break;
      case FieldDescriptor::CPPTYPE_UINT32:
        r.SetUInt32(message, field, field->default_value_uint32());
        break;
      case FieldDescriptor::CPPTYPE_UINT64:
        r.SetUInt64(message, field, field->default_value_uint64());
        break;
      case FieldDescriptor::CPPTYPE_DOUBLE:
        r.SetDouble(message, field, field->default_value_double());
        break;
      case FieldDescriptor::CPPTYPE_FLOAT:
        r.SetFloat(message, field, field->default_value_float());
        break;
      case FieldDescriptor::CPPTYPE_BOOL:
        r.SetBool(message, field, field->default_value_bool());
        break;
      case FieldDescriptor::CPPTYPE_ENUM:
        r.SetEnum(message, field, field->default_value_enum());
        break;
      case FieldDescriptor::CPPTYPE_STRING:
        r.SetString(message, field, field->default_value_string());
        break;
      case FieldDescriptor::CPPTYPE_MESSAGE:
        break;
    }
  }
}

std::vector<std::string> ListPresets(const std::string& group,
                                     const std::vector<std::string>& search_path) {
  std::set<std::string> names;
  std::vector<std::string> groups = {group};
  if (group.empty()) {
    groups = PresetGroups();
  }
  for (const std::string& folder : search_path) {
    for (const std::string& name : groups) {
      DIR* dir = opendir(Str(folder, "/", name).c_str());
      if (dir == nullptr) {
        continue;
      }
      while (const dirent* entry = readdir(dir)) {
        const std::string file = entry->d_name;
        if (file.size() > 5 && file[0] != '.' && file.compare(file.size() - 5, 5, ".yaml") == 0) {
          const std::string preset = file.substr(0, file.size() - 5);
          names.insert(group.empty() ? Str(name, "/", preset) : preset);
        }
      }
      closedir(dir);
    }
  }
  return {names.begin(), names.end()};
}

}  // namespace heddle::settings
