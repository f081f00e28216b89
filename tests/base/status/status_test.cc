#include "base/status/status.h"

#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "base/status/errno_of.h"
#include "tests/support/status_matchers.h"

namespace heddle {
namespace {

struct Knot {
  int turns;
};
std::string ToText(const Knot& knot) { return Str("knot-", knot.turns); }

StatusOr<std::unique_ptr<int>> Half(int value) {
  if (value % 2 != 0) {
    return InvalidArgument(Str(value, " is odd"));
  }
  return std::make_unique<int>(value / 2);
}

StatusOr<int> Quarter(int value) {
  ASSIGN_OR_RETURN(std::unique_ptr<int> half, Half(value));
  ASSIGN_OR_RETURN(half, Half(*half));
  return *half;
}

Status CheckBoth(int a, int b, int* checked) {
  RETURN_IF_ERROR(Half(a));
  ++*checked;
  RETURN_IF_ERROR(Half(b).status());
  ++*checked;
  return OkStatus();
}

TEST(Status, AssignOrReturnMovesTheValueOrReturnsTheError) {
  ASSERT_OK_AND_ASSIGN(const int quarter, Quarter(12));
  EXPECT_EQ(quarter, 3);
  EXPECT_STATUS(Quarter(10), StatusCode::kInvalidArgument, "5 is odd");
}

TEST(Status, ReturnIfErrorStopsAtTheFirstErrorOnly) {
  int checked = 0;
  EXPECT_OK(CheckBoth(2, 4, &checked));
  EXPECT_EQ(checked, 2);
  checked = 0;
  EXPECT_STATUS(CheckBoth(2, 7, &checked), StatusCode::kInvalidArgument, "7 is odd");
  EXPECT_EQ(checked, 1);
}

TEST(Status, StrTakesNumbersTextAndOurTypes) {
  const std::string_view view("abc", 2);
  EXPECT_EQ(Str("a", view, std::string("z"), 'c', true, -7, uint64_t{18446744073709551615u}),
            "aabzctrue-718446744073709551615");
  EXPECT_EQ(Str(0.1, " ", 1e300, " ", 2.0f), "0.1 1e+300 2");
  EXPECT_EQ(Str(Knot{3}), "knot-3");
  EXPECT_EQ(Str(NotFound("no job")), "NOT_FOUND: no job");
  EXPECT_EQ(Str(NotFound("no job").message()), "no job");
  EXPECT_EQ(Str(), "");
}

TEST(Status, FromErrnoNamesTheActionThePathAndTheReaction) {
  EXPECT_STATUS(FromErrno("open", "/x/y", ENOENT), StatusCode::kNotFound,
                "open /x/y: No such file or directory (ENOENT)");
  EXPECT_EQ(FromErrno("write", "f", ENOSPC).code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(FromErrno("read", "f", EIO).code(), StatusCode::kDataLoss);
  EXPECT_EQ(ErrnoOf(Annotate(FromErrno("read", "f", EIO), "while loading")), EIO);
  EXPECT_EQ(ErrnoOf(DataLoss("read f: (EIO)")), 0);
  EXPECT_EQ(FromErrno("connect", "f", ECONNREFUSED).code(), StatusCode::kUnavailable);
  EXPECT_STATUS(FromErrno("ioctl", "", 99999), StatusCode::kInternal,
                "ioctl: unknown error (errno 99999)");
  errno = EACCES;
  EXPECT_EQ(FromErrno("open", "f").code(), StatusCode::kPermissionDenied);
}

TEST(Status, AnnotateKeepsTheCodeAndLeavesOkAlone) {
  EXPECT_STATUS(Annotate(Aborted("stale fence"), "commit"), StatusCode::kAborted,
                "commit: stale fence");
  EXPECT_OK(Annotate(OkStatus(), "commit"));
}

TEST(Status, MakersGiveTheirCodes) {
  EXPECT_EQ(Unavailable("x").code(), StatusCode::kUnavailable);
  EXPECT_EQ(DataLoss("x").code(), StatusCode::kDataLoss);
  EXPECT_EQ(ResourceExhausted("x").code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(FailedPrecondition("x").code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(DeadlineExceeded("x").code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(AlreadyExists("x").code(), StatusCode::kAlreadyExists);
  EXPECT_EQ(Internal("x").code(), StatusCode::kInternal);
}

TEST(StatusDeathTest, CheckNamesTheConditionAndTheValues) {
  const int ranks = 3;
  EXPECT_DEATH(HEDDLE_CHECK(ranks == 4, "ranks ", ranks), "status_test.cc:.*ranks == 4: ranks 3");
  HEDDLE_CHECK(ranks == 3);
}

}  // namespace
}  // namespace heddle
