// Names for addresses inside another process: /proc/PID/maps says which file an address belongs to,
// the file's own symbol tables say which function. Reads files; needs no debugger and no help of
// the process, which may be stopped.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

namespace heddle::worker {

struct Mapping {
  uint64_t begin = 0;
  uint64_t end = 0;
  uint64_t offset = 0;  // of `begin` in the file
  std::string file;
};
// Mappings of files, executable parts only. Empty without the right to read them.
std::vector<Mapping> ReadMappings(int pid);
// One line of /proc/PID/maps; false: not executable, or not of a file.
bool ParseMapping(const std::string& line, Mapping* mapping);

// One text per address: "heddle::trainer::TrainLoop::Step()+0x1f2", else "libc.so.6+0x8ab3c", else
// "0x7f00". A return address is looked up as the call before it.
std::vector<std::string> NameAddresses(const std::vector<Mapping>& mappings,
                                       const std::vector<uint64_t>& addresses);

}  // namespace heddle::worker
