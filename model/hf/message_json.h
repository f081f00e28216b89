// A configuration message to and from JSON: field names in snake_case, enums as their words in
// lower case without the prefix of the type. Only what configuration messages use: numbers, texts,
// enums, messages and lists of them.
#pragma once

#include <nlohmann/json_fwd.hpp>
#include <string>

#include "base/status/status.h"

namespace google::protobuf {
class Message;
}

namespace heddle::hf {

// Fields that are set.
nlohmann::json ToJson(const google::protobuf::Message& message);

// Sets fields of `message`. INVALID_ARGUMENT names the key ("heddle.rope.theta: ..."): unknown, or
// not of the field's type.
Status FromJson(const nlohmann::json& object, const std::string& path,
                google::protobuf::Message* message);

}  // namespace heddle::hf
