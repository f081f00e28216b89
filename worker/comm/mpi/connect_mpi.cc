// The trainer's end of the MPI plug-in: brings OpenMPI up without mpirun (mpi/README.md).
#include <memory>
#include <utility>

#include "worker/comm/communicator.h"
#include "worker/comm/mpi/server_process.h"
#include "worker/comm/plugin_transport.h"
#include "worker/comm/transport.h"

namespace heddle::comm {

StatusOr<std::unique_ptr<Communicator>> ConnectMpi(const GroupOptions& options) {
  RETURN_IF_ERROR(CheckGroupOptions(options));
  ASSIGN_OR_RETURN(const TransportPlugin* plugin,
                   LoadPlugin("libheddle_mpi.so", "MPI plug-in", "apt install libopenmpi3"));
  RETURN_IF_ERROR(CheckUsable(plugin));
  // Ends when every pair of ranks has spoken: nothing is asked of it after that.
  ASSIGN_OR_RETURN(const std::unique_ptr<ServerProcess> server, ServerProcess::Start(options));
  ASSIGN_OR_RETURN(std::unique_ptr<Transport> transport,
                   ConnectPlugin(plugin, nullptr, "mpi", options));
  return Proven(MakeOrdered(std::move(transport)), options);
}

}  // namespace heddle::comm
