// Assertions on Status and StatusOr that print the error. Our own, because absl's of this version
// has none (architecture S21).
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "base/status/status.h"

namespace heddle::test {

inline ::testing::AssertionResult IsOk(const char*, const Status& status) {
  if (status.ok()) {
    return ::testing::AssertionSuccess();
  }
  return ::testing::AssertionFailure() << status.ToString();
}

inline ::testing::AssertionResult StatusIs(const Status& status, StatusCode code,
                                           const std::string& part) {
  if (status.code() != code) {
    return ::testing::AssertionFailure()
           << "expected " << absl::StatusCodeToString(code) << ", is " << status.ToString();
  }
  if (Message(status).find(part) == std::string::npos) {
    return ::testing::AssertionFailure() << "no \"" << part << "\" in: " << status.ToString();
  }
  return ::testing::AssertionSuccess();
}

}  // namespace heddle::test

// `expr` is a Status or a StatusOr.
#define EXPECT_OK(expr) \
  EXPECT_PRED_FORMAT1(::heddle::test::IsOk, ::heddle::status_internal::ToStatus(expr))
#define ASSERT_OK(expr) \
  ASSERT_PRED_FORMAT1(::heddle::test::IsOk, ::heddle::status_internal::ToStatus(expr))

// EXPECT_STATUS(expr, StatusCode::kNotFound, "part of the message").
#define EXPECT_STATUS(expr, code, part) \
  EXPECT_TRUE(::heddle::test::StatusIs(::heddle::status_internal::ToStatus(expr), code, part))

#define ASSERT_OK_AND_ASSIGN(lhs, expr) \
  HEDDLE_ASSERT_OK_AND_ASSIGN(lhs, expr, HEDDLE_STATUS_CONCAT(status_or_, __LINE__))
#define HEDDLE_ASSERT_OK_AND_ASSIGN(lhs, expr, temporary) \
  auto temporary = (expr);                                \
  ASSERT_OK(temporary);                                   \
  lhs = *std::move(temporary)
