// What every handler does with a request before it is posted: who asks, which request it is.
#pragma once

#include <string>

#include "coordinator/state/event.h"

namespace google::protobuf {
class Message;
}
namespace grpc {
class CallbackServerContext;
}

namespace heddle::rpc {

// "local" on a unix socket, else the common name of the client's certificate, else "anonymous".
std::string IdentityOf(const grpc::CallbackServerContext& context);

// SHA-256 of the deterministic bytes of a request, so that another body under the same request id
// is noticed (R8).
std::string DigestOf(const google::protobuf::Message& request);

// `request_id` empty: not repeatable.
state::ClientRequest MakeClientRequest(const grpc::CallbackServerContext& context,
                                       const google::protobuf::Message& request,
                                       const std::string& request_id);

}  // namespace heddle::rpc
