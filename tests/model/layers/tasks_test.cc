// LibTorch's loops are templates: compiled without OpenMP they are plain loops, and nothing else
// would tell.
#include "model/layers/tasks.h"

#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <thread>

namespace heddle::layers {
namespace {

// How many threads were inside `body` at a time, of two that wait for each other.
int Together(const std::function<void(const std::function<void()>& body)>& run_twice) {
  std::atomic<int> inside{0};
  std::atomic<int> most{0};
  run_twice([&] {
    const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(20);
    const int now = ++inside;
    if (now > most) most = now;
    while (most < 2 && std::chrono::steady_clock::now() < deadline) std::this_thread::yield();
    --inside;
  });
  return most;
}

class Threads : public testing::Test {
 protected:
  Threads() : before_(at::get_num_threads()) { at::set_num_threads(2); }
  ~Threads() override { at::set_num_threads(before_); }

 private:
  const int before_;
};

TEST_F(Threads, LoopsRunOnSeveral) {
  EXPECT_EQ(Together([](const std::function<void()>& body) {
              at::parallel_for(0, 2, 1, [&](int64_t begin, int64_t end) {
                for (int64_t i = begin; i < end; ++i) body();
              });
            }),
            2);
}

TEST_F(Threads, TasksRunOnSeveral) {
  EXPECT_EQ(Together([](const std::function<void()>& body) {
              RunTasks(2, [&](int64_t, int64_t) { body(); });
            }),
            2);
}

}  // namespace
}  // namespace heddle::layers
