#include "worker/daemon/symbols.h"

#include <cxxabi.h>
#include <elf.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <memory>
#include <span>

#include "base/status/status.h"

namespace heddle::worker {
namespace {

// Templates have names of many lines; the beginning tells enough.
constexpr size_t kNameMax = 160;

std::string Hex(uint64_t value) {
  char text[24];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(value));
  return text;
}

std::string BaseName(const std::string& path) { return path.substr(path.rfind('/') + 1); }

std::string Demangled(const char* name) {
  int status = 0;
  std::unique_ptr<char, void (*)(void*)> text(abi::__cxa_demangle(name, nullptr, nullptr, &status),
                                              std::free);
  std::string result = status == 0 && text != nullptr ? text.get() : name;
  if (result.size() > kNameMax) {
    result.resize(kNameMax);
    result += "..";
  }
  return result;
}

// An ELF file in memory. Every offset in it is checked: a library may be replaced while we read.
class ElfFile {
 public:
  explicit ElfFile(const std::string& path) {
    const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    struct stat info = {};
    if (fd >= 0 && fstat(fd, &info) == 0 && info.st_size > 0) {
      void* mapped =
          mmap(nullptr, static_cast<size_t>(info.st_size), PROT_READ, MAP_PRIVATE, fd, 0);
      if (mapped != MAP_FAILED) {
        bytes_ = {static_cast<const char*>(mapped), static_cast<size_t>(info.st_size)};
      }
    }
    if (fd >= 0) close(fd);
  }
  ~ElfFile() {
    if (!bytes_.empty()) munmap(const_cast<char*>(bytes_.data()), bytes_.size());
  }
  ElfFile(const ElfFile&) = delete;
  ElfFile& operator=(const ElfFile&) = delete;

  struct Found {
    const char* name = nullptr;
    uint64_t start = 0;
  };
  // For each place, an offset in the file: the function around it.
  std::map<uint64_t, Found> FunctionsAt(const std::vector<uint64_t>& offsets) const {
    std::map<uint64_t, Found> by_offset;
    const Elf64_Ehdr* header = At<Elf64_Ehdr>(0, 1);
    if (header == nullptr || std::memcmp(header->e_ident, ELFMAG, SELFMAG) != 0 ||
        header->e_ident[EI_CLASS] != ELFCLASS64) {
      return by_offset;
    }
    std::map<uint64_t, uint64_t> offset_of;  // by address in the image
    for (const uint64_t offset : offsets) offset_of[AddressOf(*header, offset)] = offset;
    const Elf64_Shdr* sections = At<Elf64_Shdr>(header->e_shoff, header->e_shnum);
    for (size_t i = 0; sections != nullptr && i < header->e_shnum; ++i) {
      const Elf64_Shdr& section = sections[i];
      const bool symbols = section.sh_type == SHT_SYMTAB || section.sh_type == SHT_DYNSYM;
      if (!symbols || section.sh_link >= header->e_shnum) continue;
      SearchTable(section, sections[section.sh_link], offset_of, &by_offset);
    }
    return by_offset;
  }

 private:
  template <typename T>
  const T* At(uint64_t offset, uint64_t count) const {
    if (offset > bytes_.size() || count > (bytes_.size() - offset) / sizeof(T)) return nullptr;
    if (offset % alignof(T) != 0) return nullptr;
    return reinterpret_cast<const T*>(bytes_.data() + offset);
  }

  uint64_t AddressOf(const Elf64_Ehdr& header, uint64_t offset) const {
    const Elf64_Phdr* parts = At<Elf64_Phdr>(header.e_phoff, header.e_phnum);
    for (size_t i = 0; parts != nullptr && i < header.e_phnum; ++i) {
      if (parts[i].p_type == PT_LOAD && offset >= parts[i].p_offset &&
          offset - parts[i].p_offset < parts[i].p_filesz) {
        return offset - parts[i].p_offset + parts[i].p_vaddr;
      }
    }
    return offset;
  }

  void SearchTable(const Elf64_Shdr& table, const Elf64_Shdr& names,
                   const std::map<uint64_t, uint64_t>& offset_of,
                   std::map<uint64_t, Found>* found) const {
    const uint64_t count = table.sh_size / sizeof(Elf64_Sym);
    const Elf64_Sym* symbols = At<Elf64_Sym>(table.sh_offset, count);
    if (symbols == nullptr) return;
    for (const Elf64_Sym& symbol : std::span(symbols, count)) {
      if (ELF64_ST_TYPE(symbol.st_info) != STT_FUNC || symbol.st_size == 0) continue;
      for (auto it = offset_of.lower_bound(symbol.st_value);
           it != offset_of.end() && it->first < symbol.st_value + symbol.st_size; ++it) {
        const char* name = Text(names, symbol.st_name);
        if (name != nullptr) {
          (*found)[it->second] = {name, it->second - (it->first - symbol.st_value)};
        }
      }
    }
  }

  const char* Text(const Elf64_Shdr& section, uint64_t at) const {
    const char* all = At<char>(section.sh_offset, section.sh_size);
    if (all == nullptr || at >= section.sh_size) return nullptr;
    return std::memchr(all + at, 0, section.sh_size - at) == nullptr ? nullptr : all + at;
  }

  std::span<const char> bytes_;
};

}  // namespace

bool ParseMapping(const std::string& line, Mapping* mapping) {
  char mode[5] = {};
  unsigned long long begin = 0;
  unsigned long long end = 0;
  unsigned long long offset = 0;
  int path = 0;
  if (std::sscanf(line.c_str(), "%llx-%llx %4s %llx %*s %*s %n", &begin, &end, mode, &offset,
                  &path) < 4 ||
      path == 0 || static_cast<size_t>(path) >= line.size()) {
    return false;
  }
  mapping->begin = begin;
  mapping->end = end;
  mapping->offset = offset;
  mapping->file = line.substr(static_cast<size_t>(path));
  return mode[2] == 'x' && mapping->file.front() == '/';
}

std::vector<Mapping> ReadMappings(int pid) {
  std::vector<Mapping> mappings;
  std::ifstream file(Str("/proc/", pid, "/maps"));
  for (std::string line; std::getline(file, line);) {
    Mapping mapping;
    if (ParseMapping(line, &mapping)) mappings.push_back(std::move(mapping));
  }
  return mappings;
}

std::vector<std::string> NameAddresses(const std::vector<Mapping>& mappings,
                                       const std::vector<uint64_t>& addresses) {
  struct Place {
    const Mapping* mapping = nullptr;
    uint64_t offset = 0;
  };
  std::vector<Place> places;
  std::map<std::string, std::vector<uint64_t>> wanted;
  for (const uint64_t address : addresses) {
    Place& place = places.emplace_back();
    const uint64_t call = address == 0 ? 0 : address - 1;
    for (const Mapping& mapping : mappings) {
      if (call < mapping.begin || call >= mapping.end) continue;
      place = {&mapping, call - mapping.begin + mapping.offset};
      wanted[mapping.file].push_back(place.offset);
    }
  }
  std::map<std::string, std::unique_ptr<ElfFile>> files;
  std::map<std::string, std::map<uint64_t, ElfFile::Found>> functions;
  for (const auto& [path, offsets] : wanted) {
    files[path] = std::make_unique<ElfFile>(path);
    functions[path] = files[path]->FunctionsAt(offsets);
  }
  std::vector<std::string> names;
  for (size_t i = 0; i < places.size(); ++i) {
    const Place& place = places[i];
    if (place.mapping == nullptr) {
      names.push_back(Hex(addresses[i]));
      continue;
    }
    const auto& known = functions[place.mapping->file];
    const auto function = known.find(place.offset);
    names.push_back(function == known.end()
                        ? Str(BaseName(place.mapping->file), "+", Hex(place.offset + 1))
                        : Str(Demangled(function->second.name), "+",
                              Hex(place.offset + 1 - function->second.start)));
  }
  return names;
}

}  // namespace heddle::worker
