// The bound as the kernel sees it: VmHWM while the set works through ten times its budget.
#include <gtest/gtest.h>

#include <charconv>
#include <fstream>
#include <iostream>

#include "base/units/units.h"
#include "tests/worker/offload/offload_test_util.h"

namespace heddle::offload {
namespace {

constexpr int64_t kBudgetBytes = 48 * kMiB;
// Stacks of threads, tables, checksums, gtest.
constexpr int64_t kBaseBytes = 4 * kMiB;

int64_t StatusBytes(const std::string& name) {
  std::ifstream file("/proc/self/status");
  for (std::string line; std::getline(file, line);) {
    if (!line.starts_with(name + ":")) continue;
    const size_t digits = line.find_first_of("0123456789");
    int64_t kib = 0;
    std::from_chars(line.data() + digits, line.data() + line.size(), kib);
    return kib * kKiB;
  }
  return 0;
}

// The mark from here on; false where the kernel does not allow that.
bool ResetHighWater() {
  std::ofstream file("/proc/self/clear_refs");
  file << "5" << std::flush;
  return file.good();
}

// One step of training with experts of two sizes: weights forward and backward, gradients, states.
void Train(ResidentSet& set, uint32_t slots, int step) {
  std::vector<ExpectedUse> uses;
  for (uint32_t slot = 0; slot < slots; ++slot) uses.push_back({{slot, Kind::kWeights}});
  for (uint32_t slot = slots; slot-- > 0;) {
    uses.push_back({{slot, Kind::kWeights}});
    uses.push_back({{slot, Kind::kGradient}, Access::kOverwrite});
  }
  for (uint32_t slot = 0; slot < slots; ++slot) {
    uses.push_back({{slot, Kind::kGradient}});
    uses.push_back({{slot, Kind::kState}, Access::kUpdate});
    uses.push_back({{slot, Kind::kWeights}, Access::kOverwrite});
  }
  ASSERT_OK(set.Expect(uses));
  for (const ExpectedUse& use : uses) {
    const Block block = use.block;
    const auto written = static_cast<uint64_t>(use.access == Access::kRead ? step - 1 : step);
    ASSERT_OK_AND_ASSIGN(std::byte* const data, set.Pin(block.slot, block.kind, use.access));
    auto* const first = reinterpret_cast<uint64_t*>(data);
    const uint64_t mark = block.slot * kKinds + static_cast<uint64_t>(block.kind);
    // Gradients are read in the step that wrote them.
    const bool gradient = block.kind == Kind::kGradient;
    if (use.access == Access::kRead && step > 1) {
      ASSERT_EQ(*first, mark + 1000 * (gradient ? written + 1 : written));
    }
    if (use.access == Access::kOverwrite) std::memset(data, step, 512 * kKiB);
    if (use.access != Access::kRead) *first = mark + 1000 * written;
    ASSERT_OK(set.Unpin(block.slot, block.kind));
  }
}

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr bool kShadowMemory = true;
#else
constexpr bool kShadowMemory = false;
#endif

class BoundTest : public ::testing::TestWithParam<const char*> {};

TEST_P(BoundTest, HighWaterMarkStaysWithinTheBudgetAndTenPercent) {
  const std::string name = GetParam();
  if (name == "io_uring") {
    if (const Status status = UringHere(); !status.ok()) GTEST_SKIP() << status.ToString();
  }
  std::vector<SlotBytes> slots;
  int64_t total = 0;
  for (int i = 0; i < 26; ++i) {
    const int64_t weights = i % 3 == 0 ? 3 * kMiB : 2 * kMiB + 100 * kKiB;
    slots.push_back({weights, 2 * weights, 6 * weights});
    total += 9 * weights;
  }
  ASSERT_GE(total, 10 * kBudgetBytes);
  const DiskDir dir;
  const BlockTable table = *BlockTable::Make(slots);
  ASSERT_TRUE(ResetHighWater()) << "/proc/self/clear_refs cannot be written here";
  const int64_t before = StatusBytes("VmHWM");
  StatusOr<std::unique_ptr<Home>> home = MakeHomeNamed(name, dir.path(), table);
  ASSERT_OK(home);
  ASSERT_OK_AND_ASSIGN(
      const std::unique_ptr<ResidentSet> set,
      ResidentSet::Create(table, {.budget_bytes = kBudgetBytes}, *std::move(home)));
  for (int step = 1; step <= 2 && !HasFatalFailure(); ++step) {
    Train(*set, static_cast<uint32_t>(slots.size()), step);
  }
  const int64_t growth = StatusBytes("VmHWM") - before;
  const ResidentSetStats stats = set->TakeStats();
  RecordProperty("growth_mib", static_cast<int>(growth / kMiB));
  EXPECT_LE(stats.peak_bytes, kBudgetBytes);
  EXPECT_GE(stats.bytes_read + stats.bytes_written, 10 * kBudgetBytes);
  if (kShadowMemory) GTEST_SKIP() << "the sanitizer's shadow memory counts in VmHWM";
  EXPECT_GE(growth, kBudgetBytes / 2) << "the budget was not used";
  EXPECT_LE(growth, kBudgetBytes + kBudgetBytes / 10 + kBaseBytes);
  std::cout << name << ": budget " << kBudgetBytes / kMiB << " MiB, growth of VmHWM "
            << static_cast<double>(growth) / kMiB << " MiB, read " << stats.bytes_read / kMiB
            << " MiB, written " << stats.bytes_written / kMiB << " MiB\n";
}

INSTANTIATE_TEST_SUITE_P(Homes, BoundTest, ::testing::Values("io_uring", "threads"),
                         [](const auto& home) { return std::string(home.param); });

}  // namespace
}  // namespace heddle::offload
