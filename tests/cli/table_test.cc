#include "cli/output/table.h"

#include <gtest/gtest.h>

#include <cmath>

namespace heddle::cli {
namespace {

TEST(FormatTable, AlignsTextLeftNumbersRightByDisplayWidth) {
  EXPECT_EQ(FormatTable({"NAME", "STEP", "X"}, {{"a", "5", "-"}, {"\u00e9\u00e9b", "1200", "y"}}),
            "NAME  STEP  X\n"
            "a        5  -\n"
            "\u00e9\u00e9b   1200  y\n");
  EXPECT_EQ(FormatTable({"ID", "STATE"}, {}), "ID  STATE\n");
}

TEST(FormatAge, UsesTheTwoLargestUnits) {
  EXPECT_EQ(FormatAge(0), "-");
  EXPECT_EQ(FormatAge(-5), "-");
  EXPECT_EQ(FormatAge(12'999), "12s");
  EXPECT_EQ(FormatAge(185'000), "3m05s");
  EXPECT_EQ(FormatAge(7'800'000), "2h10m");
  EXPECT_EQ(FormatAge(356'400'000), "4d03h");
}

TEST(FormatTime, IsUtc) {
  EXPECT_EQ(FormatTime(1'795'217'400'123), "2026-11-20T23:30:00Z");
  EXPECT_EQ(FormatTime(0), "-");
}

TEST(FormatFixed, NeverPrintsNan) {
  EXPECT_EQ(FormatFixed(1.23456, 2), "1.23");
  EXPECT_EQ(FormatFixed(NAN, 2), "-");
  EXPECT_EQ(FormatFixed(INFINITY, 2), "-");
}

TEST(Printable, TakesTheTerminalsControlAway) {
  EXPECT_EQ(Printable("a\x1B[31mb\n\x7F"), "a?[31mb??");
  EXPECT_EQ(Printable("a\nb\tc\r", true), "a\nb\tc?");
  EXPECT_EQ(Printable("\u00e9"), "\u00e9");
}

}  // namespace
}  // namespace heddle::cli
