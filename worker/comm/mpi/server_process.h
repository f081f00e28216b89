// The trainer's end of heddle-mpi-server. Torch-free, MPI-free.
#pragma once

#include <sys/types.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/status/status.h"
#include "worker/comm/communicator.h"

namespace heddle::comm {

class ServerProcess {
 public:
  // Called by all ranks of the group, before MPI starts in this process: sets the environment that
  // OpenMPI reads. The first rank of a task gets its server, which must live until all ranks of the
  // task have spoken with all others; the others get null. Variables that the user has set stand.
  // UNIMPLEMENTED: the binary is missing. UNAVAILABLE: ranks did not come in time, or no server.
  static StatusOr<std::unique_ptr<ServerProcess>> Start(const GroupOptions& options);

  // Ends the server and waits for it.
  ~ServerProcess();
  ServerProcess(const ServerProcess&) = delete;
  ServerProcess& operator=(const ServerProcess&) = delete;

 private:
  class Store;
  struct Tasks {
    std::vector<std::vector<int>> ranks;  // of every task, in order of their first ranks
    size_t mine = 0;
    std::string Text() const;  // "0,1;2,3"
  };
  static StatusOr<Tasks> Meet(const GroupOptions& options, Store* store);

  ServerProcess(int socket, std::string folder, std::shared_ptr<Store> store, Tasks tasks);
  Status Spawn(int server_socket, const std::string& space);
  void Serve();
  void TellRanks(const std::string& why_not);
  bool Exchange(uint32_t number, const std::string& part);

  const int socket_;
  const std::string folder_;
  const std::shared_ptr<Store> store_;
  const Tasks tasks_;
  pid_t pid_ = -1;
  std::thread thread_;
};

}  // namespace heddle::comm
