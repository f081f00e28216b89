// A folder of config files that ends with the test.
#pragma once

#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "base/settings/settings.h"

namespace heddle::settings {

class ConfigFiles {
 public:
  ConfigFiles() {
    std::string pattern = (std::filesystem::temp_directory_path() / "heddle-XXXXXX").string();
    folder_ = mkdtemp(pattern.data());
    options.search_path = {folder_ + "/presets"};
    options.environment = {{"HOME", "/home/ada"}, {"HEDDLE_STEPS", "77"}, {"SECRET", "x"}};
  }
  ~ConfigFiles() { std::filesystem::remove_all(folder_); }
  ConfigFiles(const ConfigFiles&) = delete;
  ConfigFiles& operator=(const ConfigFiles&) = delete;

  // Writes `text`; returns the path.
  std::string Write(const std::string& name, const std::string& text) const {
    const std::filesystem::path path = std::filesystem::path(folder_) / name;
    std::filesystem::create_directories(path.parent_path());
    std::ofstream(path, std::ios::binary) << text;
    return path.string();
  }

  StatusOr<ResolvedConfig> LoadText(const std::string& text,
                                    const std::vector<std::string>& overrides = {}) const {
    return Load(Write("run.yaml", text), overrides, options);
  }

  // The message of a failed load without the folder's name; "OK" if it did not fail.
  std::string Problems(const std::string& text,
                       const std::vector<std::string>& overrides = {}) const {
    const Status status = LoadText(text, overrides).status();
    if (status.ok()) {
      return "OK";
    }
    std::string message = Message(status);
    for (size_t at; (at = message.find(folder_ + "/")) != std::string::npos;) {
      message.erase(at, folder_.size() + 1);
    }
    return message;
  }

  const std::string& folder() const { return folder_; }
  LoadOptions options;

 private:
  std::string folder_;
};

// The smallest valid training run.
inline const std::string kMinimal = "data: {path: /data}\n";

}  // namespace heddle::settings
