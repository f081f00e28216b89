#include "model/hf/message_json.h"

#include <google/protobuf/descriptor.h>
#include <google/protobuf/message.h>

#include <algorithm>
#include <cctype>
#include <limits>
#include <nlohmann/json.hpp>

namespace heddle::hf {
namespace {

using google::protobuf::EnumDescriptor;
using google::protobuf::EnumValueDescriptor;
using google::protobuf::FieldDescriptor;
using google::protobuf::Message;
using google::protobuf::Reflection;
using nlohmann::json;

// "FFN_" of enum Ffn, "ATTENTION_KIND_" of AttentionKind: the prefix its values carry.
std::string PrefixOf(const EnumDescriptor& type) {
  std::string prefix;
  for (const char c : type.name()) {
    if (std::isupper(static_cast<unsigned char>(c)) && !prefix.empty()) prefix += '_';
    prefix += static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  }
  return prefix + "_";
}

std::string WordOf(const EnumValueDescriptor& value) {
  std::string word = value.name().substr(PrefixOf(*value.type()).size());
  std::transform(word.begin(), word.end(), word.begin(),
                 [](unsigned char c) { return static_cast<char>(std::tolower(c)); });
  return word;
}

// `index` < 0: the field is not repeated.
json ValueOf(const Message& message, const FieldDescriptor& field, int index) {
  const Reflection& r = *message.GetReflection();
  const bool list = index >= 0;
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_BOOL:
      return list ? r.GetRepeatedBool(message, &field, index) : r.GetBool(message, &field);
    case FieldDescriptor::CPPTYPE_INT32:
      return list ? r.GetRepeatedInt32(message, &field, index) : r.GetInt32(message, &field);
    case FieldDescriptor::CPPTYPE_INT64:
      return list ? r.GetRepeatedInt64(message, &field, index) : r.GetInt64(message, &field);
    case FieldDescriptor::CPPTYPE_DOUBLE:
      return list ? r.GetRepeatedDouble(message, &field, index) : r.GetDouble(message, &field);
    case FieldDescriptor::CPPTYPE_STRING:
      return list ? r.GetRepeatedString(message, &field, index) : r.GetString(message, &field);
    case FieldDescriptor::CPPTYPE_ENUM:
      return WordOf(list ? *r.GetRepeatedEnum(message, &field, index)
                         : *r.GetEnum(message, &field));
    case FieldDescriptor::CPPTYPE_MESSAGE:
      return ToJson(list ? r.GetRepeatedMessage(message, &field, index)
                         : r.GetMessage(message, &field));
    default:
      HEDDLE_CHECK(false, "type of field ", field.full_name());
  }
}

Status SetEnum(const json& value, const std::string& path, const FieldDescriptor& field,
               Message* message) {
  const Reflection& r = *message->GetReflection();
  if (value.is_string()) {
    for (int i = 0; i < field.enum_type()->value_count(); ++i) {
      const EnumValueDescriptor* candidate = field.enum_type()->value(i);
      if (WordOf(*candidate) != value.get<std::string>()) continue;
      if (field.is_repeated()) {
        r.AddEnum(message, &field, candidate);
      } else {
        r.SetEnum(message, &field, candidate);
      }
      return OkStatus();
    }
  }
  return InvalidArgument(Str(path, ": ", value.dump(), " is not a known word"));
}

Status SetNumber(const json& value, const std::string& path, const FieldDescriptor& field,
                 Message* message) {
  const Reflection& r = *message->GetReflection();
  const auto bad = [&] { return InvalidArgument(Str(path, ": ", value.dump(), " does not fit")); };
  switch (field.cpp_type()) {
    case FieldDescriptor::CPPTYPE_BOOL:
      if (!value.is_boolean()) return bad();
      r.SetBool(message, &field, value.get<bool>());
      return OkStatus();
    case FieldDescriptor::CPPTYPE_INT32: {
      if (!value.is_number_integer()) return bad();
      const bool large = value.is_number_unsigned() && value.get<uint64_t>() > INT32_MAX;
      const int64_t wide = large ? INT64_MAX : value.get<int64_t>();
      if (wide < std::numeric_limits<int32_t>::min() ||
          wide > std::numeric_limits<int32_t>::max()) {
        return bad();
      }
      r.SetInt32(message, &field, static_cast<int32_t>(wide));
      return OkStatus();
    }
    case FieldDescriptor::CPPTYPE_INT64:
      if (!value.is_number_integer()) return bad();
      r.SetInt64(message, &field, value.get<int64_t>());
      return OkStatus();
    case FieldDescriptor::CPPTYPE_DOUBLE:
      if (!value.is_number()) return bad();
      r.SetDouble(message, &field, value.get<double>());
      return OkStatus();
    case FieldDescriptor::CPPTYPE_STRING:
      if (!value.is_string()) return bad();
      r.SetString(message, &field, value.get<std::string>());
      return OkStatus();
    default:
      return bad();
  }
}

Status SetField(const json& value, const std::string& path, const FieldDescriptor& field,
                Message* message) {
  const Reflection& r = *message->GetReflection();
  if (field.is_repeated()) {
    if (!value.is_array()) return InvalidArgument(Str(path, ": must be a list"));
    for (size_t i = 0; i < value.size(); ++i) {
      const std::string at = Str(path, "[", i, "]");
      if (field.cpp_type() == FieldDescriptor::CPPTYPE_ENUM) {
        RETURN_IF_ERROR(SetEnum(value[i], at, field, message));
      } else if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
        RETURN_IF_ERROR(FromJson(value[i], at, r.AddMessage(message, &field)));
      } else if (field.cpp_type() == FieldDescriptor::CPPTYPE_INT32 &&
                 value[i].is_number_integer() && value[i] >= 0 &&
                 value[i] <= std::numeric_limits<int32_t>::max()) {
        r.AddInt32(message, &field, value[i].get<int32_t>());
      } else {
        return InvalidArgument(Str(at, ": ", value[i].dump(), " does not fit"));
      }
    }
    return OkStatus();
  }
  if (field.cpp_type() == FieldDescriptor::CPPTYPE_MESSAGE) {
    return FromJson(value, path, r.MutableMessage(message, &field));
  }
  if (field.cpp_type() == FieldDescriptor::CPPTYPE_ENUM) {
    return SetEnum(value, path, field, message);
  }
  return SetNumber(value, path, field, message);
}

}  // namespace

json ToJson(const Message& message) {
  json object = json::object();
  std::vector<const FieldDescriptor*> fields;
  message.GetReflection()->ListFields(message, &fields);
  for (const FieldDescriptor* field : fields) {
    if (!field->is_repeated()) {
      object[field->name()] = ValueOf(message, *field, -1);
      continue;
    }
    json list = json::array();
    for (int i = 0; i < message.GetReflection()->FieldSize(message, field); ++i) {
      list.push_back(ValueOf(message, *field, i));
    }
    object[field->name()] = list;
  }
  return object;
}

Status FromJson(const json& object, const std::string& path, Message* message) {
  if (!object.is_object()) return InvalidArgument(Str(path, ": must be an object"));
  for (const auto& [name, value] : object.items()) {
    const FieldDescriptor* field = message->GetDescriptor()->FindFieldByName(name);
    const std::string at = Str(path, ".", name);
    if (field == nullptr) return InvalidArgument(Str(at, ": unknown key"));
    RETURN_IF_ERROR(SetField(value, at, *field, message));
  }
  return OkStatus();
}

}  // namespace heddle::hf
