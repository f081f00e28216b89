// Frames between daemon, shim and rank (control-plane X11): a 24-byte header, little-endian, then
// the payload. Used by the static shim, so this header and its target use nothing but the standard
// library. Payloads are messages of control.proto, except those named *Pod below, which the shim
// itself reads or writes. Every byte from a socket is untrusted: FrameReader rejects, never
// crashes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace heddle::control {

// Both ends of a link compare it; the coordinator refuses a worker with another one. A daemon
// speaks the two previous versions too (there are none yet).
inline constexpr uint16_t kProtocolVersion = 1;
inline constexpr size_t kFrameHeaderBytes = 24;
// Header included.
inline constexpr size_t kMaxFrameBytes = size_t{1} << 20;
inline constexpr size_t kMaxPayloadBytes = kMaxFrameBytes - kFrameHeaderBytes;

enum class FrameType : uint16_t {
  // rank -> daemon, relayed by the shim.
  kHello = 1,           // RankHello
  kReady = 2,           // RankReady
  kJoined = 3,          // RankJoined
  kProgress = 4,        // RankProgress; the only type that may be dropped (oldest first)
  kOpenCheckpoint = 5,  // OpenCheckpoint
  kSeal = 6,            // SealShard
  kRendezvous = 7,      // RendezvousRequest
  kDamage = 8,          // DamageReport (worker_link.proto)
  kExit = 9,            // RankExit, the rank's last words
  // daemon -> rank, relayed by the shim.
  kSpec = 32,             // RankSpec
  kStart = 33,            // StartRank
  kStop = 34,             // StopRank
  kCheckpointReply = 35,  // CheckpointReply
  kRendezvousReply = 36,  // RendezvousReply
  // daemon -> shim.
  kStopTask = 64,    // StopTaskPod: the kill ladder
  kAck = 65,         // AckPod: a reliable frame is dealt with, forget it
  kTaskState = 96,   // TaskStatePod
  kSpawned = 97,     // SpawnedPod, per rank
  kRankEof = 98,     // no payload: a rank closed its control socket; its status follows
  kRankExited = 99,  // RankExitedPod
};

// True for the values above.
bool IsKnownFrameType(uint16_t type);
// True for frames to the daemon that the shim keeps until an ACK: all but progress and RANK_EOF.
bool IsReliable(FrameType type);
// True for the reliable frames that come once per rank, are never acknowledged and so are sent
// again after each attach: HELLO, READY, JOINED, EXIT, SPAWNED, RANK_EXITED. A repeat replaces the
// first.
bool IsSticky(FrameType type);
const char* ToText(FrameType type);

struct FrameHeader {
  uint32_t length = 0;  // of the payload
  FrameType type = FrameType::kHello;
  uint16_t version = kProtocolVersion;
  uint64_t fence = 0;
  uint32_t rank = 0;
  uint32_t crc = 0;  // CRC-32C of the payload
};

struct Frame {
  FrameHeader header;
  std::string payload;
};

// CRC-32C (Castagnoli), as in iSCSI: "123456789" gives 0xe3069283.
uint32_t Crc32c(std::string_view bytes);

// Header and payload as they go over the wire. REQUIRES: payload.size() <= kMaxPayloadBytes.
std::string EncodeFrame(FrameType type, uint64_t fence, uint32_t rank, std::string_view payload);
// The same from a frame that was read (its version is kept).
std::string EncodeFrame(const Frame& frame);

// Cuts a byte stream into frames. After kBad the stream is lost: close it.
class FrameReader {
 public:
  enum class Result { kFrame, kNeedMore, kBad };

  void Append(std::string_view bytes);
  // kFrame fills `frame`. kBad: length, type, version or checksum is wrong; `error()` says which.
  Result Next(Frame* frame);
  const std::string& error() const { return error_; }
  // True when no partial frame is pending: an end of file here is clean.
  bool AtBoundary() const { return buffer_.size() == position_; }

 private:
  Result Fail(const std::string& error);

  std::string buffer_;
  size_t position_ = 0;
  std::string error_;
};

// --- payloads the shim reads or writes; host layout, fixed widths, no padding -----------------

enum class StopTaskMode : uint32_t {
  kGraceful = 0,  // the ranks were told by STOP; SIGTERM after `grace_ms`, SIGKILL 10 s later
  kTerm = 1,      // SIGTERM now, SIGKILL after `grace_ms`
  kKill = 2,      // SIGKILL now, the whole tree
};

struct StopTaskPod {
  uint32_t mode = 0;  // StopTaskMode
  uint32_t reserved = 0;
  int64_t grace_ms = 0;
};

// Reliable frames are numbered per connection, from 1, in the order the daemon receives them.
struct AckPod {
  uint64_t number = 0;
};

struct SpawnedPod {
  uint32_t rank = 0;
  int32_t pid = 0;
  int64_t at_ms = 0;  // wall clock
};

struct RankExitedPod {
  uint32_t rank = 0;
  int32_t code = -1;         // exit status; -1 if a signal ended it
  int32_t signal = 0;        // 0 if it exited
  uint32_t oom = 0;          // 1: the cgroup's kill counter rose
  int32_t launch_errno = 0;  // != 0: never ran; which system call failed stands in `launch_step`
  uint32_t launch_step = 0;  // LaunchStep
  int64_t at_ms = 0;         // wall clock
  uint32_t by_shim = 0;      // KillReason: why the shim ended it, 0 = it did not
  uint32_t reserved = 0;
};

enum class LaunchStep : uint32_t {
  kNone = 0,
  kFork = 1,
  kPipes = 2,
  kCgroup = 3,
  kLimits = 4,
  kAffinity = 5,
  kUser = 6,
  kFolder = 9,
  kExec = 7,
  kParentGone = 8,
};
const char* ToText(LaunchStep step);

enum class KillReason : uint32_t {
  kNone = 0,
  kOrphan = 1,
  kOrdered = 2,
  kGraceOver = 3,
  kPeerFailed = 4,
  kTerminated = 5
};
const char* ToText(KillReason reason);

// First frame of every connection and of the `exit` file; `replay` reliable frames follow that the
// daemon may have seen before, among them SPAWNED and RANK_EXITED of every rank so far.
struct TaskStatePod {
  uint32_t ranks = 0;
  uint32_t live = 0;  // ranks that still run
  uint64_t replay = 0;
  uint64_t progress_dropped = 0;
  uint64_t log_bytes_dropped = 0;
  int64_t started_at_ms = 0;
};

// Bytes of a POD, and back; Unpack returns false when the size does not fit.
template <typename T>
std::string_view AsBytes(const T& pod) {
  return std::string_view(reinterpret_cast<const char*>(&pod), sizeof(T));
}
template <typename T>
bool Unpack(std::string_view bytes, T* pod) {
  if (bytes.size() < sizeof(T)) return false;
  __builtin_memcpy(pod, bytes.data(), sizeof(T));
  return true;
}

}  // namespace heddle::control
