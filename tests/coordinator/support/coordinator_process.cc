#include "tests/coordinator/support/coordinator_process.h"

#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <signal.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <thread>

#include "base/net/grpc_channel.h"
#include "base/settings/settings.h"

namespace heddle::test {
namespace {

constexpr int kPatienceMs = 20'000;

std::string ReadAll(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

void SetDeadline(grpc::ClientContext* context, int seconds = 10) {
  context->set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(seconds));
}

}  // namespace

CoordinatorProcess::CoordinatorProcess(const std::string& under) {
  std::string pattern = (under.empty() ? "/tmp" : under) + "/heddle-coord-XXXXXX";
  dir_ = mkdtemp(pattern.data());
  state_ = dir_ + "/state";
  output_ = dir_ + "/output";
}

CoordinatorProcess::~CoordinatorProcess() {
  if (pid_ > 0) {
    End(SIGKILL);
  }
  std::error_code ignored;
  std::filesystem::remove_all(dir_, ignored);
}

void CoordinatorProcess::Spawn(const std::vector<std::string>& extra) {
  const char* bin = getenv("HEDDLE_BIN");
  std::vector<std::string> words = {
      std::string(bin == nullptr ? "build/bin" : bin) + "/heddle-coordinator", "--state", state_};
  if (std::find(extra.begin(), extra.end(), "--read-only-below") == extra.end()) {
    words.insert(words.end(), {"--read-only-below", "64MiB"});
  }
  words.insert(words.end(), extra.begin(), extra.end());
  std::vector<char*> argv;
  for (std::string& word : words) {
    argv.push_back(word.data());
  }
  argv.push_back(nullptr);
  pid_ = fork();
  if (pid_ == 0) {
    const int fd = open(output_.c_str(), O_WRONLY | O_CREAT | O_APPEND, 0600);
    dup2(fd, 1);
    dup2(fd, 2);
    execv(argv[0], argv.data());
    _exit(127);
  }
}

Status CoordinatorProcess::Start(const std::vector<std::string>& extra) {
  Spawn(extra);
  const std::unique_ptr<v1::Cluster::Stub> cluster = Cluster();
  for (int waited_ms = 0; waited_ms < kPatienceMs; waited_ms += 20) {
    grpc::ClientContext context;
    SetDeadline(&context, 1);
    v1::StatusReply reply;
    if (cluster->Status(&context, {}, &reply).ok() && reply.pid() == pid_) {
      return OkStatus();
    }
    if (waitpid(pid_, nullptr, WNOHANG) != 0) {
      pid_ = -1;
      return Unavailable(Str("the coordinator ended: ", Output()));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  return DeadlineExceeded(Str("the coordinator does not answer: ", Output()));
}

int CoordinatorProcess::End(int signal_number) {
  kill(pid_, signal_number);
  return Wait();
}

int CoordinatorProcess::Wait() {
  for (int waited_ms = 0; waited_ms < kPatienceMs; waited_ms += 5) {
    int status = 0;
    if (waitpid(pid_, &status, WNOHANG) == pid_) {
      pid_ = -1;
      return status;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return -1;
}

std::string CoordinatorProcess::Output() const { return ReadAll(output_); }

int64_t CoordinatorProcess::ResidentKib() const {
  std::istringstream status(ReadAll(Str("/proc/", pid_, "/status")));
  for (std::string line; std::getline(status, line);) {
    if (line.rfind("VmRSS:", 0) == 0) {
      return strtoll(line.c_str() + 6, nullptr, 10);
    }
  }
  return -1;
}

double CoordinatorProcess::CpuSeconds() const {
  const std::string stat = ReadAll(Str("/proc/", pid_, "/stat"));
  std::istringstream fields(stat.substr(stat.rfind(')') + 2));
  std::string skipped;
  for (int i = 3; i < 14; ++i) {  // field 3 is the first here; 14 and 15 are user and system ticks
    fields >> skipped;
  }
  double user = 0;
  double system = 0;
  fields >> user >> system;
  return (user + system) / static_cast<double>(sysconf(_SC_CLK_TCK));
}

std::shared_ptr<grpc::Channel> CoordinatorProcess::Channel() const {
  return net::OpenChannel(net::ParseEndpoint(address()).value(), {}).value();
}
std::unique_ptr<v1::Jobs::Stub> CoordinatorProcess::Jobs() const {
  return v1::Jobs::NewStub(Channel());
}
std::unique_ptr<v1::Checkpoints::Stub> CoordinatorProcess::Checkpoints() const {
  return v1::Checkpoints::NewStub(Channel());
}
std::unique_ptr<v1::Nodes::Stub> CoordinatorProcess::Nodes() const {
  return v1::Nodes::NewStub(Channel());
}
std::unique_ptr<v1::Cluster::Stub> CoordinatorProcess::Cluster() const {
  return v1::Cluster::NewStub(Channel());
}

v1::SubmitRequest CommandJob(const std::string& name, int ranks) {
  v1::SubmitRequest request;
  v1::RunConfig& config = *request.mutable_config();
  config.set_name(name);
  config.set_kind(v1::RunConfig::KIND_COMMAND);
  config.mutable_command()->add_argv("/bin/true");
  config.mutable_parallel()->mutable_ranks()->set_min(ranks);
  config.mutable_parallel()->mutable_ranks()->set_max(ranks);
  settings::FillDefaults(&config);
  return request;
}

v1::SubmitRequest TrainJob(const std::string& name, int ranks) {
  v1::SubmitRequest request;
  v1::RunConfig& config = *request.mutable_config();
  config.set_name(name);
  config.mutable_data()->set_path("/nowhere/packed");
  config.mutable_parallel()->mutable_ranks()->set_min(ranks);
  config.mutable_parallel()->mutable_ranks()->set_max(ranks);
  settings::FillDefaults(&config);
  return request;
}

StatusOr<std::string> Submit(v1::Jobs::Stub& jobs, const v1::SubmitRequest& request) {
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::SubmitReply reply;
  RETURN_IF_ERROR(net::FromGrpc(jobs.Submit(&context, request, &reply)));
  return reply.id();
}

StatusOr<v1::Job> GetJob(v1::Jobs::Stub& jobs, const std::string& id) {
  grpc::ClientContext context;
  SetDeadline(&context);
  v1::JobRef request;
  request.set_job(id);
  v1::Job reply;
  RETURN_IF_ERROR(net::FromGrpc(jobs.Get(&context, request, &reply)));
  return reply;
}

Status WaitForState(v1::Jobs::Stub& jobs, const std::string& id, const std::string& state) {
  std::string last;
  for (int waited_ms = 0; waited_ms < kPatienceMs; waited_ms += 20) {
    ASSIGN_OR_RETURN(const v1::Job job, GetJob(jobs, id));
    last = job.state();
    if (last == state) {
      return OkStatus();
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(20));
  }
  return DeadlineExceeded(Str("job ", id, " is ", last, ", not ", state));
}

}  // namespace heddle::test
