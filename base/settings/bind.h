// Untyped values -> typed fields, by the schema alone: a text is a number only where the field is
// one. Internal to base/settings.
#pragma once

#include <string>

#include "base/settings/schema.h"
#include "base/settings/value.h"

namespace google::protobuf {
class Message;
}  // namespace google::protobuf

namespace heddle::settings {

// Sets the field `key` of `root` from `value`. Lists and maps replace what was there. Each problem
// is added with `where` (for a value from a file its own position is used: "SOURCE:LINE:COLUMN",
// where `source` is not empty). On a problem the field may be partly set. A value for a group only
// marks it as present.
void Bind(const KeyRef& key, const Value& value, const std::string& source,
          const std::string& where, google::protobuf::Message* root, Problems& problems);

// The text of the field `key` as a user would write it; the default if it is unset. Lists and maps
// give YAML flow form.
std::string FieldText(const KeyRef& key, const google::protobuf::Message& root);

// As FieldText, of one value: element `i` of a repeated field, or -1.
std::string ScalarText(const google::protobuf::Message& message,
                       const google::protobuf::FieldDescriptor& field, int i);

// The message that holds the field `key`; null if a group on the way is absent.
const google::protobuf::Message* FindParent(const KeyRef& key,
                                            const google::protobuf::Message& root);

}  // namespace heddle::settings
