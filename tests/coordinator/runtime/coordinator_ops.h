// Clients that remember what was acknowledged, and the judge of it.
#pragma once

#include <atomic>
#include <map>
#include <set>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "tests/coordinator/support/coordinator_process.h"

#include <grpcpp/grpcpp.h>

#include "base/net/grpc_channel.h"

namespace heddle::test {

// Written by one client; read after it ended.
struct ClientHistory {
  std::map<std::string, std::string> acknowledged;  // request id -> job id
  std::set<std::string> unknown;                    // request ids whose outcome nobody told
  std::set<std::string> cancelled;                  // job ids
  uint64_t retried = 0;
};

struct Verdict {
  uint64_t acknowledged = 0;
  uint64_t retried = 0;
  uint64_t lost = 0;
  uint64_t duplicated = 0;
};

inline Status CancelJob(v1::Jobs::Stub& jobs, const std::string& id,
                        const std::string& request_id) {
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(5));
  v1::StopRequest request;
  request.set_job(id);
  request.set_verb(v1::STOP_VERB_CANCEL);
  request.set_request_id(request_id);
  v1::Job reply;
  return net::FromGrpc(jobs.Stop(&context, request, &reply));
}

// Submits until told to stop; every third job is cancelled. Each operation is repeated with its
// request id until it is acknowledged, as the CLI does.
inline void RunClient(const CoordinatorProcess& process, int client, std::atomic<bool>* stop,
                      ClientHistory* history) {
  const std::unique_ptr<v1::Jobs::Stub> jobs = process.Jobs();
  for (int n = 0; !stop->load(); ++n) {
    v1::SubmitRequest request = CommandJob("crash");
    request.set_request_id(Str("client-", client, "-", n));
    request.set_hold(true);
    StatusOr<std::string> id = Submit(*jobs, request);
    while (!id.ok()) {
      ++history->retried;
      std::this_thread::sleep_for(std::chrono::milliseconds(20));
      id = Submit(*jobs, request);
    }
    history->acknowledged[request.request_id()] = *id;
    if (n % 3 == 0) {
      while (!CancelJob(*jobs, *id, request.request_id() + "-cancel").ok()) {
        ++history->retried;
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
      }
      history->cancelled.insert(*id);
    }
  }
}

// Every job by id -> state, read in pages.
inline StatusOr<std::map<std::string, std::string>> ListIds(v1::Jobs::Stub& jobs) {
  std::map<std::string, std::string> states;
  v1::ListRequest request;
  request.set_all(true);
  request.set_limit(500);
  do {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    v1::ListReply reply;
    RETURN_IF_ERROR(net::FromGrpc(jobs.List(&context, request, &reply)));
    for (const v1::Job& job : reply.jobs()) {
      if (!states.emplace(job.id(), job.state()).second) {
        return Internal(Str("job ", job.id(), " is on two pages"));
      }
    }
    request.set_page_token(reply.next_page_token());
  } while (!request.page_token().empty());
  return states;
}

inline Verdict Judge(const CoordinatorProcess& process,
                     const std::vector<ClientHistory>& histories) {
  const std::unique_ptr<v1::Jobs::Stub> jobs = process.Jobs();
  Verdict verdict;
  const auto states = ListIds(*jobs);
  if (!states.ok()) {
    verdict.lost = ~uint64_t{0};
    return verdict;
  }
  std::set<std::string> known;
  size_t unknown = 0;
  for (const ClientHistory& history : histories) {
    verdict.retried += history.retried;
    unknown += history.unknown.size();
    for (const auto& [request_id, id] : history.acknowledged) {
      ++verdict.acknowledged;
      verdict.duplicated += known.insert(id).second ? 0 : 1;
      verdict.lost += states->contains(id) ? 0 : 1;
    }
    for (const std::string& id : history.cancelled) {
      ++verdict.acknowledged;
      const auto found = states->find(id);
      verdict.lost += found != states->end() && found->second == "DONE" ? 0 : 1;
    }
  }
  // Jobs that nobody was told of can only come from operations of unknown outcome. One more: the
  // submit that probed whether the disk has room again.
  const size_t extra = states->size() - std::min(states->size(), known.size());
  verdict.duplicated += extra > unknown + 1 ? extra - unknown - 1 : 0;
  return verdict;
}

}  // namespace heddle::test
