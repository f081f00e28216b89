#include "model/layers/tasks.h"

#include <ATen/Parallel.h>
#include <c10/core/InferenceMode.h>

#include <atomic>

#ifndef _OPENMP
#error "at::parallel_for is a plain loop without OpenMP (cmake/HeddleTorch.cmake)"
#endif

// LibTorch exports it where it is built with MKL; null elsewhere. Returns the value before; 0: as
// the process.
extern "C" __attribute__((weak)) int MKL_Set_Num_Threads_Local(int threads);

namespace heddle::layers {
namespace {

// Within a parallel region MKL runs on one thread but still cuts long sums for all of them, as long
// as it is not told otherwise.
class OneMklThread {
 public:
  OneMklThread()
      : before_(MKL_Set_Num_Threads_Local == nullptr ? 0 : MKL_Set_Num_Threads_Local(1)) {}
  ~OneMklThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(before_);
  }
  OneMklThread(const OneMklThread&) = delete;
  OneMklThread& operator=(const OneMklThread&) = delete;

 private:
  const int before_;
};

}  // namespace

void RunTasks(int64_t count, const std::function<void(int64_t task, int64_t thread)>& run) {
  if (count == 0) return;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, at::get_num_threads(), 1, [&](int64_t, int64_t) {
    const c10::InferenceMode no_graph;  // a property of the thread
    const OneMklThread one;
    for (int64_t task = next++; task < count; task = next++) run(task, at::get_thread_num());
  });
}

}  // namespace heddle::layers
