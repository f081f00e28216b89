#include "base/settings/bind.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <algorithm>
#include <limits>
#include <set>

#include "base/settings/json.h"
#include "base/settings/scalar.h"

namespace heddle::settings {
namespace {

using google::protobuf::EnumValueDescriptor;
using google::protobuf::FieldDescriptor;
using PbMessage = google::protobuf::Message;
using google::protobuf::Reflection;

// Where problems of one assignment go.
struct Context {
  const std::string& source;
  const std::string& where;
  Problems& problems;

  void Add(const Value& value, const std::string& key, const std::string& text) const {
    const bool has_position = !source.empty() && value.line > 0;
    problems.Add(has_position ? Str(source, ":", value.line, ":", value.column) : where, key, text);
  }
};

std::string EnumList(const FieldDescriptor& field) {
  std::string out;
  for (const std::string& word : EnumWords(*field.enum_type())) {
    out += (out.empty() ? "" : ", ") + word;
  }
  return out;
}

Status SetInteger(PbMessage* message, const FieldDescriptor& field, int64_t value) {
  const Reflection& r = *message->GetReflection();
  const bool list = field.is_repeated();
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      if (value < std::numeric_limits<int32_t>::min() ||
          value > std::numeric_limits<int32_t>::max()) {
        return InvalidArgument(Str("the number ", value, " is too large"));
      }
      list ? r.AddInt32(message, &field, static_cast<int32_t>(value))
           : r.SetInt32(message, &field, static_cast<int32_t>(value));
      return OkStatus();
    case FieldDescriptor::CPPTYPE_UINT32:
      if (value < 0 || value > std::numeric_limits<uint32_t>::max()) {
        return InvalidArgument(Str("the number ", value, " is out of range"));
      }
      list ? r.AddUInt32(message, &field, static_cast<uint32_t>(value))
           : r.SetUInt32(message, &field, static_cast<uint32_t>(value));
      return OkStatus();
    case FieldDescriptor::CPPTYPE_UINT64:
      if (value < 0) {
        return InvalidArgument("must not be negative");
      }
      list ? r.AddUInt64(message, &field, static_cast<uint64_t>(value))
           : r.SetUInt64(message, &field, static_cast<uint64_t>(value));
      return OkStatus();
    default:
      list ? r.AddInt64(message, &field, value) : r.SetInt64(message, &field, value);
      return OkStatus();
  }
}

Status SetEnum(PbMessage* message, const FieldDescriptor& field, const std::string& text) {
  const Reflection& r = *message->GetReflection();
  for (int i = 0; i < field.enum_type()->value_count(); ++i) {
    const EnumValueDescriptor* value = field.enum_type()->value(i);
    if (EnumText(*value) == text) {
      field.is_repeated() ? r.AddEnum(message, &field, value) : r.SetEnum(message, &field, value);
      return OkStatus();
    }
  }
  const std::string nearest = NearestOf(text, EnumWords(*field.enum_type()));
  return InvalidArgument(Str("needs one of ", EnumList(field), " (is '", text.substr(0, 40), "'",
                             nearest.empty() ? "" : "; nearest name: ", nearest, ")"));
}

// Sets or, for a repeated field, appends one scalar.
Status SetScalar(PbMessage* message, const FieldDescriptor& field, const Value& value) {
  const Reflection& r = *message->GetReflection();
  const bool list = field.is_repeated();
  if (value.kind == Value::Kind::kNull) {
    return InvalidArgument("has no value (leave the key out for its default)");
  }
  if (value.kind != Value::Kind::kScalar) {
    return InvalidArgument(Str("needs one value (is ", Shown(value), ")"));
  }
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_DOUBLE:
    case FieldDescriptor::CPPTYPE_FLOAT: {
      ASSIGN_OR_RETURN(const double number, ParseNumber(value.text));
      if (field.cpp_type() == FieldDescriptor::CPPTYPE_FLOAT) {
        const float narrow = static_cast<float>(number);
        list ? r.AddFloat(message, &field, narrow) : r.SetFloat(message, &field, narrow);
      } else {
        list ? r.AddDouble(message, &field, number) : r.SetDouble(message, &field, number);
      }
      return OkStatus();
    }
    case FieldDescriptor::CPPTYPE_BOOL: {
      ASSIGN_OR_RETURN(const bool flag, ParseBool(value.text));
      list ? r.AddBool(message, &field, flag) : r.SetBool(message, &field, flag);
      return OkStatus();
    }
    case FieldDescriptor::CPPTYPE_ENUM:
      return SetEnum(message, field, value.text);
    case FieldDescriptor::CPPTYPE_STRING:
      list ? r.AddString(message, &field, value.text) : r.SetString(message, &field, value.text);
      return OkStatus();
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return InvalidArgument(Str("is a group, not a value (is ", Shown(value), ")"));
    default: {
      ASSIGN_OR_RETURN(const int64_t number, ParseInteger(value.text, OptionsOf(field)));
      return SetInteger(message, field, number);
    }
  }
}

void BindMembers(const Value& value, const std::string& key, const Context& context,
                 PbMessage* message);

// One element of a list of messages.
void BindElement(const Value& value, const std::string& key, const Context& context,
                 PbMessage* message) {
  if (value.kind != Value::Kind::kMap) {
    context.Add(value, key, Str("needs a map of keys (is ", Shown(value), ")"));
    return;
  }
  BindMembers(value, key, context, message);
}

void BindList(const Value& value, const std::string& key, const FieldDescriptor& field,
              const Context& context, PbMessage* message) {
  const Reflection& reflection = *message->GetReflection();
  reflection.ClearField(message, &field);
  if (value.kind != Value::Kind::kList) {
    context.Add(value, key, Str("needs a list such as [a, b] (is ", Shown(value), ")"));
    return;
  }
  for (size_t i = 0; i < value.items.size(); ++i) {
    const std::string element = Str(key, "[", i, "]");
    if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
      BindElement(value.items[i], element, context, reflection.AddMessage(message, &field));
    } else if (Status status = SetScalar(message, field, value.items[i]); !status.ok()) {
      context.Add(value.items[i], element, Message(status));
    }
  }
}

void BindMapEntry(const Value& value, const std::string& key, const std::string& name,
                  const FieldDescriptor& field, const Context& context, PbMessage* message) {
  const Reflection& reflection = *message->GetReflection();
  const FieldDescriptor* entry_key = field.message_type()->map_key();
  const FieldDescriptor* entry_value = field.message_type()->map_value();
  PbMessage* entry = nullptr;
  for (int i = 0; i < reflection.FieldSize(*message, &field); ++i) {
    PbMessage* known = reflection.MutableRepeatedMessage(message, &field, i);
    if (known->GetReflection()->GetString(*known, entry_key) == name) {
      entry = known;
    }
  }
  if (entry == nullptr) {
    entry = reflection.AddMessage(message, &field);
    entry->GetReflection()->SetString(entry, entry_key, name);
  }
  if (Status status = SetScalar(entry, *entry_value, value); !status.ok()) {
    context.Add(value, key, Message(status));
  }
}

void BindField(const Value& value, const std::string& key, const FieldDescriptor& field,
               const Context& context, PbMessage* message) {
  if (field.is_map()) {
    if (value.kind != Value::Kind::kMap) {
      context.Add(value, key, Str("needs a map of keys (is ", Shown(value), ")"));
      return;
    }
    message->GetReflection()->ClearField(message, &field);
    for (const auto& [name, member] : value.members) {
      BindMapEntry(member, key + "." + name.text, name.text, field, context, message);
    }
  } else if (field.is_repeated()) {
    BindList(value, key, field, context, message);
  } else if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
    PbMessage* group = message->GetReflection()->MutableMessage(message, &field);
    if (value.kind == Value::Kind::kMap) {
      BindMembers(value, key, context, group);
    } else if (value.kind != Value::Kind::kNull) {
      context.Add(value, key, Str("is a group of keys, not a value (is ", Shown(value), ")"));
    }
  } else if (Status status = SetScalar(message, field, value); !status.ok()) {
    context.Add(value, key, Message(status));
  }
}

// The keys of a map against a message that is an element of a list: no aliases, no dots.
void BindMembers(const Value& value, const std::string& key, const Context& context,
                 PbMessage* message) {
  for (const auto& [name, member] : value.members) {
    const FieldDescriptor* field = message->GetDescriptor()->FindFieldByName(name.text);
    Value at = member;
    at.line = name.line;
    at.column = name.column;
    if (field == nullptr) {
      std::vector<std::string> names;
      for (int i = 0; i < message->GetDescriptor()->field_count(); ++i) {
        names.push_back(message->GetDescriptor()->field(i)->name());
      }
      const std::string nearest = NearestOf(name.text, names);
      context.Add(
          at, key + "." + name.text,
          nearest.empty() ? "unknown key" : Str("unknown key (nearest name: ", nearest, ")"));
      continue;
    }
    BindField(member, key + "." + name.text, *field, context, message);
  }
}

}  // namespace

void Bind(const KeyRef& key, const Value& value, const std::string& source,
          const std::string& where, PbMessage* root, Problems& problems) {
  const Context context{source, where, problems};
  PbMessage* message = root;
  for (size_t i = 0; i + 1 < key.fields.size(); ++i) {
    message = message->GetReflection()->MutableMessage(message, key.fields[i]);
  }
  if (!key.map_key.empty()) {
    BindMapEntry(value, key.canonical, key.map_key, *key.leaf(), context, message);
  } else {
    BindField(value, key.canonical, *key.leaf(), context, message);
  }
}

const PbMessage* FindParent(const KeyRef& key, const PbMessage& root) {
  const PbMessage* message = &root;
  for (size_t i = 0; i + 1 < key.fields.size(); ++i) {
    if (!message->GetReflection()->HasField(*message, key.fields[i])) {
      return nullptr;
    }
    message = &message->GetReflection()->GetMessage(*message, key.fields[i]);
  }
  return message;
}

std::string ScalarText(const PbMessage& message, const FieldDescriptor& field, int i) {
  const Reflection& r = *message.GetReflection();
  const bool one = i < 0;
  const auto integer = [&](auto value) {
    const std::string& zero_word = OptionsOf(field).zero_word();
    return value == 0 && !zero_word.empty() ? zero_word : Str(value);
  };
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_INT32:
      return integer(one ? r.GetInt32(message, &field) : r.GetRepeatedInt32(message, &field, i));
    case FieldDescriptor::CPPTYPE_INT64:
      return integer(one ? r.GetInt64(message, &field) : r.GetRepeatedInt64(message, &field, i));
    case FieldDescriptor::CPPTYPE_UINT32:
      return integer(one ? r.GetUInt32(message, &field) : r.GetRepeatedUInt32(message, &field, i));
    case FieldDescriptor::CPPTYPE_UINT64:
      return integer(one ? r.GetUInt64(message, &field) : r.GetRepeatedUInt64(message, &field, i));
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return JsonNumber(one ? r.GetDouble(message, &field)
                            : r.GetRepeatedDouble(message, &field, i));
    case FieldDescriptor::CPPTYPE_FLOAT:
      return JsonNumber(one ? r.GetFloat(message, &field) : r.GetRepeatedFloat(message, &field, i));
    case FieldDescriptor::CPPTYPE_BOOL:
      return (one ? r.GetBool(message, &field) : r.GetRepeatedBool(message, &field, i)) ? "true"
                                                                                        : "false";
    case FieldDescriptor::CPPTYPE_ENUM:
      return EnumText(one ? *r.GetEnum(message, &field) : *r.GetRepeatedEnum(message, &field, i));
    case FieldDescriptor::CPPTYPE_STRING:
      return one ? r.GetString(message, &field) : r.GetRepeatedString(message, &field, i);
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return ToJson(one ? r.GetMessage(message, &field) : r.GetRepeatedMessage(message, &field, i));
  }
  return "";
}

std::string FieldText(const KeyRef& key, const PbMessage& root) {
  const PbMessage* parent = FindParent(key, root);
  const FieldDescriptor& field = *key.leaf();
  if (parent == nullptr) {
    return DefaultText(field);
  }
  if (!field.is_repeated()) {
    return ScalarText(*parent, field, -1);
  }
  std::string out = "[";
  for (int i = 0; i < parent->GetReflection()->FieldSize(*parent, &field); ++i) {
    out += (i == 0 ? "" : ", ") + ScalarText(*parent, field, i);
  }
  return out + "]";
}

}  // namespace heddle::settings
