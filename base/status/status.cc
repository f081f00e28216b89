#include "base/status/status.h"

#include <charconv>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "absl/strings/cord.h"
#include "base/status/errno_of.h"

namespace heddle {

namespace {

constexpr char kErrnoPayload[] = "heddle/errno";

StatusCode CodeFromErrno(int error) {
  switch (error) {
    case ENOENT:
    case ESRCH:
    case ENXIO:
      return StatusCode::kNotFound;
    case EEXIST:
    case EADDRINUSE:
      return StatusCode::kAlreadyExists;
    case EACCES:
    case EPERM:
    case EROFS:
      return StatusCode::kPermissionDenied;
    case ENOSPC:
    case EDQUOT:
    case EMFILE:
    case ENFILE:
    case ENOMEM:
    case EFBIG:
    case ENOBUFS:
      return StatusCode::kResourceExhausted;
    case EINTR:
    case EAGAIN:
    case ECONNREFUSED:
    case ECONNRESET:
    case ECONNABORTED:
    case ENETUNREACH:
    case EHOSTUNREACH:
    case ENOTCONN:
    case EPIPE:
      return StatusCode::kUnavailable;
    case ETIMEDOUT:
      return StatusCode::kDeadlineExceeded;
    case EINVAL:
    case ENAMETOOLONG:
    case E2BIG:
    case EDOM:
    case ERANGE:
    case EADDRNOTAVAIL:
      return StatusCode::kInvalidArgument;
    case EBUSY:
    case ENOTEMPTY:
    case EISDIR:
    case ENOTDIR:
    case ELOOP:
    case EXDEV:
    case ETXTBSY:
      return StatusCode::kFailedPrecondition;
    case EIO:
    case EBADMSG:
    case ESTALE:
      return StatusCode::kDataLoss;
    case ECANCELED:
      return StatusCode::kCancelled;
    case ENOSYS:
    case EOPNOTSUPP:
      return StatusCode::kUnimplemented;
    default:
      return StatusCode::kInternal;
  }
}

}  // namespace

Status InvalidArgument(const std::string& message) { return absl::InvalidArgumentError(message); }
Status NotFound(const std::string& message) { return absl::NotFoundError(message); }
Status AlreadyExists(const std::string& message) { return absl::AlreadyExistsError(message); }
Status FailedPrecondition(const std::string& message) {
  return absl::FailedPreconditionError(message);
}
Status Unavailable(const std::string& message) { return absl::UnavailableError(message); }
Status DeadlineExceeded(const std::string& message) { return absl::DeadlineExceededError(message); }
Status Aborted(const std::string& message) { return absl::AbortedError(message); }
Status Cancelled(const std::string& message) { return absl::CancelledError(message); }
Status DataLoss(const std::string& message) { return absl::DataLossError(message); }
Status ResourceExhausted(const std::string& message) {
  return absl::ResourceExhaustedError(message);
}
Status PermissionDenied(const std::string& message) { return absl::PermissionDeniedError(message); }
Status Unauthenticated(const std::string& message) { return absl::UnauthenticatedError(message); }
Status Unimplemented(const std::string& message) { return absl::UnimplementedError(message); }
Status Internal(const std::string& message) { return absl::InternalError(message); }

Status FromErrno(std::string_view what, std::string_view path, int error) {
  const char* name = strerrorname_np(error);
  const char* description = strerrordesc_np(error);
  std::string message(what);
  if (!path.empty()) {
    message += Str(" ", path);
  }
  message += Str(": ", description == nullptr ? "unknown error" : description, " (");
  message += name == nullptr ? Str("errno ", error) : std::string(name);
  message += ")";
  Status status(CodeFromErrno(error), message);
  status.SetPayload(kErrnoPayload, absl::Cord(Str(error)));
  return status;
}

int ErrnoOf(const Status& status) {
  const auto payload = status.GetPayload(kErrnoPayload);
  int error = 0;
  if (payload.has_value()) {
    const std::string text(*payload);
    std::from_chars(text.data(), text.data() + text.size(), error);
  }
  return error;
}

Status Annotate(const Status& status, const std::string& context) {
  if (status.ok()) {
    return status;
  }
  Status annotated(status.code(), Str(context, ": ", Message(status)));
  status.ForEachPayload([&annotated](absl::string_view type, const absl::Cord& payload) {
    annotated.SetPayload(type, payload);
  });
  return annotated;
}

namespace status_internal {

void CheckFailed(const char* file, int line, const char* condition, const std::string& detail) {
  std::fprintf(stderr, "heddle: check failed: %s:%d: %s%s%s\n", file, line, condition,
               detail.empty() ? "" : ": ", detail.c_str());
  std::fflush(stderr);
  std::abort();
}

}  // namespace status_internal
}  // namespace heddle
