#include "worker/comm/mpi/server_process.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <netinet/in.h>
#include <signal.h>
#include <spawn.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cctype>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <map>
#include <system_error>
#include <utility>

#include "heddle/v1/control.pb.h"
#include "worker/comm/mpi/server_pipe.h"
#include "worker/comm/plugin_transport.h"

namespace heddle::comm {

namespace {

using heddle::v1::RendezvousReply;
using heddle::v1::RendezvousRequest;

constexpr auto kEndGrace = std::chrono::seconds(5);
// First byte of what a rank finds in place of its environment when its server failed.
constexpr char kBadMark = '!';

// Name of the interface with this address, "" if none has it.
std::string InterfaceOf(const std::string& address) {
  ifaddrs* all = nullptr;
  if (getifaddrs(&all) != 0) return "";
  std::string name;
  for (const ifaddrs* one = all; one != nullptr && name.empty(); one = one->ifa_next) {
    if (one->ifa_addr == nullptr) continue;
    std::array<char, INET6_ADDRSTRLEN> text{};
    const int family = one->ifa_addr->sa_family;
    const void* bytes = nullptr;
    if (family == AF_INET) {
      bytes = &reinterpret_cast<const sockaddr_in*>(one->ifa_addr)->sin_addr;
    } else if (family == AF_INET6) {
      bytes = &reinterpret_cast<const sockaddr_in6*>(one->ifa_addr)->sin6_addr;
    }
    if (bytes != nullptr && inet_ntop(family, bytes, text.data(), text.size()) != nullptr &&
        address == text.data()) {
      name = one->ifa_name;
    }
  }
  freeifaddrs(all);
  return name;
}

// OpenMPI's settings for a rank that no mpirun started. What is set already stands.
void SetDefaults(const GroupOptions& options, const std::string& folder) {
  const auto set = [](const char* name, const std::string& value) {
    setenv(name, value.c_str(), /*overwrite=*/0);
  };
  // The launcher is a PMIx server that is none of OpenMPI's own: take all answers from it and leave
  // the binding to cores as it is. This is what its support for such launchers is called.
  set("OMPI_MCA_schizo", "jsm");
  set("OMPI_MCA_orte_tmpdir_base", folder);
  set("OMPI_MCA_btl_vader_backing_directory", folder);  // not /dev/shm, where a kill leaves it
  set("OMPI_MCA_btl", "self,vader,tcp");
  set("OMPI_MCA_pml", "ob1");
  set("OMPI_MCA_osc", "^ucx");
  set("OMPI_MCA_btl_base_warn_component_unused", "0");
  set("OMPI_MCA_mpi_warn_on_fork", "0");
  set("OMPI_MCA_orte_base_help_aggregate", "0");
  set("HWLOC_COMPONENTS", "-gl");  // looks for X servers on ports that are not ours
  if (const std::string interface = InterfaceOf(options.data_address); !interface.empty()) {
    set("OMPI_MCA_btl_tcp_if_include", interface);
  }
}

// PMIx's name of the job: letters, digits and dashes.
std::string SpaceOf(const std::string& key_prefix) {
  std::string space = "heddle-";
  for (const char c : key_prefix) {
    space += std::isalnum(static_cast<unsigned char>(c)) != 0 ? c : '-';
  }
  return space.substr(0, 200);
}

}  // namespace

// The rendezvous store, from any thread.
class ServerProcess::Store {
 public:
  explicit Store(const GroupOptions& options)
      : call_(options.rendezvous),
        prefix_(options.key_prefix + "mpi/"),
        timeout_(options.init_timeout) {}

  Status Set(const std::string& key, const std::string& value) {
    RendezvousRequest request;
    request.set_verb(heddle::v1::RENDEZVOUS_VERB_SET);
    request.add_keys(prefix_ + key);
    request.add_values(value);
    return Ask(&request).status();
  }

  // Waits until all are there.
  StatusOr<std::vector<std::string>> Get(const std::vector<std::string>& keys) {
    RendezvousRequest request;
    request.set_verb(heddle::v1::RENDEZVOUS_VERB_GET);
    for (const std::string& key : keys) request.add_keys(prefix_ + key);
    ASSIGN_OR_RETURN(const RendezvousReply reply, Ask(&request));
    if (reply.values_size() != static_cast<int>(keys.size())) {
      return Unavailable(Str("rendezvous of ", keys.front(), ": an incomplete answer"));
    }
    return std::vector<std::string>(reply.values().begin(), reply.values().end());
  }

 private:
  StatusOr<RendezvousReply> Ask(RendezvousRequest* request) {
    request->set_n(next_.fetch_add(1));
    request->set_timeout_ms(timeout_.count());
    ASSIGN_OR_RETURN(const RendezvousReply reply, call_(*request));
    if (reply.code() != 0) {
      return Unavailable(Str("rendezvous of ", request->keys(0), ": ", reply.message()));
    }
    return reply;
  }

  const RendezvousCall call_;
  const std::string prefix_;
  const std::chrono::milliseconds timeout_;
  std::atomic<uint64_t> next_{1};  // rises per rank; a repeat gives the stored answer
};

std::string ServerProcess::Tasks::Text() const {
  std::string text;
  for (size_t task = 0; task < ranks.size(); ++task) {
    if (task > 0) text += ';';
    for (size_t i = 0; i < ranks[task].size(); ++i) {
      text += (i == 0 ? "" : ",") + std::to_string(ranks[task][i]);
    }
  }
  return text;
}

// Every rank says which is the first of its task.
StatusOr<ServerProcess::Tasks> ServerProcess::Meet(const GroupOptions& options, Store* store) {
  const int first = options.rank - options.local_rank;
  RETURN_IF_ERROR(store->Set(Str("first/", options.rank), std::to_string(first)));
  std::vector<std::string> keys;
  for (int rank = 0; rank < options.world_size; ++rank) keys.push_back(Str("first/", rank));
  ASSIGN_OR_RETURN(const std::vector<std::string> firsts, store->Get(keys));
  std::map<int, std::vector<int>> by_first;
  for (int rank = 0; rank < options.world_size; ++rank) {
    const std::string& text = firsts[static_cast<size_t>(rank)];
    int number = -1;
    std::from_chars(text.data(), text.data() + text.size(), number);
    by_first[number].push_back(rank);
  }
  Tasks tasks;
  for (const auto& [task_first, ranks] : by_first) {
    if (task_first == first) tasks.mine = tasks.ranks.size();
    tasks.ranks.push_back(ranks);
  }
  return tasks;
}

ServerProcess::ServerProcess(int socket, std::string folder, std::shared_ptr<Store> store,
                             Tasks tasks)
    : socket_(socket),
      folder_(std::move(folder)),
      store_(std::move(store)),
      tasks_(std::move(tasks)) {}

StatusOr<std::unique_ptr<ServerProcess>> ServerProcess::Start(const GroupOptions& options) {
  const auto store = std::make_shared<Store>(options);
  ASSIGN_OR_RETURN(Tasks tasks, Meet(options, store.get()));
  std::unique_ptr<ServerProcess> server;
  if (options.local_rank == 0) {
    std::error_code ignored;
    const std::string base = options.scratch.empty()
                                 ? std::filesystem::temp_directory_path(ignored).string()
                                 : options.scratch;
    std::string folder = base + "/heddle-mpi-XXXXXX";
    if (mkdtemp(folder.data()) == nullptr) {
      return Unavailable(Str("a folder for MPI in ", base, ": ", std::strerror(errno)));
    }
    std::array<int, 2> ends{};
    if (socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends.data()) != 0) {
      return Unavailable(Str("socket of the MPI server: ", std::strerror(errno)));
    }
    server.reset(new ServerProcess(ends[0], folder, store, tasks));
    const Status spawned = server->Spawn(ends[1], SpaceOf(options.key_prefix));
    close(ends[1]);
    RETURN_IF_ERROR(spawned);
  }
  ASSIGN_OR_RETURN(const std::vector<std::string> found, store->Get({Str("env/", options.rank)}));
  const std::string& text = found.front();
  if (!text.empty() && text.front() == kBadMark) {
    return Unavailable(
        Str("MPI server of rank ", tasks.ranks[tasks.mine].front(), ": ", text.substr(1)));
  }
  std::string folder;
  for (size_t at = 0; at < text.size();) {
    const std::string one = text.substr(at, text.find('\0', at) - at);
    at += one.size() + 1;
    const size_t equals = one.find('=');
    if (equals == std::string::npos) continue;
    setenv(one.substr(0, equals).c_str(), one.substr(equals + 1).c_str(), /*overwrite=*/1);
    if (one.starts_with("PMIX_SERVER_TMPDIR=")) folder = one.substr(equals + 1);
  }
  SetDefaults(options, folder);
  return server;
}

Status ServerProcess::Spawn(int server_socket, const std::string& space) {
  const std::string binary = BinaryFolder() + "/heddle-mpi-server";
  if (access(binary.c_str(), X_OK) != 0) {
    return Unimplemented(Str("no MPI here: ", binary,
                             " is missing; install libpmix2 and "
                             "libopenmpi3 and build heddle with them"));
  }
  const std::string node = std::to_string(tasks_.mine);
  const std::string ranks = tasks_.Text();
  std::array<char*, 6> argv = {
      const_cast<char*>(binary.c_str()), const_cast<char*>(space.c_str()),
      const_cast<char*>(node.c_str()),   const_cast<char*>(folder_.c_str()),
      const_cast<char*>(ranks.c_str()),  nullptr};
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, server_socket, 3);
  const int failed = posix_spawn(&pid_, binary.c_str(), &actions, nullptr, argv.data(), environ);
  posix_spawn_file_actions_destroy(&actions);
  if (failed != 0) {
    return Unavailable(Str("start of ", binary, ": ", std::strerror(failed)));
  }
  thread_ = std::thread([this] { Serve(); });
  return OkStatus();
}

void ServerProcess::TellRanks(const std::string& why_not) {
  for (const int rank : tasks_.ranks[tasks_.mine]) {
    // A rank that does not hear it waits until its deadline.
    static_cast<void>(store_->Set(Str("env/", rank), kBadMark + why_not));
  }
}

// Parts of all tasks, in order of the tasks.
bool ServerProcess::Exchange(uint32_t number, const std::string& part) {
  if (!store_->Set(Str("fence/", number, "/", tasks_.mine), part).ok()) return false;
  std::vector<std::string> keys;
  for (size_t task = 0; task < tasks_.ranks.size(); ++task) {
    keys.push_back(Str("fence/", number, "/", task));
  }
  const StatusOr<std::vector<std::string>> parts = store_->Get(keys);
  if (!parts.ok()) return false;
  std::string all;
  for (const std::string& one : *parts) all += one;
  return WriteServerMessage(socket_, ServerMessage::kFenceDone, number, all);
}

void ServerProcess::Serve() {
  ServerMessage kind;
  uint32_t number = 0;
  std::string bytes;
  bool told = false;
  while (ReadServerMessage(socket_, &kind, &number, &bytes)) {
    if (kind == ServerMessage::kEnvironment) {
      told = true;
      static_cast<void>(store_->Set(Str("env/", number), bytes));
    } else if (kind == ServerMessage::kFence && !Exchange(number, bytes)) {
      WriteServerMessage(socket_, ServerMessage::kFenceFailed, number, "");
    } else if (kind == ServerMessage::kFailed) {
      told = true;
      TellRanks(bytes);
    }
  }
  if (!told) TellRanks("it ended at once: is libpmix2 installed?");
}

ServerProcess::~ServerProcess() {
  shutdown(socket_, SHUT_RDWR);
  if (thread_.joinable()) thread_.join();
  close(socket_);
  const auto deadline = std::chrono::steady_clock::now() + kEndGrace;
  while (pid_ > 0 && waitpid(pid_, nullptr, WNOHANG) == 0) {
    if (std::chrono::steady_clock::now() > deadline) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
      break;
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  std::error_code ignored;
  std::filesystem::remove_all(folder_, ignored);
}

}  // namespace heddle::comm
