#include "base/settings/json.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <vector>

#include "base/settings/utf8.h"

namespace heddle::settings {
namespace {

using google::protobuf::EnumValueDescriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;

std::string Hex(const std::string& bytes) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  out.reserve(2 * bytes.size());
  for (const char c : bytes) {
    const unsigned char byte = static_cast<unsigned char>(c);
    out += kDigits[byte >> 4];
    out += kDigits[byte & 15];
  }
  return out;
}

// These exceed 2^53 by nature; a reader that uses doubles would lose digits.
bool IsBigIdentity(const FieldDescriptor& field) {
  const std::string& name = field.name();
  return name == "batch_hash" || name == "fence" ||
         (name.size() > 6 && name.compare(name.size() - 6, 6, "_fence") == 0);
}

std::string Integer(const FieldDescriptor& field, const std::string& digits) {
  return IsBigIdentity(field) ? JsonQuote(digits) : digits;
}

class Printer {
 public:
  explicit Printer(const JsonOptions& options) : options_(options) {}

  void Print(const Message& message) {
    Open('{');
    const auto* descriptor = message.GetDescriptor();
    const Reflection& reflection = *message.GetReflection();
    std::vector<const FieldDescriptor*> fields;
    for (int i = 0; i < descriptor->field_count(); ++i) {
      fields.push_back(descriptor->field(i));
    }
    std::sort(fields.begin(), fields.end(),
              [](const auto* a, const auto* b) { return a->number() < b->number(); });
    for (const FieldDescriptor* field : fields) {
      const bool set = field->is_repeated() ? reflection.FieldSize(message, field) > 0
                                            : reflection.HasField(message, field);
      if (options_.omit.count(field->name()) > 0 || (!set && !options_.print_unset)) {
        continue;
      }
      Separate();
      Name(field->name());
      PrintField(message, *field, set);
    }
    Close('}');
  }

  std::string Take() { return std::move(out_); }

 private:
  void PrintField(const Message& message, const FieldDescriptor& field, bool set) {
    const Reflection& reflection = *message.GetReflection();
    if (field.is_map()) {
      PrintMap(message, field);
    } else if (field.is_repeated()) {
      Open('[');
      for (int i = 0; i < reflection.FieldSize(message, &field); ++i) {
        Separate();
        PrintValue(message, field, i);
      }
      Close(']');
    } else if (!set) {
      out_ += "null";
    } else {
      PrintValue(message, field, -1);
    }
  }

  // Sorted by key: a map has no order of its own.
  void PrintMap(const Message& message, const FieldDescriptor& field) {
    const Reflection& reflection = *message.GetReflection();
    const FieldDescriptor* key = field.message_type()->map_key();
    const FieldDescriptor* value = field.message_type()->map_value();
    std::vector<std::pair<std::string, std::string>> entries;
    for (int i = 0; i < reflection.FieldSize(message, &field); ++i) {
      const Message& entry = reflection.GetRepeatedMessage(message, &field, i);
      Printer key_printer(options_);
      key_printer.PrintValue(entry, *key, -1);
      Printer value_printer(options_);
      value_printer.level_ = level_ + 1;
      value_printer.PrintValue(entry, *value, -1);
      std::string name = key_printer.Take();
      entries.emplace_back(name[0] == '"' ? name : JsonQuote(name), value_printer.Take());
    }
    std::sort(entries.begin(), entries.end());
    Open('{');
    for (const auto& [name, text] : entries) {
      Separate();
      out_ += name;
      out_ += options_.indent > 0 ? ": " : ":";
      out_ += text;
    }
    Close('}');
  }

  // Element `i` of a repeated field, or the value of a singular one (-1).
  void PrintValue(const Message& message, const FieldDescriptor& field, int i) {
    const Reflection& r = *message.GetReflection();
    const bool one = i < 0;
    switch (field.cpp_type()) {
      case FieldDescriptor::CPPTYPE_INT32:
        out_ += Integer(
            field, Str(one ? r.GetInt32(message, &field) : r.GetRepeatedInt32(message, &field, i)));
        return;
      case FieldDescriptor::CPPTYPE_INT64:
        out_ += Integer(
            field, Str(one ? r.GetInt64(message, &field) : r.GetRepeatedInt64(message, &field, i)));
        return;
      case FieldDescriptor::CPPTYPE_UINT32:
        out_ += Integer(field, Str(one ? r.GetUInt32(message, &field)
                                       : r.GetRepeatedUInt32(message, &field, i)));
        return;
      case FieldDescriptor::CPPTYPE_UINT64:
        out_ += Integer(field, Str(one ? r.GetUInt64(message, &field)
                                       : r.GetRepeatedUInt64(message, &field, i)));
        return;
      case FieldDescriptor::CPPTYPE_DOUBLE:
        out_ += JsonNumber(one ? r.GetDouble(message, &field)
                               : r.GetRepeatedDouble(message, &field, i));
        return;
      case FieldDescriptor::CPPTYPE_FLOAT:
        PrintFloat(one ? r.GetFloat(message, &field) : r.GetRepeatedFloat(message, &field, i));
        return;
      case FieldDescriptor::CPPTYPE_BOOL:
        out_ += (one ? r.GetBool(message, &field) : r.GetRepeatedBool(message, &field, i))
                    ? "true"
                    : "false";
        return;
      case FieldDescriptor::CPPTYPE_ENUM:
        out_ += JsonQuote(
            EnumText(one ? *r.GetEnum(message, &field) : *r.GetRepeatedEnum(message, &field, i)));
        return;
      case FieldDescriptor::CPPTYPE_STRING: {
        const std::string text =
            one ? r.GetString(message, &field) : r.GetRepeatedString(message, &field, i);
        out_ += JsonQuote(field.type() == FieldDescriptor::TYPE_BYTES ? Hex(text) : text);
        return;
      }
      case FieldDescriptor::CPPTYPE_MESSAGE:
        Print(one ? r.GetMessage(message, &field) : r.GetRepeatedMessage(message, &field, i));
        return;
    }
  }

  void PrintFloat(float value) {
    char buffer[32];
    if (!std::isfinite(value)) {
      out_ += "null";
      return;
    }
    const auto end = std::to_chars(buffer, buffer + sizeof(buffer), value);
    out_.append(buffer, end.ptr);
  }

  void Open(char bracket) {
    out_ += bracket;
    ++level_;
    first_ = true;
  }
  void Close(char bracket) {
    --level_;
    if (!first_) {
      NewLine();
    }
    out_ += bracket;
    first_ = false;
  }
  void Separate() {
    out_ += first_ ? "" : ",";
    first_ = false;
    NewLine();
  }
  void NewLine() {
    if (options_.indent > 0) {
      out_ += '\n';
      out_.append(static_cast<size_t>(level_ * options_.indent), ' ');
    }
  }
  void Name(const std::string& name) {
    out_ += JsonQuote(name) + (options_.indent > 0 ? ": " : ":");
  }

  const JsonOptions& options_;
  std::string out_;
  int level_ = 0;
  bool first_ = true;
};

}  // namespace

std::string ToJson(const Message& message, const JsonOptions& options) {
  Printer printer(options);
  printer.Print(message);
  return printer.Take();
}

std::string JsonQuote(const std::string& text) {
  static constexpr char kDigits[] = "0123456789abcdef";
  std::string out = "\"";
  size_t i = 0;
  while (i < text.size()) {
    const size_t length = Utf8Length(text, i);
    const char c = text[i];
    if (length == 0) {
      out += "\xEF\xBF\xBD";
    } else if (length > 1) {
      out.append(text, i, length);
    } else if (c == '"' || c == '\\') {
      out += '\\';
      out += c;
    } else if (c == '\n' || c == '\r' || c == '\t') {
      out += c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t";
    } else if (static_cast<unsigned char>(c) < 0x20 || c == 0x7F) {
      out += "\\u00";
      out += kDigits[(c >> 4) & 15];
      out += kDigits[c & 15];
    } else {
      out += c;
    }
    i += std::max<size_t>(length, 1);
  }
  return out + "\"";
}

std::string JsonNumber(double value) {
  if (!std::isfinite(value)) {
    return "null";
  }
  if (value == 0 && std::signbit(value)) {
    return "-0.0";  // readers take "-0" for the integer 0
  }
  char buffer[32];
  const auto end = std::to_chars(buffer, buffer + sizeof(buffer), value);
  return std::string(buffer, end.ptr);
}

std::string EnumText(const EnumValueDescriptor& value, bool upper) {
  // FFN_SWIGLU of enum Ffn, CHECKPOINT_STATE_OPEN of enum CheckpointState.
  std::string prefix;
  for (const char c : value.type()->name()) {
    if (c >= 'A' && c <= 'Z') {
      prefix += prefix.empty() ? "" : "_";
      prefix += c;
    } else {
      prefix += c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c;
    }
  }
  prefix += '_';
  std::string text = value.name();
  if (text.compare(0, prefix.size(), prefix) == 0) {
    text = text.substr(prefix.size());
  }
  if (!upper) {
    std::transform(text.begin(), text.end(), text.begin(), [](char c) {
      return c >= 'A' && c <= 'Z' ? static_cast<char>(c - 'A' + 'a') : c;
    });
  }
  return text;
}

}  // namespace heddle::settings
