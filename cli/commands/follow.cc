#include "cli/commands/follow.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <optional>
#include <thread>
#include <utility>

#include "base/clock/clock.h"
#include "cli/commands/client.h"
#include "cli/commands/print.h"
#include "cli/commands/stream.h"
#include "cli/commands/verb.h"
#include "cli/output/table.h"

namespace heddle::cli {
namespace {

using std::chrono::milliseconds;

bool Done(const v1::Job& job) { return job.state() == "DONE"; }

// Steps of the job in the background; a broken stream goes on after the last step printed of the
// newest attempt.
class StepPrinter {
 public:
  StepPrinter(Client& client, const CommandContext& context, std::string job)
      : client_(client), context_(context), job_(std::move(job)), thread_([this] { Run(); }) {}
  ~StepPrinter() {
    stop_ = true;
    client_.CancelStreams();
    thread_.join();
  }

 private:
  void Run() {
    while (!stop_) {
      v1::MetricsRequest request;
      request.set_job(job_);
      request.set_from_step(next_);
      request.set_follow(true);
      const Status status = client_.Metrics(request, [this](const v1::MetricPoint& point) {
        next_ = point.step() + 1;
        if (context_.json()) {
          PrintJson(point);
        } else {
          PrintText(StepLine(point));
        }
        return !stop_;
      });
      if (status.ok()) {
        return;  // the job is done and every point was printed
      }
      std::this_thread::sleep_for(milliseconds(200));
    }
  }

  Client& client_;
  const CommandContext& context_;
  const std::string job_;
  uint64_t next_ = 0;
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

// What the ranks of a command print: it has no steps. A broken stream begins again after the last
// byte shown of each rank.
class OutputPrinter {
 public:
  OutputPrinter(Client& client, const CommandContext& context, std::string job)
      : client_(client), context_(context), job_(std::move(job)), thread_([this] { Run(); }) {}
  ~OutputPrinter() {
    stop_ = true;
    client_.CancelStreams();
    thread_.join();
  }

 private:
  void Run() {
    while (!stop_) {
      v1::LogsRequest request;
      request.set_job(job_);
      request.set_follow(true);
      const Status status = client_.Logs(request, [this](const v1::LogLine& line) {
        if (shown_.Add(line)) {
          PrintText(LogText(line, context_.json(), /*prefix=*/true));
        }
        return !stop_;
      });
      if (status.ok()) {
        return;
      }
      std::this_thread::sleep_for(milliseconds(200));
    }
  }

  Client& client_;
  const CommandContext& context_;
  const std::string job_;
  ShownLines shown_;
  std::atomic<bool> stop_ = false;
  std::thread thread_;
};

// Tells why a job is still queued, once per change of the reason. On stderr: -o json prints points
// only, and nobody should wait without a word.
class WaitTeller {
 public:
  WaitTeller(Client& client, bool alone) : client_(client), alone_(alone) {}

  // Not OK: waiting is in vain.
  Status Tell(const v1::Job& job) {
    const int64_t now = clock_.NowSteady();
    if (job.state() != "QUEUED") {
      next_ = 0;
      return OkStatus();
    }
    if (next_ == 0) {
      next_ = now + kFirstNs;  // most jobs start at once
    }
    if (now < next_) {
      return OkStatus();
    }
    next_ = now + kPauseNs;
    const StatusOr<v1::WhyReply> why = client_.Why(job.id());
    return why.ok() && why->state() == "QUEUED" ? Show(*why) : OkStatus();
  }

 private:
  static constexpr int64_t kFirstNs = 1'000'000'000;
  static constexpr int64_t kPauseNs = 3'000'000'000;

  Status Show(const v1::WhyReply& why) {
    const std::string advice = why.advice().empty() ? "" : Str(" (", why.advice(), ")");
    const std::string text = Printable(Str(why.reason(), ": ", why.text(), advice));
    if (alone_ && why.reason() == "INFEASIBLE") {
      return ResourceExhausted(Str("job ", why.id(), " can never start here: ", text));
    }
    if (text != shown_) {
      fprintf(stderr, "heddle: %s waits: %s%s\n", why.id().c_str(), text.c_str(),
              shown_.empty() ? Str("; `heddle cancel ", why.id(), "` ends it").c_str() : "");
      shown_ = text;
    }
    return OkStatus();
  }

  Client& client_;
  const bool alone_;
  const SystemClock clock_;
  int64_t next_ = 0;  // when to ask again
  std::string shown_;
};

}  // namespace

StatusOr<v1::Job> WaitFor(Client& client, const std::string& job, int64_t timeout_ms,
                          const std::function<bool(const v1::Job&)>& reached) {
  const SystemClock clock;
  const Deadline deadline(clock, milliseconds(timeout_ms));
  while (true) {
    const StatusOr<v1::Job> now = client.Get(job);
    if (now.ok() && reached(*now)) {
      return *now;
    }
    if (!now.ok() && now.status().code() != StatusCode::kUnavailable) {
      return now.status();
    }
    if (timeout_ms > 0 && deadline.Passed(clock)) {
      return DeadlineExceeded(Str("job ", job, " is ",
                                  now.ok() ? StateText(*now) : std::string("out of reach"),
                                  " after the time given by --timeout"));
    }
    std::this_thread::sleep_for(milliseconds(100));
  }
}

StatusOr<v1::Job> FollowJob(const CommandContext& context, const std::string& job, bool alone) {
  ASSIGN_OR_RETURN(std::unique_ptr<Client> control, Client::Open(context));
  ASSIGN_OR_RETURN(std::unique_ptr<Client> steps, Client::Open(context));
  ASSIGN_OR_RETURN(const v1::Job first, control->Get(job));
  StatusOr<v1::Job> end = first;
  {
    std::optional<StepPrinter> printer;
    std::optional<OutputPrinter> output;
    if (first.kind() == "command") {
      output.emplace(*steps, context, job);
    } else {
      printer.emplace(*steps, context, job);
    }
    uint64_t version = 0;
    std::string shown;
    WaitTeller teller(*control, alone);
    Status in_vain;
    end = WaitFor(*control, job, 0, [&](const v1::Job& now) {
      const std::string state = StateText(now);
      if (!context.json() && (state != shown || now.version() < version)) {
        PrintText(Str(now.id(), " ", state, now.reason().empty() ? "" : ": " + now.reason(), "\n"));
      }
      shown = state;
      version = now.version();
      in_vain = teller.Tell(now);
      return Done(now) || !in_vain.ok();
    });
    RETURN_IF_ERROR(in_vain);
    if (end.ok() && Done(*end)) {
      // The last lines may still be on their way.
      std::this_thread::sleep_for(milliseconds(300));
    }
  }
  return end;
}

}  // namespace heddle::cli
