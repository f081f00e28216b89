#include "base/settings/explain.h"

#include <google/protobuf/descriptor.h>

#include "base/settings/checks.h"
#include "base/settings/json.h"
#include "base/settings/schema.h"
#include "heddle/v1/config.pb.h"

namespace heddle::settings {
namespace {

using google::protobuf::Descriptor;
using google::protobuf::FieldDescriptor;

bool IsGroup(const FieldDescriptor& field) {
  return field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE && !field.is_repeated();
}

std::string TypeOf(const FieldDescriptor& field) {
  std::string type;
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_BOOL:
      type = "true|false";
      break;
    case FieldDescriptor::CPPTYPE_ENUM:
      for (const std::string& word : EnumWords(*field.enum_type())) {
        type += (type.empty() ? "" : "|") + word;
      }
      break;
    case FieldDescriptor::CPPTYPE_STRING:
      type = "text";
      break;
    case FieldDescriptor::CPPTYPE_DOUBLE:
    case FieldDescriptor::CPPTYPE_FLOAT:
      type = "number";
      break;
    case FieldDescriptor::CPPTYPE_MESSAGE:
      type = field.is_map() ? "map of texts" : "group";
      break;
    default:
      type = "integer";
      if (!OptionsOf(field).zero_word().empty()) {
        type += "|" + OptionsOf(field).zero_word();
      }
      break;
  }
  return field.is_repeated() && !field.is_map() ? "list of " + type : type;
}

std::string RangeOf(const v1::KeyOptions& options) {
  if (!options.has_min() && !options.has_max()) {
    return "";
  }
  if (options.above_min()) {
    return Str("> ", JsonNumber(options.min()),
               options.has_max() ? ", <= " + JsonNumber(options.max()) : "");
  }
  return Str(JsonNumber(options.min()), " .. ", JsonNumber(options.max()));
}

std::string UnitOf(const v1::KeyOptions& options) {
  switch (options.unit()) {
    case v1::KeyOptions::UNIT_DURATION_MS:
      return "duration (10m, 500ms; milliseconds)";
    case v1::KeyOptions::UNIT_BYTES:
      return "bytes (64MiB)";
    case v1::KeyOptions::UNIT_TIME_MS:
      return "time (2026-11-20T23:30:00Z; milliseconds since 1970)";
    case v1::KeyOptions::UNIT_STEPS:
      return "steps";
    case v1::KeyOptions::UNIT_TOKENS:
      return "tokens";
    case v1::KeyOptions::UNIT_NONE:
      return "";
  }
  return "";
}

KeyInfo InfoOf(const KeyRef& key, const Schema& schema) {
  const FieldDescriptor& field = *key.leaf();
  const v1::KeyOptions& options = OptionsOf(field);
  KeyInfo info;
  info.key = key.canonical;
  info.type = TypeOf(field);
  info.default_value = DefaultText(field);
  info.range = RangeOf(options);
  info.unit = UnitOf(options);
  info.doc = options.doc();
  info.aliases = schema.AliasesOf(key.canonical);
  if (field.cpp_type() == FieldDescriptor::CPPTYPE_ENUM) {
    info.values = EnumWords(*field.enum_type());
  }
  info.limitation = LimitationOf(key.canonical);
  info.is_group = IsGroup(field);
  return info;
}

std::string Escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    out += c == '|' ? "\\|" : std::string(1, c);
  }
  return out;
}

std::string SchemaOf(const Descriptor& message);

std::string SchemaOfValue(const FieldDescriptor& field) {
  const v1::KeyOptions& options = OptionsOf(field);
  const bool has_unit_text = options.unit() == v1::KeyOptions::UNIT_DURATION_MS ||
                             options.unit() == v1::KeyOptions::UNIT_BYTES ||
                             options.unit() == v1::KeyOptions::UNIT_TIME_MS;
  std::string range;
  if (options.has_min()) {
    range += Str(options.above_min() ? ",\"exclusiveMinimum\":" : ",\"minimum\":",
                 JsonNumber(options.min()));
  }
  range += options.has_max() ? Str(",\"maximum\":", JsonNumber(options.max())) : "";
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_BOOL:
      return "{\"type\":\"boolean\"}";
    case FieldDescriptor::CPPTYPE_STRING:
      return "{\"type\":[\"string\",\"number\",\"boolean\"]}";
    case FieldDescriptor::CPPTYPE_DOUBLE:
    case FieldDescriptor::CPPTYPE_FLOAT:
      return Str("{\"type\":\"number\"", range, "}");
    case FieldDescriptor::CPPTYPE_ENUM: {
      std::string words;
      for (const std::string& word : EnumWords(*field.enum_type())) {
        words += (words.empty() ? "" : ",") + JsonQuote(word);
      }
      return Str("{\"enum\":[", words, "]}");
    }
    case FieldDescriptor::CPPTYPE_MESSAGE:
      if (field.is_map()) {
        return "{\"type\":\"object\",\"additionalProperties\":{\"type\":\"string\"}}";
      }
      if (!options.number_sets().empty()) {
        return Str("{\"anyOf\":[{\"type\":\"integer\",\"minimum\":1},",
                   SchemaOf(*field.message_type()), "]}");
      }
      return SchemaOf(*field.message_type());
    default: {
      const std::string number = Str("{\"type\":\"integer\"", range, "}");
      if (has_unit_text) {
        return Str("{\"anyOf\":[", number, ",{\"type\":\"string\"}]}");
      }
      return options.zero_word().empty()
                 ? number
                 : Str("{\"anyOf\":[", number, ",{\"const\":", JsonQuote(options.zero_word()),
                       "}]}");
    }
  }
}

std::string SchemaOf(const Descriptor& message) {
  std::string properties;
  for (int i = 0; i < message.field_count(); ++i) {
    const FieldDescriptor& field = *message.field(i);
    std::string value = SchemaOfValue(field);
    if (field.is_repeated() && !field.is_map()) {
      value = Str("{\"type\":\"array\",\"items\":", value, "}");
    }
    const std::string doc = Str("{\"description\":", JsonQuote(OptionsOf(field).doc()), ",");
    properties +=
        Str(properties.empty() ? "" : ",", JsonQuote(field.name()), ":", doc, value.substr(1));
  }
  return Str("{\"type\":\"object\",\"additionalProperties\":false,\"properties\":{", properties,
             "}}");
}

}  // namespace

std::vector<KeyInfo> AllKeys() {
  const Schema schema(*v1::RunConfig::descriptor());
  std::vector<KeyInfo> out;
  for (const KeyRef& key : schema.keys()) {
    out.push_back(InfoOf(key, schema));
  }
  return out;
}

StatusOr<std::vector<KeyInfo>> Explain(const std::string& key) {
  const Schema schema(*v1::RunConfig::descriptor());
  const StatusOr<KeyRef> found = schema.Find(key);
  if (!found.ok()) {
    return NotFound(Str(key.substr(0, 100), ": ", Message(found.status())));
  }
  const std::string below = found->canonical + ".";
  std::vector<KeyInfo> out;
  for (const KeyRef& candidate : schema.keys()) {
    if (candidate.canonical == found->canonical ||
        candidate.canonical.compare(0, below.size(), below) == 0) {
      out.push_back(InfoOf(candidate, schema));
    }
  }
  if (out.empty()) {  // a key of a map
    out.push_back(InfoOf(*found, schema));
  }
  return out;
}

std::string ReferencePage() {
  std::string out =
      "# Configuration reference\n\nGenerated by `heddle config reference` from "
      "`proto/heddle/v1/config.proto`.\n";
  std::string group = "?";
  for (const KeyInfo& info : AllKeys()) {
    const std::string top = info.key.substr(0, info.key.find('.'));
    const bool alone = info.key.find('.') == std::string::npos && !info.is_group;
    if (info.is_group && info.key == top) {
      out += Str("\n## ", top, "\n\n", info.doc, "\n\n");
    } else if (alone && group == "?") {
      out += "\n## top level\n\n";
    }
    if ((info.is_group && info.key == top) || (alone && group == "?")) {
      out += "| key | type | default | range | unit | meaning |\n|---|---|---|---|---|---|\n";
    }
    group = top;
    if (info.is_group) {
      continue;
    }
    std::string doc = info.doc;
    std::string aliases;
    for (const std::string& alias : info.aliases) {
      aliases += (aliases.empty() ? " Also `" : ", `") + alias + "`";
    }
    doc += aliases + (aliases.empty() ? "" : ".");
    doc += info.limitation.empty() ? "" : " *Limit: " + info.limitation + ".*";
    out += Str("| `", info.key, "` | ", Escaped(info.type), " | ",
               info.default_value.empty() ? "" : Str("`", info.default_value, "`"), " | ",
               info.range, " | ", info.unit, " | ", Escaped(doc), " |\n");
  }
  return out;
}

std::string JsonSchema() {
  const std::string body = SchemaOf(*v1::RunConfig::descriptor());
  // The defaults list stands beside the keys of the message.
  const std::string marker = "\"properties\":{";
  const size_t at = body.find(marker) + marker.size();
  return Str(
      "{\"$schema\":\"https://json-schema.org/draft/2020-12/schema\",\"title\":\"heddle run\",",
      body.substr(1, at - 1),
      "\"defaults\":{\"type\":\"array\",\"description\":\"Presets of groups and _self_.\"},",
      body.substr(at));
}

}  // namespace heddle::settings
