// Messages between the first rank of a task and its PMIx server, over a stream socket.
#pragma once

#include <cstdint>
#include <string>

namespace heddle::comm {

enum class ServerMessage : uint32_t {
  kEnvironment = 1,  // server: variables of local rank `number`, each ended by a zero byte
  kFence = 2,        // server: its part of exchange `number`
  kFenceDone = 3,    // rank: the parts of all tasks, one after the other
  kFenceFailed = 4,  // rank: the exchange failed
  kFailed = 5,       // server: it cannot serve, with the reason
};

// False: the other end is gone. Blocking; one writer and one reader at a time.
bool WriteServerMessage(int fd, ServerMessage kind, uint32_t number, const std::string& bytes);
bool ReadServerMessage(int fd, ServerMessage* kind, uint32_t* number, std::string* bytes);

}  // namespace heddle::comm
