// A fresh folder per test and a synchronous append.
#pragma once

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <future>
#include <memory>
#include <string>

#include "coordinator/store/rocks_log.h"

namespace heddle::store::test {

class TempDir {
 public:
  explicit TempDir(const std::string& under = ::testing::TempDir()) {
    std::string pattern = under + "/heddle-store-XXXXXX";
    path_ = mkdtemp(pattern.data());
  }
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

inline StatusOr<std::unique_ptr<RocksLog>> OpenLog(const std::string& dir, bool repair = false) {
  RocksLogOptions options;
  options.dir = dir;
  options.repair = repair;
  return RocksLog::Open(std::move(options));
}

// Appends and waits for the verdict.
inline Status AppendAndWait(StateLog* log, Batch batch) {
  auto verdict = std::make_shared<std::promise<Status>>();
  std::future<Status> future = verdict->get_future();
  const Status queued = log->Append(
      std::move(batch), [verdict](StatusOr<CommitSeq> seq) { verdict->set_value(seq.status()); });
  return queued.ok() ? future.get() : queued;
}

inline Status PutAndWait(StateLog* log, Family family, const std::string& key,
                         const std::string& value) {
  Batch batch;
  batch.Put(family, key, value);
  return AppendAndWait(log, std::move(batch));
}

inline size_t CountRecords(const StateLog& log, Family family) {
  size_t count = 0;
  EXPECT_TRUE(log.Scan(family, "", "",
                       [&](const std::string&, const std::string&) {
                         ++count;
                         return true;
                       })
                  .ok());
  return count;
}

// The newest write-ahead log of a closed database.
inline std::string NewestWal(const std::string& dir) {
  std::string newest;
  for (const auto& entry : std::filesystem::directory_iterator(dir + "/db")) {
    if (entry.path().extension() == ".log" && entry.path().string() > newest) {
      newest = entry.path().string();
    }
  }
  return newest;
}

}  // namespace heddle::store::test
