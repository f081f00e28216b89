// Work that is cut by shape into tasks, each of them computed by one thread, matrix products
// included: the way to results that do not depend on the number of threads. LibTorch's products
// outside of tasks divide long sums by the threads they have.
#pragma once

#include <cstdint>
#include <functional>

namespace heddle::layers {

// run(task, thread) for every task in [0, count); threads take the next task when they are done
// with one, thread < the number of LibTorch's threads. Autograd is off in it. What tasks write must
// not overlap. Blocks until all are done.
void RunTasks(int64_t count, const std::function<void(int64_t task, int64_t thread)>& run);

}  // namespace heddle::layers
