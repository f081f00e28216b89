// The trainer's end of the CUDA plug-in: exchanges the unique id through the rendezvous store.
#include <array>

#include "heddle/v1/control.pb.h"
#include "worker/comm/communicator.h"
#include "worker/comm/plugin_transport.h"
#include "worker/comm/transport.h"

namespace heddle::comm {

namespace {

using heddle::v1::RendezvousReply;
using heddle::v1::RendezvousRequest;

StatusOr<const TransportPlugin*> Plugin() {
  return LoadPlugin("libheddle_cuda.so", "CUDA plug-in", "./dev setup --cuda, then ./dev build");
}

// Rank 0 makes the id and publishes it, the others wait for it.
StatusOr<std::string> ShareId(const TransportPlugin* plugin, const GroupOptions& options) {
  std::string id(kPluginIdBytes, '\0');
  RendezvousRequest request;
  request.set_n(1);
  request.add_keys(options.key_prefix + "once/nccl-id");
  request.set_timeout_ms(options.init_timeout.count());
  if (options.rank == 0) {
    std::array<char, 512> error{};
    if (plugin->unique_id(reinterpret_cast<unsigned char*>(id.data()),
                          {error.data(), static_cast<int>(error.size())}) != 0) {
      return FailedPrecondition(Str("NCCL gives no unique id: ", error.data()));
    }
    request.set_verb(heddle::v1::RENDEZVOUS_VERB_SET);
    request.add_values(id);
  } else {
    request.set_verb(heddle::v1::RENDEZVOUS_VERB_GET);
  }
  ASSIGN_OR_RETURN(const RendezvousReply reply, options.rendezvous(request));
  if (reply.code() != 0) {
    return Unavailable(Str("rendezvous of the NCCL id: ", reply.message()));
  }
  if (options.rank == 0) {
    return id;
  }
  if (reply.values_size() != 1 || reply.values(0).size() != kPluginIdBytes) {
    return Unavailable("rendezvous of the NCCL id: no id of 128 bytes came");
  }
  return reply.values(0);
}

}  // namespace

bool NcclUsable() {
  const StatusOr<const TransportPlugin*> plugin = Plugin();
  return plugin.ok() && CheckUsable(*plugin).ok();
}

StatusOr<std::unique_ptr<Communicator>> ConnectNccl(const GroupOptions& options) {
  ASSIGN_OR_RETURN(const TransportPlugin* plugin, Plugin());
  RETURN_IF_ERROR(CheckUsable(plugin));
  ASSIGN_OR_RETURN(const std::string id, ShareId(plugin, options));
  ASSIGN_OR_RETURN(
      std::unique_ptr<Transport> transport,
      ConnectPlugin(plugin, reinterpret_cast<const unsigned char*>(id.data()), "nccl", options));
  return Proven(MakeOrdered(std::move(transport)), options);
}

}  // namespace heddle::comm
