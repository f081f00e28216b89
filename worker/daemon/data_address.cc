#include <arpa/inet.h>
#include <ifaddrs.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include "worker/daemon/worker.h"

namespace heddle::worker {
namespace {

StatusOr<std::string> AddressText(const sockaddr* address) {
  char text[INET6_ADDRSTRLEN] = {};
  const void* bytes = nullptr;
  if (address->sa_family == AF_INET) {
    bytes = &reinterpret_cast<const sockaddr_in*>(address)->sin_addr;
  } else {
    bytes = &reinterpret_cast<const sockaddr_in6*>(address)->sin6_addr;
  }
  if (inet_ntop(address->sa_family, bytes, text, sizeof(text)) == nullptr) {
    return FromErrno("inet_ntop");
  }
  return std::string(text);
}

StatusOr<std::string> InterfaceAddress(const std::string& name) {
  ifaddrs* list = nullptr;
  if (getifaddrs(&list) != 0) return FromErrno("getifaddrs");
  StatusOr<std::string> found = NotFound(Str("interface ", name, " has no address"));
  for (const int family : {AF_INET, AF_INET6}) {
    for (const ifaddrs* one = list; one != nullptr && !found.ok(); one = one->ifa_next) {
      if (one->ifa_addr != nullptr && one->ifa_addr->sa_family == family && name == one->ifa_name) {
        found = AddressText(one->ifa_addr);
      }
    }
  }
  freeifaddrs(list);
  return found;
}

// A connected datagram socket sends nothing, but the kernel chooses the local address.
StatusOr<std::string> LocalAddressTowards(const net::Endpoint& endpoint) {
  addrinfo hints = {};
  hints.ai_socktype = SOCK_DGRAM;
  addrinfo* list = nullptr;
  const std::string port = std::to_string(endpoint.port);
  const int error = getaddrinfo(endpoint.host.c_str(), port.c_str(), &hints, &list);
  if (error != 0) return Unavailable(Str(endpoint.host, ": ", gai_strerror(error)));
  StatusOr<std::string> found = Unavailable(Str("no route to ", endpoint.host));
  for (const addrinfo* one = list; one != nullptr && !found.ok(); one = one->ai_next) {
    const int fd = socket(one->ai_family, SOCK_DGRAM | SOCK_CLOEXEC, 0);
    sockaddr_storage local = {};
    socklen_t size = sizeof(local);
    if (fd >= 0 && connect(fd, one->ai_addr, one->ai_addrlen) == 0 &&
        getsockname(fd, reinterpret_cast<sockaddr*>(&local), &size) == 0) {
      found = AddressText(reinterpret_cast<const sockaddr*>(&local));
    }
    if (fd >= 0) close(fd);
  }
  freeaddrinfo(list);
  return found;
}

}  // namespace

StatusOr<std::string> FindDataAddress(const Options& options) {
  if (!options.data_address.empty()) return options.data_address;
  if (!options.data_interface.empty()) return InterfaceAddress(options.data_interface);
  if (options.coordinator.kind == net::Endpoint::Kind::kUnix) return std::string("127.0.0.1");
  return LocalAddressTowards(options.coordinator);
}

}  // namespace heddle::worker
