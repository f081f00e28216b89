// What /proc tells about a process that may be stopped, stuck or gone (training-runtime.md 17.2).
// Every answer is a moment's; a process that ends meanwhile gives empty ones. Blocking reads of
// /proc only.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace heddle::worker {

// Letter of /proc/PID/stat: R running, S sleeping, D in the kernel, T stopped, t traced, Z dead;
// empty: no such process.
std::string ProcessState(int pid);
// Highest resident memory so far, bytes; 0: unknown. Without the pages of files that are mapped
// now, of libraries above all: the memory plan does not count them, and they are given back.
uint64_t PeakResidentBytes(int pid);

struct ThreadState {
  int thread = 0;
  std::string name;
  std::string state;    // letter as above
  std::string wait;     // function of the kernel it sleeps in; empty: none or not shown
  std::string kernel;   // "a < b < c": where it is in the kernel, for root only; else empty
  std::string syscall;  // its number and first arguments, "running", or empty where not allowed
};
// The main thread first, at most `limit`.
std::vector<ThreadState> ThreadsOf(int pid, size_t limit);

// The process with this pid is the one that started then (field 22 of stat).
bool IsSameProcess(int pid, uint64_t start_ticks);

}  // namespace heddle::worker
