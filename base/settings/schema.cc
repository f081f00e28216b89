#include "base/settings/schema.h"

#include <google/protobuf/descriptor.h>

#include <algorithm>

#include "base/settings/json.h"
#include "heddle/v1/config.pb.h"

namespace heddle::settings {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::EnumDescriptor;
using google::protobuf::FieldDescriptor;

constexpr int kGroupDepthMax = 16;
constexpr size_t kNameBytesMax = 100;  // longer ones are no misspellings

bool IsGroup(const FieldDescriptor& field) {
  return field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE && !field.is_repeated();
}

std::string Join(const std::string& prefix, const std::string& name) {
  return prefix.empty() ? name : prefix + "." + name;
}

std::string LastPart(const std::string& dotted) { return dotted.substr(dotted.rfind('.') + 1); }

}  // namespace

const v1::KeyOptions& OptionsOf(const FieldDescriptor& field) {
  return field.options().GetExtension(v1::key);
}

std::vector<std::string> EnumWords(const EnumDescriptor& type) {
  std::vector<std::string> words;
  for (int i = 0; i < type.value_count(); ++i) {
    words.push_back(EnumText(*type.value(i)));
  }
  return words;
}

std::string DefaultText(const FieldDescriptor& field) {
  if (field.is_repeated()) {
    return "";
  }
  const std::string& zero_word = OptionsOf(field).zero_word();
  const auto integer = [&](auto value) {
    return value == 0 && !zero_word.empty() ? zero_word : Str(value);
  };
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      return integer(field.default_value_int32());
    case FieldDescriptor::CPPTYPE_INT64:
      return integer(field.default_value_int64());
    case FieldDescriptor::CPPTYPE_UINT32:
      return integer(field.default_value_uint32());
    case FieldDescriptor::CPPTYPE_UINT64:
      return integer(field.default_value_uint64());
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return JsonNumber(field.default_value_double());
    case FieldDescriptor::CPPTYPE_FLOAT:
      return JsonNumber(field.default_value_float());
    case FieldDescriptor::CPPTYPE_BOOL:
      return field.default_value_bool() ? "true" : "false";
    case FieldDescriptor::CPPTYPE_ENUM:
      return EnumText(*field.default_value_enum());
    case FieldDescriptor::CPPTYPE_STRING:
      return field.default_value_string();
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return "";
  }
  return "";
}

int EditDistance(const std::string& a, const std::string& b) {
  std::vector<std::vector<int>> d(a.size() + 1, std::vector<int>(b.size() + 1));
  for (size_t i = 0; i <= a.size(); ++i) {
    for (size_t j = 0; j <= b.size(); ++j) {
      if (i == 0 || j == 0) {
        d[i][j] = static_cast<int>(i + j);
        continue;
      }
      d[i][j] = std::min(
          {d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) {
        d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
      }
    }
  }
  return d[a.size()][b.size()];
}

std::string NearestOf(const std::string& name, const std::vector<std::string>& candidates) {
  if (name.empty() || name.size() > kNameBytesMax) {
    return "";
  }
  std::string best;
  int best_distance = 1 + static_cast<int>(std::max<size_t>(1, name.size() / 3));
  for (const std::string& candidate : candidates) {
    const int distance = EditDistance(name, candidate);
    if (distance < best_distance) {
      best = candidate;
      best_distance = distance;
    }
  }
  return best;
}

Schema::Schema(const Descriptor& root) {
  // A group of RunConfig read alone still knows the aliases that are paths from RunConfig's root.
  const Descriptor& run = *v1::RunConfig::descriptor();
  for (int i = 0; i < run.field_count(); ++i) {
    const FieldDescriptor& field = *run.field(i);
    if (IsGroup(field) && field.message_type() == &root) {
      alias_root_ = "/" + field.name() + ".";
    }
  }
  if (&root == &run) {
    alias_root_ = "/";
  }
  Walk(root, KeyRef{});
}

void Schema::Walk(const Descriptor& message, const KeyRef& prefix) {
  HEDDLE_CHECK(prefix.fields.size() < kGroupDepthMax, "recursive message ", message.full_name());
  for (int i = 0; i < message.field_count(); ++i) {
    const FieldDescriptor& field = *message.field(i);
    KeyRef key = prefix;
    key.canonical = Join(prefix.canonical, field.name());
    key.fields.push_back(&field);
    index_[key.canonical] = keys_.size();
    keys_.push_back(key);
    AddAliases(field, key, prefix.canonical);
    if (IsGroup(field)) {
      Walk(*field.message_type(), key);
    }
  }
}

void Schema::AddAliases(const FieldDescriptor& field, const KeyRef& key,
                        const std::string& parent) {
  for (const std::string& alias : OptionsOf(field).alias()) {
    if (alias[0] != '/') {
      aliases_[Join(parent, alias)] = key.canonical;
    } else if (!alias_root_.empty() && alias.compare(0, alias_root_.size(), alias_root_) == 0) {
      aliases_[alias.substr(alias_root_.size())] = key.canonical;
    }
  }
}

const KeyRef* Schema::Canonical(const std::string& dotted) const {
  const auto found = index_.find(dotted);
  return found == index_.end() ? nullptr : &keys_[found->second];
}

StatusOr<KeyRef> Schema::Find(const std::string& dotted) const {
  std::string path = dotted;
  for (int round = 0; round < kGroupDepthMax; ++round) {
    if (const KeyRef* key = Canonical(path)) {
      return *key;
    }
    // Longest prefix that is known: the rest is a map key, or the prefix is an alias.
    bool replaced = false;
    for (size_t end = path.size(); end != std::string::npos && end > 0;
         end = path.rfind('.', end - 1)) {
      const std::string prefix = path.substr(0, end);
      const KeyRef* key = Canonical(prefix);
      if (key != nullptr && key->leaf()->is_map() && end + 1 < path.size()) {
        KeyRef member = *key;
        member.canonical = path;
        member.map_key = path.substr(end + 1);
        return member;
      }
      if (const auto alias = aliases_.find(prefix); alias != aliases_.end()) {
        path = alias->second + path.substr(end);
        replaced = true;
        break;
      }
      if (end == 0) {
        break;
      }
    }
    if (!replaced) {
      break;
    }
  }
  const std::string nearest = Nearest(dotted);
  return NotFound(nearest.empty() ? std::string("unknown key")
                                  : Str("unknown key (nearest name: ", nearest, ")"));
}

std::vector<std::string> Schema::AliasesOf(const std::string& canonical) const {
  std::vector<std::string> out;
  for (const auto& [alias, target] : aliases_) {
    if (target == canonical) {
      out.push_back(alias);
    }
  }
  return out;
}

std::string Schema::Nearest(const std::string& dotted) const {
  if (dotted.size() > kNameBytesMax) {
    return "";
  }
  std::vector<std::string> names;
  std::vector<std::string> siblings;
  const std::string parent = dotted.substr(0, dotted.rfind('.') + 1);  // with the dot, or whole
  const bool at_root = dotted.find('.') == std::string::npos;
  const auto consider = [&](const std::string& key) {
    names.push_back(key);
    const bool sibling = at_root ? key.find('.') == std::string::npos
                                 : key.compare(0, parent.size(), parent) == 0 &&
                                       key.find('.', parent.size()) == std::string::npos;
    if (sibling) {
      siblings.push_back(key);
    }
  };
  for (const KeyRef& key : keys_) {
    consider(key.canonical);
  }
  for (const auto& alias : aliases_) {
    consider(alias.first);
  }
  // A misspelt last part first, then the right name in another group, then anything near.
  const std::string last = LastPart(dotted);
  std::vector<std::string> sibling_names;
  for (const std::string& sibling : siblings) {
    sibling_names.push_back(LastPart(sibling));
  }
  if (const std::string near = NearestOf(last, sibling_names); !near.empty()) {
    return (at_root ? "" : parent) + near;
  }
  for (const KeyRef& key : keys_) {
    if (LastPart(key.canonical) == last) {
      return key.canonical;
    }
  }
  if (const std::string near = NearestOf(dotted, names); !near.empty()) {
    return near;
  }
  std::vector<std::string> last_names;
  for (const KeyRef& key : keys_) {
    last_names.push_back(LastPart(key.canonical));
  }
  const std::string near = NearestOf(last, last_names);
  for (const KeyRef& key : keys_) {
    if (!near.empty() && LastPart(key.canonical) == near) {
      return key.canonical;
    }
  }
  return "";
}

}  // namespace heddle::settings
