// Transports in libraries beside the binary. For this folder.
#pragma once

#include <memory>
#include <string>

#include "base/status/status.h"
#include "worker/comm/communicator.h"
#include "worker/comm/plugin.h"
#include "worker/comm/transport.h"

namespace heddle::comm {

// Loaded once and never unloaded: threads of MPI and NCCL outlive every group. UNIMPLEMENTED where
// the library is missing or cannot be loaded; `what` names it in the error and `remedy` says how to
// get it.
StatusOr<const TransportPlugin*> LoadPlugin(const std::string& library, const std::string& what,
                                            const std::string& remedy);

// FAILED_PRECONDITION: no group can be made here, with the plug-in's reason.
Status CheckUsable(const TransportPlugin* plugin);

// Blocks until every rank is there. UNAVAILABLE with the plug-in's reason. `id` may be null.
StatusOr<std::unique_ptr<Transport>> ConnectPlugin(const TransportPlugin* plugin,
                                                   const unsigned char* id,
                                                   const std::string& backend,
                                                   const GroupOptions& options);

// Folder of the running binary, where plug-ins and helpers lie.
std::string BinaryFolder();

}  // namespace heddle::comm
