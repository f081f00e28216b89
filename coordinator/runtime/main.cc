// heddle-coordinator: the truth of a cluster. Flags, listeners, signals.
#include <fcntl.h>
#include <grpcpp/impl/service_type.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <sys/stat.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/signal_set.hpp>
#include <chrono>
#include <csignal>
#include <iostream>
#include <thread>

#include "base/log/log.h"
#include "base/net/grpc_channel.h"
#include "base/units/units.h"
#include "coordinator/rpc/log_files.h"
#include "coordinator/rpc/services.h"
#include "coordinator/runtime/coordinator.h"
#include "coordinator/runtime/listen_address.h"
#include "coordinator/runtime/records.h"
#include "coordinator/runtime/retention.h"

namespace heddle::runtime {
namespace {

struct Flags {
  CoordinatorOptions coordinator;
  std::vector<std::string> listen;
  net::Security security;
  std::string log_level = "info";
  std::string read_only_below;
  std::chrono::nanoseconds keep_finished{0};
  bool verify = false;
};

// Before a folder is made: whether these addresses may be listened on at all.
Status CheckAllowed(const Flags& flags) {
  for (const std::string& text : flags.listen) {
    ASSIGN_OR_RETURN(const net::Endpoint endpoint, net::ParseEndpoint(text));
    RETURN_IF_ERROR(net::MakeServerCredentials(endpoint, flags.security).status());
  }
  return OkStatus();
}

// Before the store is opened: a coordinator that cannot serve must not raise the term either.
Status CheckAddresses(const std::vector<std::string>& listen) {
  for (const std::string& text : listen) {
    ASSIGN_OR_RETURN(const net::Endpoint endpoint, net::ParseEndpoint(text));
    RETURN_IF_ERROR(CheckFree(endpoint));
  }
  return OkStatus();
}

StatusOr<std::unique_ptr<grpc::Server>> Listen(
    const Flags& flags, const std::vector<std::unique_ptr<grpc::Service>>& services) {
  grpc::ServerBuilder builder;
  net::ConfigureServer(&builder);
  for (const std::string& text : flags.listen) {
    ASSIGN_OR_RETURN(const net::Endpoint endpoint, net::ParseEndpoint(text));
    ASSIGN_OR_RETURN(std::shared_ptr<grpc::ServerCredentials> credentials,
                     net::MakeServerCredentials(endpoint, flags.security));
    RETURN_IF_ERROR(CheckFree(endpoint));  // again: opening the store took its time
    builder.AddListeningPort(net::ToText(endpoint), credentials);
  }
  for (const std::unique_ptr<grpc::Service>& service : services) {
    builder.RegisterService(service.get());
  }
  std::unique_ptr<grpc::Server> server = builder.BuildAndStart();
  if (server == nullptr) {
    std::string all;
    for (const std::string& text : flags.listen) {
      all += all.empty() ? text : ", " + text;
    }
    return FailedPrecondition(
        Str("cannot listen on ", all, ": in use, or not an address of this machine"));
  }
  return server;
}

Status VerifyOnly(const CoordinatorOptions& options) {
  ASSIGN_OR_RETURN(const std::unique_ptr<store::RocksLog> log,
                   store::RocksLog::OpenReadOnly(options.state_dir));
  RETURN_IF_ERROR(log->VerifyChecksums());
  RETURN_IF_ERROR(VerifyJournal(*log));
  std::cout << "state folder " << options.state_dir
            << ": checksums are right and the journal replays to the records\n";
  return OkStatus();
}

Status Serve(const Flags& flags) {
  RETURN_IF_ERROR(CheckAllowed(flags));
  if (access(flags.coordinator.state_dir.c_str(), F_OK) != 0) {
    // No owner to name before the address, as below: it can be checked before the folder is made.
    RETURN_IF_ERROR(CheckAddresses(flags.listen));
  }
  ASSIGN_OR_RETURN(const store::StateLock lock,
                   store::StateLock::Acquire(flags.coordinator.state_dir));
  RETURN_IF_ERROR(CheckAddresses(flags.listen));
  const SystemClock clock;
  // Outlives the coordinator, whose file pool may still read for a stream that is over.
  rpc::LogFiles logs(Str(flags.coordinator.state_dir, "/logs"));
  Coordinator coordinator(flags.coordinator, clock);
  Retention retention(&coordinator, &logs, flags.keep_finished / std::chrono::milliseconds(1));
  RETURN_IF_ERROR(coordinator.Start());
  retention.Start();
  std::vector<std::unique_ptr<grpc::Service>> services;
  services.push_back(rpc::MakeJobsService(&coordinator, &logs));
  services.push_back(rpc::MakeCheckpointsService(&coordinator));
  services.push_back(rpc::MakeNodesService(&coordinator));
  services.push_back(rpc::MakeClusterService(&coordinator));
  services.push_back(rpc::MakeWorkerService(&coordinator, &logs));
  ASSIGN_OR_RETURN(const std::unique_ptr<grpc::Server> server, Listen(flags, services));
  HEDDLE_INFO("serving", {"listen", flags.listen.front()}, {"pid", getpid()});

  boost::asio::io_context signals_io;
  boost::asio::signal_set signals(signals_io, SIGTERM, SIGINT);
  signals.async_wait([&](const boost::system::error_code& error, int) {
    if (!error) {
      // No trainer is touched: streams end, what was accepted becomes durable.
      server->Shutdown(std::chrono::system_clock::now() + std::chrono::milliseconds(500));
      coordinator.Stop();
    }
  });
  boost::asio::signal_set hangup(signals_io, SIGHUP);
  std::function<void()> reopen = [&] {
    hangup.async_wait([&](const boost::system::error_code& error, int) {
      if (!error) {
        (void)log::Reopen();  // the old file goes on if the new one cannot be opened
        reopen();
      }
    });
  };
  reopen();
  std::thread signal_thread([&] { signals_io.run(); });
  coordinator.Run();
  signals_io.stop();
  signal_thread.join();
  server->Wait();
  HEDDLE_INFO("stopped");
  return OkStatus();
}

Status ReadFlags(int argc, char** argv, Flags* flags, bool* done) {
  CLI::App app{"heddle-coordinator: schedules training jobs onto workers"};
  app.add_option("--state", flags->coordinator.state_dir, "state folder")->required();
  app.add_option("--listen", flags->listen, "unix:PATH or HOST:PORT, may be repeated");
  app.add_option("--checkpoint-root", flags->coordinator.checkpoint_root,
                 "folder that workers see under the same path (default STATE/checkpoints)");
  app.add_option("--tls-ca", flags->security.tls.ca, "PEM file: clients must chain to it");
  app.add_option("--tls-cert", flags->security.tls.cert, "PEM file: own certificate");
  app.add_option("--tls-key", flags->security.tls.key, "PEM file: own key");
  app.add_flag("--insecure-loopback", flags->security.insecure_loopback,
               "allow loopback TCP without TLS");
  app.add_option("--log-level", flags->log_level, "debug, info, warn, error");
  app.add_option("--read-only-below", flags->read_only_below,
                 "free space under which nothing new starts (default 2GiB or 5 %)");
  std::string keep_finished = "30d";
  app.add_option("--keep-finished", keep_finished,
                 "how long logs and metric points of finished jobs stay, and nodes that are gone "
                 "(default 30d; 0: for ever)");
  app.add_flag("--verify", flags->verify, "check the state folder and exit");
  app.add_flag("--repair", flags->coordinator.repair,
               "accept the loss of acknowledged changes after disk damage");
  app.set_version_flag("--version", std::string(HEDDLE_VERSION));
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    *done = true;
    return app.exit(error) == 0 ? OkStatus() : InvalidArgument("see --help");
  }
  if (flags->listen.empty()) {
    flags->listen.push_back(Str("unix:", flags->coordinator.state_dir, "/coordinator.sock"));
  }
  if (flags->coordinator.checkpoint_root.empty()) {
    flags->coordinator.checkpoint_root = Str(flags->coordinator.state_dir, "/checkpoints");
  }
  if (!flags->read_only_below.empty()) {
    ASSIGN_OR_RETURN(const int64_t bytes, ParseBytes(flags->read_only_below));
    flags->coordinator.disk.read_only_bytes = static_cast<uint64_t>(bytes);
    flags->coordinator.disk.read_only_fraction = 0;
  }
  const StatusOr<std::chrono::nanoseconds> keep = ParseDuration(keep_finished);
  if (!keep.ok()) {
    return Annotate(keep.status(), "--keep-finished");
  }
  flags->keep_finished = *keep;
  flags->coordinator.version = HEDDLE_VERSION;
  return OkStatus();
}

// With a closed descriptor 2 the store's next file would get that number, and the log with it.
void OpenStandardStreams() {
  int fd = 0;
  do {
    fd = open("/dev/null", O_RDWR);
  } while (fd >= 0 && fd <= STDERR_FILENO);
  if (fd >= 0) {
    close(fd);
  }
}

Status Main(int argc, char** argv) {
  OpenStandardStreams();
  signal(SIGPIPE, SIG_IGN);
  umask(0077);
  Flags flags;
  bool done = false;
  RETURN_IF_ERROR(ReadFlags(argc, argv, &flags, &done));
  if (done) {
    return OkStatus();
  }
  ASSIGN_OR_RETURN(const log::Level level, log::ParseLevel(flags.log_level));
  RETURN_IF_ERROR(log::Init({.level = level, .file = "", .name = "coordinator"}));
  if (flags.verify) {
    return VerifyOnly(flags.coordinator);
  }
  return Serve(flags);
}

}  // namespace
}  // namespace heddle::runtime

int main(int argc, char** argv) {
  const heddle::Status status = heddle::runtime::Main(argc, argv);
  if (!status.ok()) {
    std::cerr << "heddle-coordinator: " << heddle::Message(status) << "\n";
    return status.code() == heddle::StatusCode::kInvalidArgument ? 2 : 1;
  }
  return 0;
}
