#include "worker/daemon/process_probe.h"

#include <algorithm>
#include <charconv>
#include <filesystem>
#include <string_view>

#include "base/status/status.h"
#include "worker/control/task_files.h"

namespace heddle::worker {
namespace {

std::string FirstLine(const std::string& path) {
  std::string text;
  if (!control::ReadWholeFile(path, &text)) return "";
  return text.substr(0, text.find('\n'));
}

// The letter after the name in parentheses, which may itself hold anything.
std::string StateOf(const std::string& stat_path) {
  const std::string text = FirstLine(stat_path);
  const size_t end = text.rfind(')');
  return end == std::string::npos || end + 2 >= text.size() ? "" : text.substr(end + 2, 1);
}

// "0" and "running" of wchan and syscall mean that it runs.
std::string KernelWait(const std::string& path) {
  const std::string text = FirstLine(path);
  return text == "0" ? "" : text;
}

// Functions of the kernel from a file of lines "[<0>] do_signal_stop+0x1f/0x2e0", innermost first.
std::string KernelStack(const std::string& path) {
  constexpr int kShown = 6;
  std::string text;
  std::string stack;
  if (!control::ReadWholeFile(path, &text)) return stack;
  size_t at = 0;
  for (int i = 0; i < kShown && at < text.size(); ++i) {
    const size_t end = std::min(text.find('\n', at), text.size());
    const std::string line = text.substr(at, end - at);
    const size_t name = line.find("] ");
    if (name != std::string::npos) {
      const std::string function = line.substr(name + 2, line.find('+') - name - 2);
      stack += Str(stack.empty() ? "" : " < ", function);
    }
    at = end + 1;
  }
  return stack;
}

// A line "VmHWM:   1234 kB" of /proc/PID/status; 0: there is none.
uint64_t BytesOf(const std::string& status, std::string_view key) {
  size_t at = status.find(key);
  if (at == std::string::npos) return 0;
  at = status.find_first_of("0123456789", at + key.size());
  if (at == std::string::npos) return 0;
  uint64_t kib = 0;
  std::from_chars(status.data() + at, status.data() + status.size(), kib);
  return kib * 1024;
}

}  // namespace

std::string ProcessState(int pid) {
  return pid > 0 ? StateOf(Str("/proc/", pid, "/stat")) : std::string();
}

uint64_t PeakResidentBytes(int pid) {
  std::string text;
  if (pid <= 0 || !control::ReadWholeFile(Str("/proc/", pid, "/status"), &text)) return 0;
  const uint64_t peak = BytesOf(text, "VmHWM:");
  return peak - std::min(peak, BytesOf(text, "RssFile:"));
}

std::vector<ThreadState> ThreadsOf(int pid, size_t limit) {
  std::vector<int> numbers;
  std::error_code error;
  for (std::filesystem::directory_iterator entry(Str("/proc/", pid, "/task"), error), end;
       !error && entry != end; entry.increment(error)) {
    const std::string name = entry->path().filename().string();
    int number = 0;
    std::from_chars(name.data(), name.data() + name.size(), number);
    if (number > 0) numbers.push_back(number);
  }
  std::sort(numbers.begin(), numbers.end(),
            [pid](int a, int b) { return std::pair(a != pid, a) < std::pair(b != pid, b); });
  if (numbers.size() > limit) numbers.resize(limit);
  std::vector<ThreadState> threads;
  for (const int number : numbers) {
    const std::string folder = Str("/proc/", pid, "/task/", number);
    ThreadState& thread = threads.emplace_back();
    thread.thread = number;
    thread.name = FirstLine(folder + "/comm");  // the process's own word: any bytes
    std::replace_if(
        thread.name.begin(), thread.name.end(), [](char c) { return c < ' ' || c > '~'; }, '?');
    thread.state = StateOf(folder + "/stat");
    thread.wait = KernelWait(folder + "/wchan");
    thread.kernel = KernelStack(folder + "/stack");
    thread.syscall = FirstLine(folder + "/syscall");
    thread.syscall = thread.syscall.substr(0, 40);
  }
  return threads;
}

bool IsSameProcess(int pid, uint64_t start_ticks) {
  return pid > 0 && start_ticks != 0 && control::ProcessStartTicks(pid) == start_ticks;
}

}  // namespace heddle::worker
