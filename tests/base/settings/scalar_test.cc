#include "base/settings/scalar.h"

#include <gtest/gtest.h>

#include "tests/support/status_matchers.h"

namespace heddle::settings {
namespace {

TEST(ParseInteger, TakesDecimalsOnly) {
  const v1::KeyOptions none;
  EXPECT_EQ(*ParseInteger("0", none), 0);
  EXPECT_EQ(*ParseInteger("-17", none), -17);
  EXPECT_EQ(*ParseInteger("9223372036854775807", none), INT64_MAX);
  for (const char* bad : {"", "-", "+1", "010", "-01", "0x10", "1_000", "1e3", "1.0", " 1", "1 ",
                          "yes", "9223372036854775808", "auto", "10m", "64MiB", "\u0661"}) {
    EXPECT_STATUS(ParseInteger(bad, none), StatusCode::kInvalidArgument, "") << bad;
  }
}

TEST(ParseInteger, TakesUnitsAndWordsWhereDeclared) {
  v1::KeyOptions options;
  options.set_zero_word("auto");
  EXPECT_EQ(*ParseInteger("auto", options), 0);
  options.set_unit(v1::KeyOptions::UNIT_DURATION_MS);
  EXPECT_EQ(*ParseInteger("1h30m", options), 5'400'000);
  EXPECT_EQ(*ParseInteger("1500", options), 1500);
  EXPECT_STATUS(ParseInteger("10 parsecs", options), StatusCode::kInvalidArgument, "duration");
  options.set_unit(v1::KeyOptions::UNIT_BYTES);
  EXPECT_EQ(*ParseInteger("64MiB", options), 64 << 20);
  EXPECT_STATUS(ParseInteger("64 apples", options), StatusCode::kInvalidArgument, "bytes");
}

TEST(ParseNumber, TakesFiniteDecimals) {
  EXPECT_EQ(*ParseNumber("3e-4"), 3e-4);
  EXPECT_EQ(*ParseNumber("-0.5"), -0.5);
  EXPECT_EQ(*ParseNumber(".5"), 0.5);
  EXPECT_EQ(*ParseNumber("5."), 5);
  EXPECT_EQ(*ParseNumber("1E+3"), 1000);
  for (const char* bad : {"", ".", "-", "1e", "1e+", "01.5", "+1", "nan", ".nan", "inf", ".inf",
                          "-inf", "1e400", "0x1p3", "1,5", "1_0", "1.2.3"}) {
    EXPECT_STATUS(ParseNumber(bad), StatusCode::kInvalidArgument, "") << bad;
  }
}

TEST(ParseBool, TakesTwoWords) {
  EXPECT_TRUE(*ParseBool("true"));
  EXPECT_FALSE(*ParseBool("false"));
  for (const char* bad : {"yes", "no", "on", "True", "1", ""}) {
    EXPECT_STATUS(ParseBool(bad), StatusCode::kInvalidArgument, "needs true or false") << bad;
  }
}

TEST(ParseTime, TakesUtcAndOffsets) {
  EXPECT_EQ(*ParseTime("1970-01-01T00:00:00Z"), 0);
  EXPECT_EQ(*ParseTime("2026-11-20T23:30:00Z"), 1'795'217'400'000);
  EXPECT_EQ(*ParseTime("2026-11-21T00:30:00+01:00"), 1'795'217'400'000);
  EXPECT_EQ(*ParseTime("2026-11-20T18:00:00-05:30"), 1'795'217'400'000);
  for (const char* bad :
       {"", "2026-11-20", "2026-13-20T00:00:00Z", "2026-02-30T00:00:00Z", "2026-11-20T24:00:00Z",
        "2026-11-20 23:30:00Z", "2026-11-20T23:30:00", "2026-11-20T23:30:00+1:00", "tomorrow"}) {
    EXPECT_STATUS(ParseTime(bad), StatusCode::kInvalidArgument, "needs a time") << bad;
  }
}

}  // namespace
}  // namespace heddle::settings
