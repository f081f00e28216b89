// The keys of a message as users know them: dotted paths, aliases, nearest names. Built from a
// descriptor and option (heddle.v1.key) alone. Internal to base/settings.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "heddle/v1/options.pb.h"

namespace google::protobuf {
class Descriptor;
class EnumDescriptor;
class FieldDescriptor;
}  // namespace google::protobuf

namespace heddle::settings {

// A place in the message.
struct KeyRef {
  std::string canonical;  // "model.attention.swa.window"; with a map key: "command.env.PATH"
  // From the root to the field; the last one is the field itself. Empty: the root.
  std::vector<const google::protobuf::FieldDescriptor*> fields;
  std::string map_key;  // set if the path goes into a map field
  const google::protobuf::FieldDescriptor* leaf() const {
    return fields.empty() ? nullptr : fields.back();
  }
};

class Schema {
 public:
  explicit Schema(const google::protobuf::Descriptor& root);

  // Resolves a dotted path or alias. NOT_FOUND: "unknown key (nearest name: X)".
  StatusOr<KeyRef> Find(const std::string& dotted) const;

  // Every canonical key in declaration order, groups before members; list and map fields are
  // leaves.
  const std::vector<KeyRef>& keys() const { return keys_; }

  // Whole-path aliases of a canonical key.
  std::vector<std::string> AliasesOf(const std::string& canonical) const;

  // The known key most like `dotted`, or empty if none is near.
  std::string Nearest(const std::string& dotted) const;

 private:
  void Walk(const google::protobuf::Descriptor& message, const KeyRef& prefix);
  void AddAliases(const google::protobuf::FieldDescriptor& field, const KeyRef& key,
                  const std::string& parent);
  const KeyRef* Canonical(const std::string& dotted) const;

  std::vector<KeyRef> keys_;
  std::map<std::string, size_t> index_;         // canonical -> position in keys_
  std::map<std::string, std::string> aliases_;  // whole path -> canonical
  std::string alias_root_;                      // "/model." aliases of a sub-message's schema
};

const v1::KeyOptions& OptionsOf(const google::protobuf::FieldDescriptor& field);

// Words of an enum, in number order.
std::vector<std::string> EnumWords(const google::protobuf::EnumDescriptor& type);

// The default as a user would write it ("auto", "0.0003", "swiglu"); empty for groups, lists, texts
// without default.
std::string DefaultText(const google::protobuf::FieldDescriptor& field);

// Edits (insert, delete, change, swap of neighbours) between two short texts.
int EditDistance(const std::string& a, const std::string& b);

// The candidate nearest to `name` if it is near enough to be a misspelling, else empty.
std::string NearestOf(const std::string& name, const std::vector<std::string>& candidates);

}  // namespace heddle::settings
