// c10d's key/value store over the control link (control-plane section 11): every operation is a
// request that the coordinator answers, every wait has a deadline. For this folder and its tests
// only: it includes a c10d header.
#pragma once

#include <torch/csrc/distributed/c10d/Store.hpp>

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "worker/comm/communicator.h"

namespace heddle::comm {

// Thread-safe. Throws c10::DistStoreError where an operation fails, as c10d expects.
class ControlStore : public c10d::Store {
  struct Shared;

 public:
  ControlStore(RendezvousCall call, std::string key_prefix, std::chrono::milliseconds timeout);
  // For clone(): the same connection and numbering.
  ControlStore(std::shared_ptr<Shared> shared, std::chrono::milliseconds timeout);

  c10::intrusive_ptr<c10d::Store> clone() override;
  using c10d::Store::compareSet;
  using c10d::Store::set;
  void set(const std::string& key, const std::vector<uint8_t>& value) override;
  std::vector<uint8_t> get(const std::string& key) override;
  std::vector<uint8_t> compareSet(const std::string& key, const std::vector<uint8_t>& expected,
                                  const std::vector<uint8_t>& desired) override;
  int64_t add(const std::string& key, int64_t value) override;
  bool deleteKey(const std::string& key) override;
  bool check(const std::vector<std::string>& keys) override;
  int64_t getNumKeys() override;
  void wait(const std::vector<std::string>& keys) override;
  void wait(const std::vector<std::string>& keys,
            const std::chrono::milliseconds& timeout) override;
  void append(const std::string& key, const std::vector<uint8_t>& value) override;
  std::vector<std::vector<uint8_t>> multiGet(const std::vector<std::string>& keys) override;
  void multiSet(const std::vector<std::string>& keys,
                const std::vector<std::vector<uint8_t>>& values) override;
  bool hasExtendedApi() const override { return true; }

 private:
  struct Shared {
    RendezvousCall call;
    std::string prefix;
    std::atomic<uint64_t> next{1};  // rises per rank; a repeat gives the stored answer
  };
  heddle::v1::RendezvousReply Ask(heddle::v1::RendezvousRequest* request);
  void AddKey(const std::string& key, heddle::v1::RendezvousRequest* request) const;

  std::shared_ptr<Shared> shared_;  // shared by clones, which other threads own
};

}  // namespace heddle::comm
