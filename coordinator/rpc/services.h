// The gRPC services of the coordinator: authorise, decode, validate, post to the core, reply. They
// hold no state of their own; a handler may run on any gRPC thread, what it posts runs on the state
// thread.
#pragma once

#include <functional>
#include <memory>

namespace grpc {
class Service;
}

namespace heddle::rpc {

class Core;
class LogFiles;

// `core` and `logs` outlive the server that the services are registered with.
std::unique_ptr<grpc::Service> MakeJobsService(Core* core, LogFiles* logs);
std::unique_ptr<grpc::Service> MakeCheckpointsService(Core* core);
std::unique_ptr<grpc::Service> MakeNodesService(Core* core);
std::unique_ptr<grpc::Service> MakeClusterService(Core* core);
std::unique_ptr<grpc::Service> MakeWorkerService(Core* core, LogFiles* logs);

}  // namespace heddle::rpc
