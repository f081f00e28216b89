// The one vocabulary for results: Status and StatusOr are absl's, with the code as the reaction the
// caller should have (architecture S22), makers, the propagation macros, Str() and HEDDLE_CHECK.
// Debian's absl::string_view is not std::string_view, so messages are std::string here.
#pragma once

#include <cerrno>
#include <charconv>
#include <concepts>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace heddle {

using Status = absl::Status;
using StatusCode = absl::StatusCode;
template <typename T>
using StatusOr = absl::StatusOr<T>;

inline Status OkStatus() { return Status(); }

// The caller broke the contract of a request or a file; repeating it cannot help.
Status InvalidArgument(const std::string& message);
Status NotFound(const std::string& message);
Status AlreadyExists(const std::string& message);
// The thing is in the wrong state for this; fix the state first.
Status FailedPrecondition(const std::string& message);
// Retry later, or elsewhere.
Status Unavailable(const std::string& message);
Status DeadlineExceeded(const std::string& message);
// A stale fence or version: the caller has been superseded.
Status Aborted(const std::string& message);
Status Cancelled(const std::string& message);
// Stored data is damaged: stop, fall back.
Status DataLoss(const std::string& message);
// Does not fit, or slow down.
Status ResourceExhausted(const std::string& message);
Status PermissionDenied(const std::string& message);
Status Unauthenticated(const std::string& message);
Status Unimplemented(const std::string& message);
// Our own mistake.
Status Internal(const std::string& message);

// Translates an errno value: "WHAT PATH: No such file or directory (ENOENT)" with the code that
// tells the reaction (ENOSPC and EMFILE are RESOURCE_EXHAUSTED, EIO is DATA_LOSS, EINTR, EAGAIN and
// refused or broken connections are UNAVAILABLE, unknown values are INTERNAL). `error` must not be
// 0.
Status FromErrno(std::string_view what, std::string_view path = {}, int error = errno);

// `status` with "CONTEXT: " before its message; OK stays OK. The code does not change.
Status Annotate(const Status& status, const std::string& context);

// The message as a std::string (status.message() is an absl::string_view).
inline std::string Message(const Status& status) { return std::string(status.message()); }

namespace status_internal {

[[noreturn]] void CheckFailed(const char* file, int line, const char* condition,
                              const std::string& detail);

inline Status ToStatus(const Status& status) { return status; }
inline Status ToStatus(Status&& status) { return std::move(status); }
template <typename T>
Status ToStatus(const StatusOr<T>& value) {
  return value.status();
}

template <typename T>
concept HasToText = requires(const T& value) {
  { ToText(value) } -> std::convertible_to<std::string>;
};
template <typename T>
concept CharRange = requires(const T& value) {
  { value.data() } -> std::convertible_to<const char*>;
  { value.size() } -> std::convertible_to<size_t>;
};

template <typename T>
void AppendNumber(std::string& out, T value) {
  char buffer[64];
  const std::to_chars_result end = std::to_chars(buffer, buffer + sizeof(buffer), value);
  out.append(buffer, end.ptr);
}

template <typename T>
void Append(std::string& out, const T& value) {
  if constexpr (HasToText<T>) {
    out += ToText(value);
  } else if constexpr (std::is_same_v<T, bool>) {
    out += value ? "true" : "false";
  } else if constexpr (std::is_same_v<T, char>) {
    out.push_back(value);
  } else if constexpr (std::is_same_v<T, Status>) {
    out += value.ToString();
  } else if constexpr (std::is_enum_v<T>) {
    AppendNumber(out, static_cast<std::underlying_type_t<T>>(value));
  } else if constexpr (std::is_arithmetic_v<T>) {
    AppendNumber(out, value);
  } else if constexpr (CharRange<T>) {
    out.append(value.data(), value.size());
  } else {
    out += value;  // const char*, char arrays
  }
}

}  // namespace status_internal

// Concatenates strings, numbers (round-trip precision), bools, Status and every type with a
// ToText(T) found by argument-dependent lookup.
template <typename... Parts>
std::string Str(const Parts&... parts) {
  std::string out;
  (status_internal::Append(out, parts), ...);
  return out;
}

}  // namespace heddle

#define HEDDLE_STATUS_CONCAT_INNER(a, b) a##b
#define HEDDLE_STATUS_CONCAT(a, b) HEDDLE_STATUS_CONCAT_INNER(a, b)

// Returns from the function if `expr`, a Status or StatusOr, is not OK.
#define RETURN_IF_ERROR(expr)                                                                  \
  do {                                                                                         \
    if (::heddle::Status status_ = ::heddle::status_internal::ToStatus(expr); !status_.ok()) { \
      return status_;                                                                          \
    }                                                                                          \
  } while (false)

// ASSIGN_OR_RETURN(T x, Make()): declares or assigns from a StatusOr, or returns its error. Several
// statements: put braces around it in an `if`.
#define ASSIGN_OR_RETURN(lhs, expr) \
  HEDDLE_ASSIGN_OR(lhs, expr, return, HEDDLE_STATUS_CONCAT(status_or_, __LINE__))

// The same in coroutines. `expr` must be `co_await F(named_or_moved)` or a plain call (S33).
#define CO_RETURN_IF_ERROR(expr)                                          \
  do {                                                                    \
    ::heddle::Status status_ = ::heddle::status_internal::ToStatus(expr); \
    if (!status_.ok()) {                                                  \
      co_return status_;                                                  \
    }                                                                     \
  } while (false)
#define CO_ASSIGN_OR_RETURN(lhs, expr) \
  HEDDLE_ASSIGN_OR(lhs, expr, co_return, HEDDLE_STATUS_CONCAT(status_or_, __LINE__))

#define HEDDLE_ASSIGN_OR(lhs, expr, leave, temporary) \
  auto temporary = (expr);                            \
  if (!temporary.ok()) {                              \
    leave std::move(temporary).status();              \
  }                                                   \
  lhs = *std::move(temporary)

// Stops the process for our own mistakes, in release too; never for wire, disk or user input.
// HEDDLE_CHECK(cond) or HEDDLE_CHECK(cond, "text ", value...).
#define HEDDLE_CHECK(cond, ...)                                           \
  do {                                                                    \
    if (!(cond)) [[unlikely]] {                                           \
      ::heddle::status_internal::CheckFailed(__FILE__, __LINE__, #cond,   \
                                             ::heddle::Str(__VA_ARGS__)); \
    }                                                                     \
  } while (false)
