// gRPC channels and server credentials with our settings (reliability D5-D7): mutual TLS from
// files, message limits, keepalive that the server accepts, and the two-way translation of status
// codes. gRPC itself stays out of this header: it costs a second per file that includes it.
#pragma once

#include <memory>

#include "base/net/endpoint.h"
#include "base/status/status.h"

namespace grpc {
class Channel;
class ServerBuilder;
class ServerCredentials;
class Status;
}  // namespace grpc

namespace heddle::net {

// Largest message either side accepts (control-plane R2), header cap included separately.
inline constexpr int kMaxMessageBytes = 4 * 1024 * 1024;

// A channel to `endpoint`. Does not connect: the first call does, and reconnects take at most 1 s
// (a local daemon that restarts is found again at once). INVALID_ARGUMENT by CheckSecurity, or if a
// TLS file is missing or unreadable (names it).
StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const Endpoint& endpoint,
                                                     const Security& security);

// Credentials for a listener on `endpoint`; with TLS a client certificate is required and verified.
StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(const Endpoint& endpoint,
                                                                         const Security& security);

// Message and header limits, keepalive, no port sharing (a port in use is an error).
void ConfigureServer(grpc::ServerBuilder* builder);

// The one translator between our codes and gRPC's, which are equal by number. UNAVAILABLE from the
// transport gets the hint that TLS refusals look like dropped connections.
Status FromGrpc(const grpc::Status& status);
grpc::Status ToGrpc(const Status& status);

}  // namespace heddle::net
