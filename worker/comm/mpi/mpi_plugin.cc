// libheddle_mpi.so: OpenMPI behind the plain functions of plugin.h.
//
// All calls of MPI are made by one thread: it starts MPI, posts the sends and receives of an
// operation in the order of the starts, and moves them on until they are done (MPI moves data only
// inside calls). Operations are pairs of messages between ranks, not MPI's collectives: nothing
// rounds, nothing is summed in another order, and every pair is under way at once.
#include <mpi.h>
#include <pmix.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "worker/comm/plugin.h"

namespace heddle::comm {

namespace {

using Clock = std::chrono::steady_clock;

// Bytes of one message: counts of OpenMPI 4 are ints. Far less costs nothing.
constexpr int64_t kMessageBytes = int64_t{1} << 26;
// Tags up to 32767 are legal everywhere; messages of a pair keep their order, so reuse is harmless.
constexpr int kTags = 32768;
constexpr auto kEndGrace = std::chrono::seconds(5);
// The thread polls without a break for so long after something moved, then sleeps between polls:
// the core belongs to the model.
constexpr auto kBusyPolling = std::chrono::microseconds(100);
constexpr auto kPollPause = std::chrono::microseconds(40);

int Say(PluginError error, const std::string& text) {
  std::snprintf(error.text, static_cast<size_t>(error.size), "%s", text.c_str());
  return 1;
}

std::string TextOf(int code) {
  char text[MPI_MAX_ERROR_STRING];
  int length = 0;
  return MPI_Error_string(code, text, &length) == MPI_SUCCESS ? std::string(text, length)
                                                              : "error " + std::to_string(code);
}

// The server is gone as soon as the group stands; OpenMPI would end the process for that.
void OnServerGone(size_t /*handler*/, pmix_status_t /*status*/, const pmix_proc_t* /*source*/,
                  pmix_info_t* /*info*/, size_t /*ninfo*/, pmix_info_t* /*results*/,
                  size_t /*nresults*/, pmix_event_notification_cbfunc_fn_t done, void* token) {
  done(PMIX_EVENT_ACTION_COMPLETE, nullptr, 0, nullptr, nullptr, token);
}

// False: OpenMPI's own handler stays.
bool OutliveServer() {
  pmix_status_t code = PMIX_ERR_LOST_CONNECTION;
  // Blocks without a callback; the answer is the handler's number.
  return PMIx_Register_event_handler(&code, 1, nullptr, 0, OnServerGone, nullptr, nullptr) >= 0;
}

// What goes to a peer and what comes from it.
struct Exchange {
  const char* from = nullptr;
  int64_t from_bytes = 0;
  char* to = nullptr;
  int64_t to_bytes = 0;
};

struct Operation {
  std::vector<Exchange> peers;
  std::vector<MPI_Request> requests;  // of the thread
  std::vector<MPI_Status> statuses;
  bool posted = false;
  bool done = false;  // under the group's mutex
};

class Group {
 public:
  Group(int rank, int world) : rank_(rank), world_(world) {}

  // Empty, or why MPI did not start.
  std::string Start(int64_t timeout_ms) {
    thread_ = std::thread([this] { Run(); });
    std::unique_lock<std::mutex> lock(mutex_);
    if (!changed_.wait_for(lock, std::chrono::milliseconds(timeout_ms),
                           [this] { return started_ || !failure_.empty(); })) {
      failure_ = "MPI did not start in time: a rank or its server is missing";
    }
    return failure_;
  }

  // Null: the group is dead, `why` says of what.
  Operation* Enqueue(std::unique_ptr<Operation> operation, std::string* why) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!failure_.empty()) {
      *why = failure_;
      return nullptr;
    }
    queue_.push_back(std::move(operation));
    changed_.notify_all();
    return queue_.back().get();
  }

  // Empty when it is done. The operation is gone either way.
  std::string Await(Operation* operation, int64_t timeout_ms) {
    std::unique_lock<std::mutex> lock(mutex_);
    const bool ended = changed_.wait_for(lock, std::chrono::milliseconds(timeout_ms),
                                         [&] { return operation->done || !failure_.empty(); });
    if (!ended) Fail("deadline passed: a rank is gone or stands still");
    if (!operation->done) return failure_;  // the thread may still hold it
    std::erase_if(queue_, [&](const auto& one) { return one.get() == operation; });
    return "";
  }

  void Abort() {
    const std::lock_guard<std::mutex> lock(mutex_);
    Fail("the group was aborted");
  }

  // True: the thread has ended and nothing of the group is in use.
  bool Stop() {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      stop_ = true;
      changed_.notify_all();
      if (!changed_.wait_for(lock, kEndGrace, [this] { return ended_; })) {
        thread_.detach();
        return false;
      }
    }
    thread_.join();
    return true;
  }

  int rank() const { return rank_; }
  int world() const { return world_; }

 private:
  bool Failed() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return !failure_.empty();
  }

  // REQUIRES: mutex_ held.
  void Fail(const std::string& why) {
    if (failure_.empty()) failure_ = why;
    changed_.notify_all();
  }

  std::string StartMpi() {
    int provided = 0;
    if (const int code = MPI_Init_thread(nullptr, nullptr, MPI_THREAD_FUNNELED, &provided);
        code != MPI_SUCCESS) {
      return "MPI_Init_thread: " + TextOf(code);
    }
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    int rank = -1;
    int world = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_size(MPI_COMM_WORLD, &world);
    if (provided < MPI_THREAD_FUNNELED) {
      return "this MPI library cannot be used beside other threads (MPI_Query_thread)";
    }
    if (rank != rank_ || world != world_) {
      return "MPI calls this rank " + std::to_string(rank) + " of " + std::to_string(world) +
             ", it is " + std::to_string(rank_) + " of " + std::to_string(world_);
    }
    return OutliveServer() ? "" : "PMIx takes no handler for the end of its server";
  }

  void Run() {
    const std::string failed = StartMpi();
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      started_ = failed.empty();
      if (!failed.empty()) Fail(failed);
      changed_.notify_all();
    }
    if (failed.empty()) Work();
    const std::lock_guard<std::mutex> lock(mutex_);
    // Without MPI_Finalize, which asks the launcher and waits for every rank: the process ends soon
    // and its sockets with it.
    ended_ = true;
    changed_.notify_all();
  }

  void Work() {
    Clock::time_point moved = Clock::now();
    while (true) {
      std::vector<Operation*> open;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        const auto pending = [this] {
          return std::any_of(queue_.begin(), queue_.end(),
                             [](const auto& one) { return !one->done; });
        };
        changed_.wait(lock, [&] { return stop_ || !failure_.empty() || pending(); });
        if (!failure_.empty() || (stop_ && !pending())) return;
        for (const auto& one : queue_) {
          if (!one->done) open.push_back(one.get());
        }
      }
      if (Advance(open)) {
        moved = Clock::now();
      } else if (Clock::now() - moved > kBusyPolling) {
        std::this_thread::sleep_for(kPollPause);
      }
    }
  }

  // True: an operation was posted or has ended.
  bool Advance(const std::vector<Operation*>& open) {
    bool any = false;
    std::vector<Operation*> earlier;  // of them, those that are still open
    for (Operation* operation : open) {
      if (Failed()) return any;  // buffers may be gone
      if (!operation->posted) {
        Post(operation);
        any = true;
      }
      bool ended = false;
      const int code = Test(operation, &ended);
      if (code == MPI_SUCCESS) {
        any |= ended;
        if (!ended) earlier.push_back(operation);
        continue;
      }
      // What came before may have ended since: it tells whoever waits more than the failure does.
      for (Operation* other : earlier) {
        if (Test(other, &ended) != MPI_SUCCESS) break;
      }
      const std::lock_guard<std::mutex> lock(mutex_);
      Fail(WhyFailed(*operation, code));
      return true;
    }
    return any;
  }

  // An error of MPI. Where it has ended, it belongs to whoever waits for it and may be gone.
  int Test(Operation* operation, bool* ended) {
    int all = 0;
    const int code = MPI_Testall(static_cast<int>(operation->requests.size()),
                                 operation->requests.data(), &all, operation->statuses.data());
    if (code == MPI_SUCCESS && all != 0) {
      const std::lock_guard<std::mutex> lock(mutex_);
      operation->done = true;
      changed_.notify_all();
      *ended = true;
    }
    return code;
  }

  // Of the first message that failed, e.g. one that is longer than this rank expects.
  std::string WhyFailed(const Operation& operation, int code) const {
    if (code != MPI_ERR_IN_STATUS) return TextOf(code);
    for (const MPI_Status& status : operation.statuses) {
      if (status.MPI_ERROR == MPI_SUCCESS || status.MPI_ERROR == MPI_ERR_PENDING) continue;
      const int peer = status.MPI_SOURCE;
      const bool known = peer >= 0 && peer < world_;
      return (known ? "message of rank " + std::to_string(peer) + " to rank " +
                          std::to_string(rank_) + ", which expects " +
                          std::to_string(operation.peers[static_cast<size_t>(peer)].to_bytes) +
                          " bytes: "
                    : "") +
             TextOf(status.MPI_ERROR);
    }
    return TextOf(code);
  }

  void Post(Operation* operation) {
    const int tag = next_tag_;
    next_tag_ = (next_tag_ + 1) % kTags;
    const auto post = [&](int peer, bool receive) {
      const Exchange& one = operation->peers[static_cast<size_t>(peer)];
      const int64_t bytes = receive ? one.to_bytes : one.from_bytes;
      for (int64_t at = 0; at < bytes; at += kMessageBytes) {
        const int count = static_cast<int>(std::min(kMessageBytes, bytes - at));
        MPI_Request request = MPI_REQUEST_NULL;
        const int code =
            receive
                ? MPI_Irecv(one.to + at, count, MPI_BYTE, peer, tag, MPI_COMM_WORLD, &request)
                : MPI_Isend(one.from + at, count, MPI_BYTE, peer, tag, MPI_COMM_WORLD, &request);
        if (code != MPI_SUCCESS) {
          const std::lock_guard<std::mutex> lock(mutex_);
          Fail(TextOf(code));
        }
        operation->requests.push_back(request);
      }
    };
    // The nearest ranks first, each starting with another one.
    for (int step = 1; step < world_; ++step) post((rank_ - step + world_) % world_, true);
    for (int step = 1; step < world_; ++step) post((rank_ + step) % world_, false);
    const Exchange& own = operation->peers[static_cast<size_t>(rank_)];
    const int64_t bytes = std::min(own.from_bytes, own.to_bytes);
    if (own.from != own.to && bytes > 0) {
      std::memcpy(own.to, own.from, static_cast<size_t>(bytes));
    }
    operation->statuses.resize(operation->requests.size());
    operation->posted = true;
  }

  const int rank_;
  const int world_;
  std::thread thread_;
  int next_tag_ = 0;  // of the thread
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::unique_ptr<Operation>> queue_;
  std::string failure_;
  bool started_ = false;
  bool stop_ = false;
  bool ended_ = false;
};

int Enqueue(Group* group, std::unique_ptr<Operation> operation, void** handle, PluginError error) {
  std::string why;
  *handle = group->Enqueue(std::move(operation), &why);
  return *handle == nullptr ? Say(error, why) : 0;
}

int StartAllGather(void* handle, const void* mine, int64_t bytes, void* all, void** operation,
                   PluginError error) {
  Group* group = static_cast<Group*>(handle);
  auto started = std::make_unique<Operation>();
  for (int peer = 0; peer < group->world(); ++peer) {
    started->peers.push_back({.from = static_cast<const char*>(mine),
                              .from_bytes = bytes,
                              .to = static_cast<char*>(all) + peer * bytes,
                              .to_bytes = bytes});
  }
  return Enqueue(group, std::move(started), operation, error);
}

int StartAllToAll(void* handle, const void* sent, const int64_t* sent_bytes, void* received,
                  const int64_t* received_bytes, void** operation, PluginError error) {
  Group* group = static_cast<Group*>(handle);
  auto started = std::make_unique<Operation>();
  const char* from = static_cast<const char*>(sent);
  char* to = static_cast<char*>(received);
  for (int peer = 0; peer < group->world(); ++peer) {
    started->peers.push_back(
        {.from = from, .from_bytes = sent_bytes[peer], .to = to, .to_bytes = received_bytes[peer]});
    from += sent_bytes[peer];
    to += received_bytes[peer];
  }
  return Enqueue(group, std::move(started), operation, error);
}

int Wait(void* handle, void* operation, int64_t timeout_ms, PluginError error) {
  const std::string why =
      static_cast<Group*>(handle)->Await(static_cast<Operation*>(operation), timeout_ms);
  return why.empty() ? 0 : Say(error, why);
}

int Usable(PluginError error) {
  int started = 0;
  MPI_Initialized(&started);
  return started == 0 ? 0 : Say(error, "MPI starts once in a process, and it has been started");
}

int Connect(const unsigned char* /*id*/, int rank, int world_size, int64_t timeout_ms,
            void** handle, PluginError error) {
  auto group = std::make_unique<Group>(rank, world_size);
  const std::string why = group->Start(timeout_ms);
  if (!why.empty()) {
    if (!group->Stop()) static_cast<void>(group.release());  // its thread is inside MPI
    return Say(error, why);
  }
  *handle = group.release();
  return 0;
}

void Abort(void* handle) { static_cast<Group*>(handle)->Abort(); }

void Destroy(void* handle) {
  std::unique_ptr<Group> group(static_cast<Group*>(handle));
  if (!group->Stop()) static_cast<void>(group.release());
}

constexpr TransportPlugin kPlugin = {.version = kPluginVersion,
                                     .usable = Usable,
                                     .unique_id = nullptr,
                                     .connect = Connect,
                                     .start_all_gather = StartAllGather,
                                     .start_all_to_all = StartAllToAll,
                                     .wait = Wait,
                                     .abort = Abort,
                                     .destroy = Destroy};

}  // namespace

}  // namespace heddle::comm

extern "C" __attribute__((visibility("default"))) const heddle::comm::TransportPlugin*
heddle_transport_plugin() {
  return &heddle::comm::kPlugin;
}
