#include "base/net/endpoint.h"

#include <charconv>

namespace heddle::net {
namespace {

constexpr size_t kMaxUnixPath = 107;  // sun_path without its terminating zero

}  // namespace

StatusOr<Endpoint> ParseEndpoint(const std::string& text) {
  Endpoint endpoint;
  if (text.rfind("unix:", 0) == 0) {
    endpoint.path = text.substr(5);
    if (endpoint.path.rfind("//", 0) == 0) {
      endpoint.path.erase(0, 2);  // unix:///path, the URI form
    }
    if (endpoint.path.empty()) {
      return InvalidArgument(Str("address \"", text, "\": no path after unix:"));
    }
    if (endpoint.path.size() > kMaxUnixPath) {
      return InvalidArgument(Str("address \"", text, "\": socket path has ", endpoint.path.size(),
                                 " bytes, the system allows ", kMaxUnixPath));
    }
    return endpoint;
  }
  endpoint.kind = Endpoint::Kind::kTcp;
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0) {
    return InvalidArgument(Str("address \"", text, "\": expected unix:PATH or HOST:PORT"));
  }
  endpoint.host = text.substr(0, colon);
  if (endpoint.host.front() == '[' && endpoint.host.back() == ']') {
    endpoint.host = endpoint.host.substr(1, endpoint.host.size() - 2);
  } else if (endpoint.host.find(':') != std::string::npos) {
    return InvalidArgument(Str("address \"", text, "\": write an IPv6 address as [ADDRESS]:PORT"));
  }
  const char* first = text.data() + colon + 1;
  const char* last = text.data() + text.size();
  const auto [end, error] = std::from_chars(first, last, endpoint.port);
  if (error != std::errc() || end != last || first == last || endpoint.host.empty()) {
    return InvalidArgument(Str("address \"", text, "\": the port must be 0 to 65535"));
  }
  return endpoint;
}

std::string ToText(const Endpoint& endpoint) {
  if (endpoint.kind == Endpoint::Kind::kUnix) {
    return Str("unix:", endpoint.path);
  }
  if (endpoint.host.find(':') != std::string::npos) {
    return Str("[", endpoint.host, "]:", endpoint.port);
  }
  return Str(endpoint.host, ":", endpoint.port);
}

bool IsLoopbackTcp(const Endpoint& endpoint) {
  if (endpoint.kind != Endpoint::Kind::kTcp) {
    return false;
  }
  if (endpoint.host == "localhost" || endpoint.host == "::1") {
    return true;
  }
  // A name such as 127.evil.example is not an address: digits and dots only.
  return endpoint.host.rfind("127.", 0) == 0 &&
         endpoint.host.find_first_not_of("0123456789.") == std::string::npos;
}

Status CheckSecurity(const Endpoint& endpoint, const Security& security) {
  if (!security.tls.Empty() && !security.tls.Complete()) {
    return InvalidArgument("TLS needs all of --tls-ca, --tls-cert and --tls-key");
  }
  if (endpoint.kind == Endpoint::Kind::kUnix || security.tls.Complete()) {
    return OkStatus();
  }
  if (!IsLoopbackTcp(endpoint)) {
    return InvalidArgument(Str("address ", ToText(endpoint),
                               " is not loopback: give --tls-ca, --tls-cert and --tls-key"));
  }
  if (!security.insecure_loopback) {
    return InvalidArgument(Str("address ", ToText(endpoint),
                               " without TLS lets every local user in: give --tls-ca, --tls-cert "
                               "and --tls-key, or --insecure-loopback to accept that"));
  }
  return OkStatus();
}

}  // namespace heddle::net
