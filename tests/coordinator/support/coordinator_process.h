// A real heddle-coordinator on a unix socket in a fresh folder, and a client of it. For tests that
// kill it, restart it and look at what is left.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "base/status/status.h"
#include "heddle/v1/jobs.grpc.pb.h"

namespace heddle::test {

class CoordinatorProcess {
 public:
  // Does not start it. `under`: where the state folder is made.
  explicit CoordinatorProcess(const std::string& under = "");
  // Kills what still runs and removes the folder.
  ~CoordinatorProcess();
  CoordinatorProcess(const CoordinatorProcess&) = delete;
  CoordinatorProcess& operator=(const CoordinatorProcess&) = delete;

  // Starts the binary with `extra` flags and waits until it answers Status, at most 20 s.
  // UNAVAILABLE with its output if it ended instead.
  Status Start(const std::vector<std::string>& extra = {});
  // Starts it without waiting.
  void Spawn(const std::vector<std::string>& extra = {});
  // Sends a signal and waits for the end; returns the wait status, -1 after 20 s.
  int End(int signal_number);
  // The wait status of a process that ends by itself, -1 after 20 s.
  int Wait();

  pid_t pid() const { return pid_; }
  const std::string& state() const { return state_; }
  std::string address() const { return "unix:" + state_ + "/coordinator.sock"; }
  // Everything it printed so far.
  std::string Output() const;
  // Resident set in KiB.
  int64_t ResidentKib() const;
  // Processor time it used so far.
  double CpuSeconds() const;

  // Stubs of a fresh channel; they survive a restart of the process.
  std::unique_ptr<v1::Jobs::Stub> Jobs() const;
  std::unique_ptr<v1::Checkpoints::Stub> Checkpoints() const;
  std::unique_ptr<v1::Nodes::Stub> Nodes() const;
  std::unique_ptr<v1::Cluster::Stub> Cluster() const;
  std::shared_ptr<grpc::Channel> Channel() const;

 private:
  std::string dir_;
  std::string state_;
  std::string output_;
  pid_t pid_ = -1;
};

// A `command` job that validates: `ranks` ranks of one core each.
v1::SubmitRequest CommandJob(const std::string& name, int ranks = 1);
// A `train` job of the smallest model on a data set that nobody opens.
v1::SubmitRequest TrainJob(const std::string& name, int ranks);

// Submits with a deadline of 10 s; the job's id.
StatusOr<std::string> Submit(v1::Jobs::Stub& jobs, const v1::SubmitRequest& request);
// The job as Get gives it. NOT_FOUND and the like as they come.
StatusOr<v1::Job> GetJob(v1::Jobs::Stub& jobs, const std::string& id);
// Polls until the job's state is `state` (`DONE`, ...), at most 20 s.
Status WaitForState(v1::Jobs::Stub& jobs, const std::string& id, const std::string& state);

}  // namespace heddle::test
