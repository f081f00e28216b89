// YAML text -> Value under hard limits. yaml-cpp's node tree shares aliased nodes, keeps duplicate
// keys and needs a gigabyte for a few megabytes of brackets; so its event stream is read into our
// own tree, which counts every node, aliased ones once per use (formats.md F38). Internal to
// base/settings.
#pragma once

#include <string>

#include "base/settings/value.h"
#include "base/status/status.h"

namespace heddle::settings {

// Reads one document; an empty text is an empty map. `source` is the name in errors.
// INVALID_ARGUMENT with "SOURCE:LINE:COLUMN: ..." for anything but plain YAML: more than 1 MiB,
// depth above 64, more than 100,000 nodes with aliases expanded, duplicate keys, keys that are not
// scalars, tags, merge keys, a second document, invalid UTF-8.
StatusOr<Value> ReadYaml(const std::string& text, const std::string& source);

// Reads a whole file of at most 1 MiB. NOT_FOUND, INVALID_ARGUMENT (too long, a folder), or the
// code of the errno.
StatusOr<std::string> ReadConfigFile(const std::string& path);

}  // namespace heddle::settings
