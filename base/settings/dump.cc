// Deterministic YAML of a message, and the hash of a config.
#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>
#include <xxhash.h>

#include <algorithm>
#include <cstdio>

#include "base/settings/bind.h"
#include "base/settings/json.h"
#include "base/settings/scalar.h"
#include "base/settings/settings.h"

namespace heddle::settings {
namespace {

using google::protobuf::FieldDescriptor;
using PbMessage = google::protobuf::Message;

// Texts in double quotes unless they are plainly words, paths or names in YAML too.
std::string Quoted(const std::string& text) {
  const bool plain =
      !text.empty() && text != "null" && text != "true" && text != "false" && text != "~" &&
      ((text[0] >= 'a' && text[0] <= 'z') || (text[0] >= 'A' && text[0] <= 'Z') ||
       text[0] == '/') &&
      std::all_of(text.begin(), text.end(), [](char c) {
        return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') ||
               c == '-' || c == '_' || c == '.' || c == '/' || c == '@';
      });
  return plain ? text : JsonQuote(text);
}

std::string Element(const PbMessage& message, const FieldDescriptor& field, int i) {
  const std::string text = ScalarText(message, field, i);
  return field.cpp_type() == FieldDescriptor::CPPTYPE_STRING ? Quoted(text) : text;
}

class YamlPrinter {
 public:
  explicit YamlPrinter(const std::map<std::string, std::string>* origins) : origins_(origins) {}

  void Print(const PbMessage& message, const std::string& prefix, int level) {
    const google::protobuf::Reflection& reflection = *message.GetReflection();
    std::vector<const FieldDescriptor*> fields;
    reflection.ListFields(message, &fields);
    for (const FieldDescriptor* field : fields) {
      const std::string key = prefix.empty() ? field->name() : prefix + "." + field->name();
      if (field->is_map()) {
        PrintMap(message, *field, key, level);
      } else if (field->is_repeated()) {
        std::string list = "[";
        for (int i = 0; i < reflection.FieldSize(message, field); ++i) {
          list += (i == 0 ? "" : ", ") + Element(message, *field, i);
        }
        Line(level, field->name(), list + "]", key);
      } else if (field->cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
        const PbMessage& group = reflection.GetMessage(message, field);
        const size_t before = out_.size();
        Line(level, field->name(), "", "");
        const size_t after = out_.size();
        Print(group, key, level + 1);
        if (out_.size() == after) {
          out_.resize(before);
          Line(level, field->name(), "{}", key);
        }
      } else {
        Line(level, field->name(), Element(message, *field, -1), key);
      }
    }
  }

  std::string Take() { return std::move(out_); }

 private:
  void PrintMap(const PbMessage& message, const FieldDescriptor& field, const std::string& key,
                int level) {
    const google::protobuf::Reflection& reflection = *message.GetReflection();
    const FieldDescriptor* entry_key = field.message_type()->map_key();
    const FieldDescriptor* entry_value = field.message_type()->map_value();
    std::map<std::string, std::string> sorted;
    for (int i = 0; i < reflection.FieldSize(message, &field); ++i) {
      const PbMessage& entry = reflection.GetRepeatedMessage(message, &field, i);
      sorted[ScalarText(entry, *entry_key, -1)] = Element(entry, *entry_value, -1);
    }
    Line(level, field.name(), "", "");
    for (const auto& [name, value] : sorted) {
      Line(level + 1, Quoted(name), value, Str(key, ".", name));
    }
  }

  void Line(int level, const std::string& name, const std::string& value, const std::string& key) {
    std::string line(static_cast<size_t>(2 * level), ' ');
    line += name + ":" + (value.empty() ? "" : " " + value);
    if (origins_ != nullptr && !key.empty()) {
      const auto found = origins_->find(key);
      if (found != origins_->end()) {
        line.resize(std::max<size_t>(line.size() + 2, 44), ' ');
        line += "# " + found->second;
      }
    }
    out_ += line + "\n";
  }

  const std::map<std::string, std::string>* origins_;
  std::string out_;
};

}  // namespace

std::string ToYaml(const PbMessage& message, const std::map<std::string, std::string>* origins) {
  YamlPrinter printer(origins);
  printer.Print(message, "", 0);
  return printer.Take();
}

std::string ConfigHash(const v1::RunConfig& config) {
  v1::RunConfig copy = config;
  FillDefaults(&copy);
  copy.clear_name();
  copy.clear_schedule();
  copy.clear_logging();
  const std::string text = ToYaml(copy);
  const XXH128_hash_t hash = XXH3_128bits(text.data(), text.size());
  char buffer[33];
  std::snprintf(buffer, sizeof(buffer), "%016llx%016llx",
                static_cast<unsigned long long>(hash.high64),
                static_cast<unsigned long long>(hash.low64));
  return buffer;
}

}  // namespace heddle::settings
