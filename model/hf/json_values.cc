#include "model/hf/json_values.h"

#include <set>
#include <vector>

namespace heddle::hf {
namespace {

using nlohmann::json;

// Whether brackets outside of strings nest at most `depth_max` deep.
bool Shallow(std::string_view text, int depth_max) {
  int depth = 0;
  bool quoted = false;
  for (size_t i = 0; i < text.size(); ++i) {
    const char c = text[i];
    if (quoted) {
      if (c == '\\') ++i;
      if (c == '"') quoted = false;
    } else if (c == '"') {
      quoted = true;
    } else if (c == '{' || c == '[') {
      if (++depth > depth_max) return false;
    } else if (c == '}' || c == ']') {
      --depth;
    }
  }
  return true;
}

}  // namespace

StatusOr<json> ParseJsonObject(std::string_view text, int depth_max) {
  if (!Shallow(text, depth_max)) {
    return InvalidArgument(Str("nested more than ", depth_max, " deep"));
  }
  // nlohmann keeps the last of repeated keys: they are found while parsing.
  std::vector<std::set<std::string>> open;
  std::string repeated;
  const auto callback = [&](int, json::parse_event_t event, json& value) {
    if (event == json::parse_event_t::object_start) open.emplace_back();
    if (event == json::parse_event_t::object_end) open.pop_back();
    if (event == json::parse_event_t::key && !open.back().insert(value.get<std::string>()).second) {
      repeated = value.get<std::string>();
    }
    return true;
  };
  json parsed = json::parse(text.begin(), text.end(), callback, /*allow_exceptions=*/false);
  if (parsed.is_discarded()) return InvalidArgument("not JSON");
  if (!repeated.empty()) return InvalidArgument(Str("key '", repeated, "' is repeated"));
  if (!parsed.is_object()) return InvalidArgument("not an object");
  return parsed;
}

}  // namespace heddle::hf
