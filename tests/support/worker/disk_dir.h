// A folder on a disk that disappears with the test, for tests that spill: where /tmp lies in memory
// it is refused (worker/offload/spill_dir.h). And a disk as small as a test wants it.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/mount.h>
#include <sys/stat.h>

#include <filesystem>
#include <string>
#include <system_error>

#include "worker/offload/spill_dir.h"

namespace heddle::test {

// The system's folder for scratch that is no memory, or else the one the tests were built in.
inline std::string DiskFolder() {
  std::error_code ignored;
  for (const std::string& folder :
       {std::filesystem::temp_directory_path(ignored).string(), std::string("/var/tmp")}) {
    if (offload::CheckOnDisk(folder).ok()) return folder;
  }
  const char* const built = getenv("HEDDLE_BIN");
  return built != nullptr ? built : std::filesystem::current_path().string();
}

class DiskDir {
 public:
  DiskDir() {
    std::string pattern = DiskFolder() + "/heddle-test-XXXXXX";
    const char* made = mkdtemp(pattern.data());
    EXPECT_NE(made, nullptr) << pattern;
    path_ = pattern;
  }
  ~DiskDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  DiskDir(const DiskDir&) = delete;
  DiskDir& operator=(const DiskDir&) = delete;
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// A file system of a bounded size: memory under an overlay, which takes its size and hides its
// kind.
class SmallDisk {
 public:
  // `type` and `options` of the memory: tmpfs with "size=1m", ramfs with "". mounted() is false
  // where mounts are not allowed.
  SmallDisk(const char* type, const char* options) : type_(type) {
    const std::string& under = dir_.path();
    memory_ = mount("heddle-test", under.c_str(), type, 0, options) == 0;
    if (!memory_) return;
    for (const char* name : {"/lower", "/upper", "/work", "/disk"}) {
      mkdir((under + name).c_str(), 0700);
    }
    const std::string layers =
        "lowerdir=" + under + "/lower,upperdir=" + under + "/upper,workdir=" + under + "/work";
    mounted_ = mount("heddle-test", path().c_str(), "overlay", 0, layers.c_str()) == 0;
  }
  ~SmallDisk() {
    if (mounted_) {
      EXPECT_EQ(umount(path().c_str()), 0) << path();
    }
    if (memory_) {
      EXPECT_EQ(umount(dir_.path().c_str()), 0) << dir_.path();
    }
  }
  SmallDisk(const SmallDisk&) = delete;
  SmallDisk& operator=(const SmallDisk&) = delete;

  bool mounted() const { return mounted_; }
  std::string path() const { return dir_.path() + "/disk"; }
  void Resize(const char* options) {
    EXPECT_EQ(mount("heddle-test", dir_.path().c_str(), type_, MS_REMOUNT, options), 0);
  }

 private:
  const DiskDir dir_;
  const char* const type_;
  bool memory_ = false;
  bool mounted_ = false;
};

}  // namespace heddle::test
