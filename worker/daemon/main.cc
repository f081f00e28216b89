// heddle-worker: one per node. Flags, signals, wiring; everything else is in worker.h.
#include <signal.h>
#include <sys/resource.h>
#include <unistd.h>

#include <algorithm>
#include <climits>
#include <cstdio>
#include <memory>
#include <string>

#include <CLI/CLI.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>

#include "base/clock/clock.h"
#include "base/log/log.h"
#include "base/net/grpc_channel.h"
#include "base/units/units.h"
#include "worker/daemon/capacity.h"
#include "worker/daemon/worker.h"

namespace heddle::worker {
namespace {

struct Flags {
  Options options;
  std::string coordinator;
  std::string memory;
  std::string on_term = "drain";
  std::string log_level = "info";
  std::string log_file;
};

// The folder of this program, for the programs beside it.
std::string ProgramFolder() {
  char path[PATH_MAX] = {};
  const ssize_t size = readlink("/proc/self/exe", path, sizeof(path) - 1);
  const std::string program(path, size > 0 ? static_cast<size_t>(size) : 0);
  return program.substr(0, program.rfind('/') + 1);
}

void Declare(CLI::App* app, Flags* flags) {
  Options& options = flags->options;
  app->add_option("--coordinator", flags->coordinator, "unix:PATH or HOST:PORT")
      ->required()
      ->envname("HEDDLE_COORDINATOR");
  app->add_option("--state", options.state_dir, "Folder of this worker")->required();
  app->add_option("--tls-ca", options.security.tls.ca, "CA certificate (PEM)");
  app->add_option("--tls-cert", options.security.tls.cert, "Own certificate (PEM)");
  app->add_option("--tls-key", options.security.tls.key, "Own key (PEM)");
  app->add_flag("--insecure-loopback", options.security.insecure_loopback,
                "Allow loopback TCP without TLS");
  app->add_option("--data-address", options.data_address, "Address ranks bind for each other");
  app->add_option("--data-interface", options.data_interface, "Interface whose address ranks bind");
  app->add_option("--cpus", options.cpus, "CPUs to offer instead of what was granted")
      ->check(CLI::PositiveNumber);
  app->add_option("--share", options.share, "Offer one N-th of what was granted: one of N workers")
      ->check(CLI::Range(1, 1024));
  app->add_option("--memory", flags->memory, "Memory to offer, e.g. 16GiB");
  app->add_option("--gpus", options.gpus, "GPUs to offer instead of all that are found; 0: none")
      ->check(CLI::Range(0, 1024));
  app->add_option("--labels", options.labels, "key=value ...")
      ->delimiter(',')
      ->envname("HEDDLE_WORKER_LABELS");
  app->add_option("--trainer", options.trainer, "heddle-trainer; default: beside this program");
  app->add_option("--shim", options.shim, "heddle-shim; default: beside this program");
  app->add_option("--on-term", flags->on_term, "What SIGTERM does to running tasks")
      ->check(CLI::IsMember({"detach", "drain"}));
  app->add_option("--log-level", flags->log_level, "debug, info, warn, error");
  app->add_option("--log-file", flags->log_file, "Instead of stderr");
}

Status Resolve(Flags* flags) {
  Options& options = flags->options;
  ASSIGN_OR_RETURN(options.coordinator, net::ParseEndpoint(flags->coordinator));
  RETURN_IF_ERROR(net::CheckSecurity(options.coordinator, options.security));
  if (!flags->memory.empty()) {
    ASSIGN_OR_RETURN(options.memory_bytes, ParseBytes(flags->memory));
  }
  if (options.trainer.empty()) options.trainer = ProgramFolder() + "heddle-trainer";
  if (options.shim.empty()) options.shim = ProgramFolder() + "heddle-shim";
  const bool told = std::any_of(options.labels.begin(), options.labels.end(),
                                [](const std::string& label) { return label.starts_with("mpi="); });
  if (!told && FindsMpi(ProgramFolder())) options.labels.push_back(kMpiLabel);
  options.on_term = flags->on_term == "detach" ? OnTerm::kDetach : OnTerm::kDrain;
  log::Options log_options;
  log_options.name = "worker";
  log_options.file = flags->log_file;
  ASSIGN_OR_RETURN(log_options.level, log::ParseLevel(flags->log_level));
  return log::Init(log_options);
}

Status Run(const Options& options) {
  ASSIGN_OR_RETURN(const std::unique_ptr<WorkerState> state, WorkerState::Open(options.state_dir));
  ASSIGN_OR_RETURN(std::shared_ptr<grpc::Channel> channel,
                   net::OpenChannel(options.coordinator, options.security));
  const SystemClock clock;
  boost::asio::io_context io(1);
  Worker worker(&io, &clock, options, state.get(), std::move(channel));
  boost::asio::signal_set signals(io, SIGTERM, SIGINT);
  std::function<void(const boost::system::error_code&, int)> on_signal =
      [&](const boost::system::error_code& error, int number) {
        if (error) return;
        HEDDLE_INFO("signal", {"number", number});
        signals.async_wait(on_signal);
        worker.Stop([&io] { io.stop(); });
      };
  signals.async_wait(on_signal);
  HEDDLE_INFO("worker starts", {"worker", state->worker_id()}, {"instance", state->instance()},
              {"state", state->dir()}, {"coordinator", net::ToText(options.coordinator)});
  Options plain;
  plain.share = options.share;
  if (const std::string over = OvercommitOf(options, MakeCapacity(plain, {})); !over.empty()) {
    HEDDLE_WARN("more is offered than there is", {"what", over});
  }
  worker.Start();
  io.run();
  HEDDLE_INFO("worker ends");
  return OkStatus();
}

int Main(int argc, char** argv) {
  for (const int number : {SIGHUP, SIGPIPE}) signal(number, SIG_IGN);
  Flags flags;
  CLI::App app("heddle-worker: runs the tasks of a coordinator on this node", "heddle-worker");
  app.set_version_flag("--version", HEDDLE_VERSION);
  Declare(&app, &flags);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;
  }
  Status status = Resolve(&flags);
  const bool usage = !status.ok();
  if (status.ok()) status = Run(flags.options);
  if (status.ok()) return 0;
  std::fprintf(stderr, "heddle-worker: %s\n", Message(status).c_str());
  return usage ? 2 : 1;
}

}  // namespace
}  // namespace heddle::worker

int main(int argc, char** argv) { return heddle::worker::Main(argc, argv); }
