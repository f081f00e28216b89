#include "base/net/grpc_channel.h"

#include <grpcpp/channel.h>
#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server_builder.h>

#include <cstdlib>
#include <fstream>
#include <iterator>
#include <mutex>

namespace heddle::net {
namespace {

constexpr int kHeaderBytes = 8 * 1024;
constexpr int kKeepaliveMs = 20'000;
constexpr int kKeepaliveTimeoutMs = 10'000;

StatusOr<std::string> ReadPem(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    return FromErrno("cannot open", path);
  }
  std::string text((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (text.find("-----BEGIN ") == std::string::npos) {
    return InvalidArgument(Str(path, ": not a PEM file"));
  }
  return text;
}

// Between calls nobody polls a client's sockets but gRPC's backup poller, every 5 s unless told
// otherwise: a daemon that restarted would be found again that late. Read once, when gRPC starts;
// a user's own value stands.
void PollOften() { setenv("GRPC_CLIENT_CHANNEL_BACKUP_POLL_INTERVAL_MS", "200", 0); }

struct Pem {
  std::string ca, cert, key;
};

StatusOr<Pem> ReadAll(const TlsFiles& files) {
  Pem pem;
  ASSIGN_OR_RETURN(pem.ca, ReadPem(files.ca));
  ASSIGN_OR_RETURN(pem.cert, ReadPem(files.cert));
  ASSIGN_OR_RETURN(pem.key, ReadPem(files.key));
  return pem;
}

}  // namespace

StatusOr<std::shared_ptr<grpc::Channel>> OpenChannel(const Endpoint& endpoint,
                                                     const Security& security) {
  RETURN_IF_ERROR(CheckSecurity(endpoint, security));
  static std::once_flag once;
  std::call_once(once, PollOften);
  std::shared_ptr<grpc::ChannelCredentials> credentials = grpc::InsecureChannelCredentials();
  if (endpoint.kind == Endpoint::Kind::kTcp && security.tls.Complete()) {
    ASSIGN_OR_RETURN(Pem pem, ReadAll(security.tls));
    grpc::SslCredentialsOptions options;
    options.pem_root_certs = pem.ca;
    options.pem_cert_chain = pem.cert;
    options.pem_private_key = pem.key;
    credentials = grpc::SslCredentials(options);
  }
  grpc::ChannelArguments arguments;
  arguments.SetMaxReceiveMessageSize(kMaxMessageBytes);
  arguments.SetMaxSendMessageSize(kMaxMessageBytes);
  arguments.SetInt(GRPC_ARG_MAX_METADATA_SIZE, kHeaderBytes);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  arguments.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, 100);
  arguments.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, 1000);
  arguments.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  if (endpoint.kind == Endpoint::Kind::kUnix) {
    // A path is no host name; without this the authority is the escaped path.
    arguments.SetString(GRPC_ARG_DEFAULT_AUTHORITY, "localhost");
  }
  return grpc::CreateCustomChannel(ToText(endpoint), credentials, arguments);
}

StatusOr<std::shared_ptr<grpc::ServerCredentials>> MakeServerCredentials(const Endpoint& endpoint,
                                                                         const Security& security) {
  RETURN_IF_ERROR(CheckSecurity(endpoint, security));
  if (endpoint.kind == Endpoint::Kind::kUnix || !security.tls.Complete()) {
    return grpc::InsecureServerCredentials();
  }
  ASSIGN_OR_RETURN(Pem pem, ReadAll(security.tls));
  grpc::SslServerCredentialsOptions options(
      GRPC_SSL_REQUEST_AND_REQUIRE_CLIENT_CERTIFICATE_AND_VERIFY);
  options.pem_root_certs = pem.ca;
  options.pem_key_cert_pairs.push_back({pem.key, pem.cert});
  return grpc::SslServerCredentials(options);
}

void ConfigureServer(grpc::ServerBuilder* builder) {
  builder->SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder->SetMaxSendMessageSize(kMaxMessageBytes);
  builder->AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
  builder->AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kHeaderBytes);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepaliveMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepaliveTimeoutMs);
  builder->AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder->AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 10'000);
}

Status FromGrpc(const grpc::Status& status) {
  if (status.ok()) {
    return OkStatus();
  }
  std::string message = status.error_message();
  if (status.error_code() == grpc::StatusCode::UNAVAILABLE &&
      message.find("Socket closed") != std::string::npos) {
    message += " (a refused TLS certificate also looks like this)";
  }
  return Status(static_cast<StatusCode>(status.error_code()), message);
}

grpc::Status ToGrpc(const Status& status) {
  if (status.ok()) {
    return grpc::Status::OK;
  }
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()), Message(status));
}

}  // namespace heddle::net
