// What a YAML file or an override says, before the schema gives it types: a tree of untyped texts
// with positions, and the collector of problems. Internal to base/settings.
#pragma once

#include <string>
#include <vector>

#include "base/status/status.h"

namespace heddle::settings {

// Bounds on what a text may expand to (formats.md F38).
inline constexpr size_t kFileBytesMax = 1 << 20;
inline constexpr int kDepthMax = 64;
inline constexpr int kNodesMax = 100000;

struct Value {
  enum class Kind { kNull, kScalar, kList, kMap };
  struct Key {
    std::string text;
    int line = 0;  // 1-based; 0: not from a file
    int column = 0;
  };

  Kind kind = Kind::kNull;
  std::string text;     // of a scalar
  bool quoted = false;  // a scalar in quotes is never read as null or as an interpolation's number
  int line = 0;
  int column = 0;
  std::vector<Value> items;
  struct Member;
  std::vector<Member> members;

  static Value Scalar(std::string text, bool quoted = false);
};

// Not a std::pair: a vector of pairs of a type that is not complete yet is one that not every
// compiler takes.
struct Value::Member {
  Key first;
  Value second;
};

// Same kind and content, whatever the positions and quotes.
bool SameContent(const Value& a, const Value& b);

// One line that shows a value in messages: `[1, 2]`, `{a: 1}`, cut after 60 bytes.
std::string Shown(const Value& value);

// One thing that is wrong. `where` is "FILE:LINE:COLUMN" or "override 'TEXT'", empty when unknown.
struct Problem {
  std::string where;
  std::string key;
  std::string text;
};

// Collects problems; prints at most 100.
class Problems {
 public:
  void Add(std::string where, std::string key, std::string text);
  bool empty() const { return problems_.empty(); }
  const std::vector<Problem>& all() const { return problems_; }
  // OK if empty, else INVALID_ARGUMENT with one line per problem in the order of their discovery.
  Status ToStatus() const;

 private:
  std::vector<Problem> problems_;
};

}  // namespace heddle::settings
