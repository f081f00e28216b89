// JSON of any message by reflection (formats.md F4): snake_case names, all integers as numbers
// except `fence` and `batch_hash` (strings: they exceed 2^53), shortest round-trip floats,
// non-finite = null, enums as text without their prefix, bytes as lower-case hex. protobuf's own
// printer makes every 64-bit integer a string.
#pragma once

#include <set>
#include <string>

#include "base/status/status.h"

namespace google::protobuf {
class EnumValueDescriptor;
class Message;
}  // namespace google::protobuf

namespace heddle::settings {

struct JsonOptions {
  // Unset scalars appear as null and empty lists as []; false leaves both out.
  bool print_unset = false;
  // Spaces per level; 0 = one line.
  int indent = 0;
  // Names of fields to leave out, at any depth.
  std::set<std::string> omit;
};

// No newline at the end.
std::string ToJson(const google::protobuf::Message& message, const JsonOptions& options = {});

// `text` with quotes; control characters escaped; invalid UTF-8 replaced by U+FFFD.
std::string JsonQuote(const std::string& text);

// Shortest text that reads back as the same double; "null" for NaN and infinities.
std::string JsonNumber(double value);

// "swiglu" for FFN_SWIGLU: the name without the enum's own name as prefix, in lower case. `upper`
// keeps the case, as for states.
std::string EnumText(const google::protobuf::EnumValueDescriptor& value, bool upper = false);

}  // namespace heddle::settings
