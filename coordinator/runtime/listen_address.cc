#include "coordinator/runtime/listen_address.h"

#include <netdb.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace heddle::runtime {
namespace {

bool PortTaken(const net::Endpoint& endpoint) {
  addrinfo* found = nullptr;
  if (getaddrinfo(endpoint.host.c_str(), Str(endpoint.port).c_str(), nullptr, &found) != 0) {
    return false;
  }
  const int fd = socket(found->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const int reuse = 1;
  setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &reuse, sizeof(reuse));
  const bool taken = bind(fd, found->ai_addr, found->ai_addrlen) != 0 && errno == EADDRINUSE;
  close(fd);
  freeaddrinfo(found);
  return taken;
}

// 0 if somebody took the connection, else why not. Without waiting: a full backlog (EAGAIN) has an
// owner too.
int TryConnect(const std::string& path) {
  sockaddr_un address = {};
  address.sun_family = AF_UNIX;
  std::memcpy(address.sun_path, path.c_str(), std::min(path.size(), sizeof(address.sun_path) - 1));
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) {
    return errno;
  }
  const bool connected =
      connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) == 0;
  const int error = connected ? 0 : errno;
  close(fd);
  return error;
}

Status CheckSocketFree(const std::string& path) {
  const std::string what = Str("cannot listen on unix:", path, ": ");
  struct stat info = {};
  if (lstat(path.c_str(), &info) != 0) {
    return OkStatus();  // nothing is there
  }
  if (!S_ISSOCK(info.st_mode)) {
    return FailedPrecondition(Str(what, "it exists and is no socket"));
  }
  switch (const int error = TryConnect(path); error) {
    case 0:
    case EAGAIN:
      return FailedPrecondition(Str(what, "the socket is in use by another process"));
    case ECONNREFUSED:  // its owner was killed
      return unlink(path.c_str()) == 0 || errno == ENOENT
                 ? OkStatus()
                 : FromErrno("cannot remove the stale socket", path);
    case ENOENT:
      return OkStatus();
    default:
      return FromErrno("cannot tell whether somebody listens on", path, error);
  }
}

}  // namespace

Status CheckFree(const net::Endpoint& endpoint) {
  if (endpoint.kind == net::Endpoint::Kind::kUnix) {
    return CheckSocketFree(endpoint.path);
  }
  if (PortTaken(endpoint)) {
    return FailedPrecondition(
        Str("cannot listen on ", net::ToText(endpoint), ": the port is in use by another process"));
  }
  return OkStatus();
}

}  // namespace heddle::runtime
