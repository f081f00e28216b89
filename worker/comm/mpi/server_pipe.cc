#include "worker/comm/mpi/server_pipe.h"

#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>

namespace heddle::comm {

namespace {

struct Head {
  uint32_t kind;
  uint32_t number;
  uint64_t bytes;
};

// Of a peer that is broken rather than of any that is ours.
constexpr uint64_t kBytesMax = uint64_t{64} << 20;

bool WriteAll(int fd, const char* data, size_t size) {
  while (size > 0) {
    const ssize_t sent = send(fd, data, size, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    data += sent;
    size -= static_cast<size_t>(sent);
  }
  return true;
}

bool ReadAll(int fd, char* data, size_t size) {
  while (size > 0) {
    const ssize_t got = recv(fd, data, size, 0);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    data += got;
    size -= static_cast<size_t>(got);
  }
  return true;
}

}  // namespace

bool WriteServerMessage(int fd, ServerMessage kind, uint32_t number, const std::string& bytes) {
  const Head head{static_cast<uint32_t>(kind), number, bytes.size()};
  return WriteAll(fd, reinterpret_cast<const char*>(&head), sizeof(head)) &&
         WriteAll(fd, bytes.data(), bytes.size());
}

bool ReadServerMessage(int fd, ServerMessage* kind, uint32_t* number, std::string* bytes) {
  Head head{};
  if (!ReadAll(fd, reinterpret_cast<char*>(&head), sizeof(head)) || head.bytes > kBytesMax) {
    return false;
  }
  *kind = static_cast<ServerMessage>(head.kind);
  *number = head.number;
  bytes->resize(head.bytes);
  return ReadAll(fd, bytes->data(), bytes->size());
}

}  // namespace heddle::comm
