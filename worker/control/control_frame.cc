#include "worker/control/control_frame.h"

#include <array>
#include <bit>
#include <cstring>

namespace heddle::control {
namespace {

static_assert(std::endian::native == std::endian::little, "frames are written in host order");
static_assert(sizeof(StopTaskPod) == 16 && sizeof(SpawnedPod) == 16 &&
                  sizeof(RankExitedPod) == 40 && sizeof(TaskStatePod) == 40,
              "PODs have no padding");

constexpr std::array<uint32_t, 256> MakeCrcTable() {
  std::array<uint32_t, 256> table = {};
  for (uint32_t i = 0; i < 256; ++i) {
    uint32_t value = i;
    for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) ? 0x82f63b78u : 0);
    table[i] = value;
  }
  return table;
}
constexpr std::array<uint32_t, 256> kCrcTable = MakeCrcTable();

template <typename T>
void Put(std::string* out, T value) {
  char bytes[sizeof(T)];
  std::memcpy(bytes, &value, sizeof(T));
  out->append(bytes, sizeof(T));
}

template <typename T>
T Get(const char* bytes) {
  T value;
  std::memcpy(&value, bytes, sizeof(T));
  return value;
}

std::string Encode(FrameType type, uint16_t version, uint64_t fence, uint32_t rank,
                   std::string_view payload) {
  std::string out;
  out.reserve(kFrameHeaderBytes + payload.size());
  Put<uint32_t>(&out, static_cast<uint32_t>(payload.size()));
  Put<uint16_t>(&out, static_cast<uint16_t>(type));
  Put<uint16_t>(&out, version);
  Put<uint64_t>(&out, fence);
  Put<uint32_t>(&out, rank);
  Put<uint32_t>(&out, Crc32c(payload));
  out.append(payload);
  return out;
}

}  // namespace

const char* ToText(FrameType type) {
  switch (type) {
    case FrameType::kHello:
      return "HELLO";
    case FrameType::kReady:
      return "READY";
    case FrameType::kJoined:
      return "JOINED";
    case FrameType::kProgress:
      return "PROGRESS";
    case FrameType::kOpenCheckpoint:
      return "OPEN_CHECKPOINT";
    case FrameType::kSeal:
      return "SEAL";
    case FrameType::kRendezvous:
      return "RENDEZVOUS";
    case FrameType::kDamage:
      return "DAMAGE";
    case FrameType::kExit:
      return "EXIT";
    case FrameType::kSpec:
      return "SPEC";
    case FrameType::kStart:
      return "START";
    case FrameType::kStop:
      return "STOP";
    case FrameType::kCheckpointReply:
      return "CHECKPOINT_REPLY";
    case FrameType::kRendezvousReply:
      return "RENDEZVOUS_REPLY";
    case FrameType::kStopTask:
      return "STOP_TASK";
    case FrameType::kAck:
      return "ACK";
    case FrameType::kTaskState:
      return "TASK_STATE";
    case FrameType::kSpawned:
      return "SPAWNED";
    case FrameType::kRankEof:
      return "RANK_EOF";
    case FrameType::kRankExited:
      return "RANK_EXITED";
  }
  return "?";
}

bool IsKnownFrameType(uint16_t type) { return *ToText(static_cast<FrameType>(type)) != '?'; }

bool IsReliable(FrameType type) {
  return type != FrameType::kProgress && type != FrameType::kRankEof &&
         type != FrameType::kTaskState;
}

bool IsSticky(FrameType type) {
  switch (type) {
    case FrameType::kHello:
    case FrameType::kReady:
    case FrameType::kJoined:
    case FrameType::kExit:
    case FrameType::kSpawned:
    case FrameType::kRankExited:
      return true;
    default:
      return false;
  }
}

const char* ToText(LaunchStep step) {
  switch (step) {
    case LaunchStep::kNone:
      return "none";
    case LaunchStep::kFork:
      return "fork";
    case LaunchStep::kPipes:
      return "pipes";
    case LaunchStep::kCgroup:
      return "join cgroup";
    case LaunchStep::kLimits:
      return "set limits";
    case LaunchStep::kAffinity:
      return "bind to CPUs";
    case LaunchStep::kUser:
      return "change user";
    case LaunchStep::kFolder:
      return "change folder";
    case LaunchStep::kExec:
      return "start program";
    case LaunchStep::kParentGone:
      return "shim gone";
  }
  return "?";
}

const char* ToText(KillReason reason) {
  switch (reason) {
    case KillReason::kNone:
      return "none";
    case KillReason::kOrphan:
      return "no contact to the coordinator for too long";
    case KillReason::kOrdered:
      return "ordered";
    case KillReason::kGraceOver:
      return "did not leave in the time given";
    case KillReason::kPeerFailed:
      return "another rank of the task failed";
    case KillReason::kTerminated:
      return "the shim was told to stop";
  }
  return "?";
}

uint32_t Crc32c(std::string_view bytes) {
  uint32_t crc = 0xffffffffu;
  for (const char byte : bytes) {
    crc = (crc >> 8) ^ kCrcTable[(crc ^ static_cast<unsigned char>(byte)) & 0xff];
  }
  return crc ^ 0xffffffffu;
}

std::string EncodeFrame(FrameType type, uint64_t fence, uint32_t rank, std::string_view payload) {
  return Encode(type, kProtocolVersion, fence, rank, payload);
}

std::string EncodeFrame(const Frame& frame) {
  return Encode(frame.header.type, frame.header.version, frame.header.fence, frame.header.rank,
                frame.payload);
}

void FrameReader::Append(std::string_view bytes) {
  if (position_ > 0 && position_ >= buffer_.size() / 2) {
    buffer_.erase(0, position_);
    position_ = 0;
  }
  buffer_.append(bytes);
}

FrameReader::Result FrameReader::Fail(const std::string& error) {
  error_ = error;
  return Result::kBad;
}

FrameReader::Result FrameReader::Next(Frame* frame) {
  if (!error_.empty()) return Result::kBad;
  const size_t available = buffer_.size() - position_;
  if (available < kFrameHeaderBytes) return Result::kNeedMore;
  const char* bytes = buffer_.data() + position_;
  FrameHeader header;
  header.length = Get<uint32_t>(bytes);
  const uint16_t type = Get<uint16_t>(bytes + 4);
  header.version = Get<uint16_t>(bytes + 6);
  header.fence = Get<uint64_t>(bytes + 8);
  header.rank = Get<uint32_t>(bytes + 16);
  header.crc = Get<uint32_t>(bytes + 20);
  if (header.length > kMaxPayloadBytes) {
    return Fail("frame of " + std::to_string(header.length) + " bytes");
  }
  if (header.version == 0 || header.version > kProtocolVersion) {
    return Fail("frame of protocol version " + std::to_string(header.version));
  }
  if (!IsKnownFrameType(type)) return Fail("frame of unknown type " + std::to_string(type));
  header.type = static_cast<FrameType>(type);
  if (available < kFrameHeaderBytes + header.length) return Result::kNeedMore;
  const std::string_view payload(bytes + kFrameHeaderBytes, header.length);
  if (Crc32c(payload) != header.crc) {
    return Fail(std::string("checksum of a ") + ToText(header.type) + " frame");
  }
  frame->header = header;
  frame->payload.assign(payload);
  position_ += kFrameHeaderBytes + header.length;
  return Result::kFrame;
}

}  // namespace heddle::control
