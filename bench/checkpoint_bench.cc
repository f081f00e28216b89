// Saves of a rank's state beside what their parts cost at least:
//   bench_checkpoint DIR MIB
// Reads one word a line and answers each with one JSON line, so that other programs can take turns:
//   tensors  names and elements of the state's tensors, each with a master and two moments in fp32
//   copy     memcpy of all bytes into warm buffers, with one thread and with every core
//   raw      the same bytes to the disk of DIR, O_DIRECT and fsync, one and four writes in flight
//   save     the trainer's Checkpointer: what the step loop waits for, and until all is sealed
// The coordinator's answers come at once. Times are seconds.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <filesystem>
#include <functional>
#include <iostream>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/clock/clock.h"
#include "base/status/status.h"
#include "checkpoint/tensor_io/save.h"
#include "tests/worker/trainer/instant_control.h"
#include "worker/trainer/checkpointer.h"

namespace heddle::trainer {
namespace {

constexpr uint64_t kMatrixElements = uint64_t{4} << 20;
constexpr uint64_t kNormElements = 2048;
constexpr size_t kDirectBytes = size_t{8} << 20;  // of one write
constexpr size_t kPage = 4096;
constexpr heddle::v1::TensorClass kClasses[] = {heddle::v1::TENSOR_CLASS_MASTER,
                                                heddle::v1::TENSOR_CLASS_MOMENT1,
                                                heddle::v1::TENSOR_CLASS_MOMENT2};

double Now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

// Of all threads of this process.
double CpuSeconds() {
  timespec time{};
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) + 1e-9 * static_cast<double>(time.tv_nsec);
}

uint64_t NumberOf(const std::string& digits) {
  uint64_t value = 0;
  std::from_chars(digits.data(), digits.data() + digits.size(), value);
  return value;
}

class Bench {
 public:
  Bench(std::string dir, uint64_t mib) : dir_(std::move(dir)) {
    uint64_t left = (mib << 20) / (sizeof(float) * std::size(kClasses));
    for (int layer = 10; left > 0; ++layer) {  // two digits: in order of names
      left -= AddTensor(Str("layers.", layer, ".norm"), std::min(left, kNormElements));
      if (left > 0) {
        left -= AddTensor(Str("layers.", layer, ".weight"), std::min(left, kMatrixElements));
      }
    }
    StatusOr<std::vector<heddle::v1::TensorInfo>> numbered =
        checkpoint::NumberTensors(std::move(tensors_));
    HEDDLE_CHECK(numbered.ok());
    tensors_ = *std::move(numbered);
    for (const heddle::v1::TensorInfo& tensor : tensors_) {
      for (const heddle::v1::TensorClass tensor_class : kClasses) {
        AddValues(tensor, tensor_class);
      }
    }
    CheckpointerOptions options;
    options.root = Str(dir_, "/root");
    options.attempt_dir = "j-1/f1";
    options.fence = 1;
    options.tensors = tensors_;
    std::filesystem::create_directories(options.root);
    checkpointer_ = std::make_unique<Checkpointer>(&control_, &clock_, options);
  }

  void PrintTensors() const {
    std::printf("{\"bytes\": %lu, \"tensors\": [", bytes_);
    const char* comma = "";
    for (const heddle::v1::TensorInfo& tensor : tensors_) {
      std::printf("%s[\"%s\", %ld]", comma, tensor.name().c_str(),
                  static_cast<long>(tensor.shape(0)));
      comma = ", ";
    }
    std::printf("]}\n");
  }

  void Copy() {
    if (copies_.empty()) {
      for (const std::vector<float>& values : values_) copies_.push_back(values);  // warm
    }
    const double one = CopyWith(1);
    const size_t threads = std::max(1u, std::thread::hardware_concurrency());
    std::printf("{\"copy\": %.4f, \"copy_all_cores\": %.4f, \"threads\": %zu}\n", one,
                CopyWith(threads), threads);
  }

  Status Raw() {
    ASSIGN_OR_RETURN(const double one, RawWith(1));
    ASSIGN_OR_RETURN(const double four, RawWith(4));
    std::printf("{\"raw\": %.4f, \"raw_4_in_flight\": %.4f}\n", one, four);
    return OkStatus();
  }

  Status Save() {
    ++step_;
    for (std::vector<float>& values : values_) values[0] = static_cast<float>(step_);
    heddle::v1::TrainState state;
    state.set_step(step_);
    const double begin = Now();
    const double cpu = CpuSeconds();
    RETURN_IF_ERROR(checkpointer_->Stage(
        [this](checkpoint::Snapshot* snapshot) { return snapshot->Stage(tensors_, ranges_); },
        state));
    const double staged = Now();
    while (checkpointer_->busy()) {  // as a step loop would: an agreement a step
      Agreement agreement;
      checkpointer_->Fill(&agreement);
      checkpointer_->Apply(agreement);
      std::this_thread::sleep_for(std::chrono::milliseconds(1));
    }
    const double sealed = Now();
    const CheckpointerStats stats = checkpointer_->stats();
    if (stats.last_committed_step != step_) return Internal("the save was not committed");
    std::printf(
        "{\"stall\": %.4f, \"write\": %.4f, \"sealed\": %.4f, \"cpu\": %.4f, \"bytes\": %lu}\n",
        staged - begin, stats.last_write_seconds, sealed - begin, CpuSeconds() - cpu,
        stats.last_bytes);
    std::filesystem::remove_all(Str(dir_, "/root/j-1"));
    return OkStatus();
  }

 private:
  uint64_t AddTensor(const std::string& name, uint64_t elements) {
    heddle::v1::TensorInfo& tensor = tensors_.emplace_back();
    tensor.set_name(name);
    tensor.add_shape(static_cast<int64_t>(elements));
    for (const heddle::v1::TensorClass tensor_class : kClasses) tensor.add_classes(tensor_class);
    return elements;
  }

  void AddValues(const heddle::v1::TensorInfo& tensor, heddle::v1::TensorClass tensor_class) {
    std::vector<float>& values = values_.emplace_back(static_cast<size_t>(tensor.shape(0)));
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = 1e-3f * static_cast<float>((i * 2654435761u) & 0xffff);
    }
    ranges_.push_back({.tensor = tensor.id(),
                       .tensor_class = tensor_class,
                       .count = values.size(),
                       .data = values.data()});
    bytes_ += values.size() * sizeof(float);
  }

  double CopyWith(size_t threads) {
    const double begin = Now();
    std::vector<std::thread> others;
    const auto part = [this, threads](size_t thread) {
      for (size_t i = 0; i < values_.size(); ++i) {
        const size_t from = values_[i].size() * thread / threads;
        const size_t to = values_[i].size() * (thread + 1) / threads;
        std::memcpy(copies_[i].data() + from, values_[i].data() + from,
                    (to - from) * sizeof(float));
      }
    };
    for (size_t thread = 1; thread < threads; ++thread) others.emplace_back(part, thread);
    part(0);
    for (std::thread& other : others) other.join();
    return Now() - begin;
  }

  // The state in one piece, as O_DIRECT wants it. A block written again and again would come from a
  // processor's cache.
  const char* Aligned() {
    if (aligned_ == nullptr) {
      const size_t bytes = (bytes_ / kDirectBytes + 1) * kDirectBytes;
      aligned_.reset(static_cast<char*>(std::aligned_alloc(kPage, bytes)));
      size_t at = 0;
      for (const std::vector<float>& values : values_) {
        std::memcpy(aligned_.get() + at, values.data(), values.size() * sizeof(float));
        at += values.size() * sizeof(float);
      }
    }
    return aligned_.get();
  }

  // A new file, as a save's are.
  StatusOr<double> RawWith(size_t in_flight) {
    const std::string path = Str(dir_, "/raw");
    const char* const data = Aligned();
    const double begin = Now();
    const int fd = open(path.c_str(), O_CREAT | O_TRUNC | O_WRONLY | O_DIRECT | O_CLOEXEC, 0600);
    if (fd < 0) return FromErrno("open with O_DIRECT", path);
    const size_t writes = bytes_ / kDirectBytes;
    std::atomic<size_t> next = 0;
    std::atomic<int> error = 0;
    const auto write_some = [&] {
      for (size_t i = next++; i < writes; i = next++) {
        if (pwrite(fd, data + i * kDirectBytes, kDirectBytes,
                   static_cast<off_t>(i * kDirectBytes)) < 0) {
          error = errno;
        }
      }
    };
    std::vector<std::thread> others;
    for (size_t i = 1; i < in_flight; ++i) others.emplace_back(write_some);
    write_some();
    for (std::thread& other : others) other.join();
    if (fsync(fd) != 0) error = errno;
    const double seconds = Now() - begin;
    close(fd);
    unlink(path.c_str());
    errno = error;
    if (error != 0) return FromErrno("write with O_DIRECT", path);
    // Of as many bytes as the state has.
    return seconds * static_cast<double>(bytes_) / static_cast<double>(writes * kDirectBytes);
  }

  const std::string dir_;
  uint64_t bytes_ = 0;
  uint64_t step_ = 0;
  std::vector<heddle::v1::TensorInfo> tensors_;
  std::vector<std::vector<float>> values_;
  std::vector<std::vector<float>> copies_;
  std::unique_ptr<char, decltype(&std::free)> aligned_{nullptr, &std::free};
  std::vector<checkpoint::LocalRange> ranges_;
  SystemClock clock_;
  InstantControl control_;
  std::unique_ptr<Checkpointer> checkpointer_;
};

int Main(int argc, char** argv) {
  const uint64_t mib = argc == 3 ? NumberOf(argv[2]) : 0;
  if (mib < 16) {
    std::fprintf(stderr, "usage: bench_checkpoint DIR MIB   (at least 16)\n");
    return 2;
  }
  Bench bench(argv[1], mib);
  for (std::string word; std::getline(std::cin, word);) {
    Status done = OkStatus();
    if (word == "tensors") {
      bench.PrintTensors();
    } else if (word == "copy") {
      bench.Copy();
    } else if (word == "raw") {
      done = bench.Raw();
    } else if (word == "save") {
      done = bench.Save();
    } else {
      done = InvalidArgument(Str("no such word: ", word));
    }
    if (!done.ok()) {
      std::fprintf(stderr, "%s\n", Message(done).c_str());
      return 1;
    }
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace heddle::trainer

int main(int argc, char** argv) { return heddle::trainer::Main(argc, argv); }
