// The rendezvous store's server in memory, as coordinator and daemon answer it (control-plane
// section 11): waits with a deadline, a repeated (rank, n) gives the stored answer.
#pragma once

#include <chrono>
#include <condition_variable>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "heddle/v1/control.pb.h"

namespace heddle::comm {

class FakeRendezvous {
 public:
  heddle::v1::RendezvousReply Answer(uint32_t rank, const heddle::v1::RendezvousRequest& request) {
    std::unique_lock<std::mutex> lock(mutex_);
    ++requests_;
    const auto stored = answers_.find({rank, request.n()});
    if (stored != answers_.end()) {
      return stored->second;
    }
    heddle::v1::RendezvousReply reply = Apply(request, lock);
    reply.set_n(request.n());
    answers_[{rank, request.n()}] = reply;
    return reply;
  }
  int requests() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return requests_;
  }

 private:
  bool HasAll(const heddle::v1::RendezvousRequest& request) const {
    for (const std::string& key : request.keys()) {
      if (!values_.contains(key)) {
        return false;
      }
    }
    return true;
  }

  heddle::v1::RendezvousReply Apply(const heddle::v1::RendezvousRequest& request,
                                    std::unique_lock<std::mutex>& lock) {
    heddle::v1::RendezvousReply reply;
    switch (request.verb()) {
      case heddle::v1::RENDEZVOUS_VERB_SET:
        for (int i = 0; i < request.keys_size(); ++i) {
          values_[request.keys(i)] = request.values(i);
        }
        changed_.notify_all();
        break;
      case heddle::v1::RENDEZVOUS_VERB_GET:
      case heddle::v1::RENDEZVOUS_VERB_WAIT:
        if (!changed_.wait_for(lock, std::chrono::milliseconds(request.timeout_ms()),
                               [&] { return HasAll(request); })) {
          reply.set_code(4);
          reply.set_message("deadline passed");
          break;
        }
        if (request.verb() == heddle::v1::RENDEZVOUS_VERB_GET) {
          for (const std::string& key : request.keys()) {
            reply.add_values(values_[key]);
          }
        }
        break;
      case heddle::v1::RENDEZVOUS_VERB_ADD: {
        std::string& value = values_[request.keys(0)];
        const int64_t sum = (value.empty() ? 0 : std::stoll(value)) + request.amount();
        value = std::to_string(sum);
        reply.set_number(sum);
        changed_.notify_all();
        break;
      }
      case heddle::v1::RENDEZVOUS_VERB_COMPARE_SET: {
        std::string& value = values_[request.keys(0)];
        if (value == request.values(0)) {
          value = request.values(1);
          changed_.notify_all();
        }
        reply.add_values(value);
        break;
      }
      case heddle::v1::RENDEZVOUS_VERB_CHECK:
        reply.set_number(HasAll(request) ? 1 : 0);
        break;
      case heddle::v1::RENDEZVOUS_VERB_DELETE:
        reply.set_number(static_cast<int64_t>(values_.erase(request.keys(0))));
        break;
      case heddle::v1::RENDEZVOUS_VERB_APPEND:
        values_[request.keys(0)] += request.values(0);
        changed_.notify_all();
        break;
      case heddle::v1::RENDEZVOUS_VERB_COUNT:
        reply.set_number(static_cast<int64_t>(values_.size()));
        break;
    }
    return reply;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<std::string, std::string> values_;
  std::map<std::pair<uint32_t, uint64_t>, heddle::v1::RendezvousReply> answers_;
  int requests_ = 0;
};

}  // namespace heddle::comm
