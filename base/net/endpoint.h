// Addresses a daemon listens on or dials: `unix:PATH` or `HOST:PORT`. Parsing only, no I/O, so that
// every binary agrees on the text form and on what counts as loopback (reliability S1, S2).
#pragma once

#include <cstdint>
#include <string>

#include "base/status/status.h"

namespace heddle::net {

struct Endpoint {
  enum class Kind { kUnix, kTcp };
  Kind kind = Kind::kUnix;
  std::string path;  // kUnix
  std::string host;  // kTcp; without brackets
  uint16_t port = 0;
};

// Reads `unix:PATH`, `HOST:PORT` or `[V6]:PORT`. Port 0 is accepted (a listener picks one).
// INVALID_ARGUMENT names the text; a unix path longer than the kernel's 107 bytes is refused here,
// where the message can still say so.
StatusOr<Endpoint> ParseEndpoint(const std::string& text);

// The form ParseEndpoint reads, which is also a gRPC target.
std::string ToText(const Endpoint& endpoint);

// True for 127.0.0.0/8, ::1 and `localhost`; false for a unix socket.
bool IsLoopbackTcp(const Endpoint& endpoint);

// Files of a mutual TLS identity in PEM. All three or none.
struct TlsFiles {
  std::string ca;    // certificates the other side must chain to
  std::string cert;  // own certificate, with its chain
  std::string key;
  bool Complete() const { return !ca.empty() && !cert.empty() && !key.empty(); }
  bool Empty() const { return ca.empty() && cert.empty() && key.empty(); }
};

// How one end of a connection proves itself.
struct Security {
  TlsFiles tls;
  // Allows loopback TCP without TLS. Loopback is not private on a shared host, hence the name.
  bool insecure_loopback = false;
};

// The transport rule of both ends: a unix socket needs nothing, TCP needs all of `tls`, loopback
// TCP may do without if `insecure_loopback`. INVALID_ARGUMENT says which flag is missing.
Status CheckSecurity(const Endpoint& endpoint, const Security& security);

}  // namespace heddle::net
