#include "base/units/units.h"

#include <gtest/gtest.h>

#include <chrono>
#include <limits>
#include <vector>

#include "tests/support/status_matchers.h"

namespace heddle {
namespace {

using std::chrono::nanoseconds;
using namespace std::chrono_literals;

TEST(Bytes, ParsesBinaryAndDecimalUnits) {
  const std::vector<std::pair<const char*, int64_t>> cases = {{"0", 0},
                                                              {"512", 512},
                                                              {"64MiB", 64 * kMiB},
                                                              {"64 mib", 64 * kMiB},
                                                              {"1.5GiB", 3 * kGiB / 2},
                                                              {"2kB", 2000},
                                                              {" 7B ", 7},
                                                              {"3TB", 3000000000000},
                                                              {"9223372036854775807", INT64_MAX}};
  for (const auto& [text, bytes] : cases) {
    ASSERT_OK_AND_ASSIGN(const int64_t parsed, ParseBytes(text));
    EXPECT_EQ(parsed, bytes) << text;
  }
}

TEST(Bytes, RefusesWhatIsNotAWholeNumberOfBytes) {
  for (const char* bad : {"", "MiB", "-1", "+1", "1.5", "1.B", ".5MiB", "1e3", "1 2", "12XB",
                          "9223372036854775808", "8388608TiB", "1.2.3MiB", "64MiB 2"}) {
    EXPECT_STATUS(ParseBytes(bad), StatusCode::kInvalidArgument, Str("\"", bad, "\"")) << bad;
  }
}

TEST(Bytes, FormatIsExactAndRoundTrips) {
  EXPECT_EQ(FormatBytes(0), "0B");
  EXPECT_EQ(FormatBytes(1536 * kMiB), "1536MiB");
  EXPECT_EQ(FormatBytes(1000), "1000B");
  for (const int64_t bytes : {int64_t{0}, int64_t{1}, int64_t{1023}, kKiB, kGiB + 1, kTiB * 2048,
                              std::numeric_limits<int64_t>::max()}) {
    ASSERT_OK_AND_ASSIGN(const int64_t parsed, ParseBytes(FormatBytes(bytes)));
    EXPECT_EQ(parsed, bytes);
  }
}

TEST(Bytes, ApproximateNeverShows1024OfAUnit) {
  EXPECT_EQ(ApproximateBytes(1023), "1023B");
  EXPECT_EQ(ApproximateBytes(kMiB - 1), "1MiB");
  EXPECT_EQ(ApproximateBytes(kGiB * 14 / 10), "1.4GiB");
  EXPECT_EQ(ApproximateBytes(kTiB * 3000), "3000TiB");
}

TEST(Duration, ParsesUnitsLargestFirst) {
  const std::vector<std::pair<const char*, nanoseconds>> cases = {{"10m", 10min},
                                                                  {"1h30m", 90min},
                                                                  {"250ms", 250ms},
                                                                  {"1.5s", 1500ms},
                                                                  {"2d", 48h},
                                                                  {"0", 0ns},
                                                                  {"1s5us7ns", 1s + 5us + 7ns}};
  for (const auto& [text, value] : cases) {
    ASSERT_OK_AND_ASSIGN(const nanoseconds parsed, ParseDuration(text));
    EXPECT_EQ(parsed, value) << text;
  }
}

TEST(Duration, RefusesMissingUnitsOrderRepeatsAndOverflow) {
  for (const char* bad :
       {"", "10", "-1s", "1m1h", "1s1s", "1 s", "1x", "1.5ns", "300000d", "s", "1s 2ms", "1.s"}) {
    EXPECT_STATUS(ParseDuration(bad), StatusCode::kInvalidArgument, Str("\"", bad, "\"")) << bad;
  }
}

TEST(Duration, FormatIsExactAndRoundTrips) {
  EXPECT_EQ(FormatDuration(90min), "1h30m");
  EXPECT_EQ(FormatDuration(0ns), "0s");
  EXPECT_EQ(FormatDuration(-1500ms), "-1s500ms");
  for (const nanoseconds value :
       std::vector<nanoseconds>{1ns, 999ns, 1s, 72h + 7us, nanoseconds::max()}) {
    ASSERT_OK_AND_ASSIGN(const nanoseconds parsed, ParseDuration(FormatDuration(value)));
    EXPECT_EQ(parsed, value);
  }
}

TEST(Duration, ApproximateKeepsTwoUnits) {
  EXPECT_EQ(ApproximateDuration(1h + 30min + 12s), "1h30m");
  EXPECT_EQ(ApproximateDuration(3min + 12s + 5ms), "3m12s");
  EXPECT_EQ(ApproximateDuration(450ms + 3us), "450ms");
  EXPECT_EQ(ApproximateDuration(12s + 345ms), "12s");
  EXPECT_EQ(ApproximateDuration(0ns), "0s");
}

}  // namespace
}  // namespace heddle
