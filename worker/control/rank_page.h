// The page a rank shares with its worker, one file per rank, and the contact file of its task
// (control-plane X1, L4, L5). The daemon writes the permit and the contact, the trainer writes its
// progress and the ring of collectives, the shim reads the contact. Only the standard library.
//
// Times are CLOCK_BOOTTIME in nanoseconds: it runs on through suspend and never steps.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <string>

namespace heddle::control {

// Now on CLOCK_BOOTTIME.
int64_t BootTimeNs();

struct Permit {
  uint64_t fence = 0;
  int64_t deadline_ns = 0;
};

// What a rank does at the moment; written before each phase of a step (training-runtime 17.1).
struct Progress {
  uint64_t step = 0;
  uint32_t phase = 0;
  int64_t at_ns = 0;
};

// One collective; written by the trainer, read for hang reports.
struct CollectiveEntry {
  uint64_t seq;
  uint32_t group;
  uint16_t op;
  uint16_t dtype;
  uint64_t count;
  uint64_t unit;
  uint64_t fingerprint;
  int64_t launched_ns;
  int64_t started_ns;
  int64_t ended_ns;
};
inline constexpr uint32_t kRingEntries = 4096;

// One mapped page file. Every accessor is wait-free and safe between threads and processes; one
// process writes each part.
class RankPage {
 public:
  // Makes the file (mode 0600, zeroed, all of its blocks allocated) or opens an existing one.
  // nullptr with errno set on failure (EINVAL: not a page of ours; ENOSPC: no file is left).
  static std::unique_ptr<RankPage> Create(const std::string& path);
  static std::unique_ptr<RankPage> Open(const std::string& path);
  ~RankPage();
  RankPage(const RankPage&) = delete;
  RankPage& operator=(const RankPage&) = delete;

  void PublishPermit(const Permit& permit);
  Permit ReadPermit() const;
  // May a checkpoint file of `fence` be written now? Check before each file, 64 MiB and seal (L4).
  bool HoldsPermit(uint64_t fence) const;

  void PublishProgress(const Progress& progress);
  Progress ReadProgress() const;

  // kRingEntries entries, used as seq % kRingEntries. The last written seq is `ring_head`.
  CollectiveEntry* ring();
  const CollectiveEntry* ring() const;
  std::atomic<uint64_t>& ring_head();

 private:
  struct Layout;
  explicit RankPage(Layout* layout) : layout_(layout) {}
  static std::unique_ptr<RankPage> Map(const std::string& path, int flags);

  Layout* layout_;
};

// When the daemon last heard the coordinator, and how long ranks may outlive that (L5). The shim
// kills its ranks when it is over; ranks have no access to this file.
class ContactFile {
 public:
  static std::unique_ptr<ContactFile> Create(const std::string& path, int64_t max_orphan_ns);
  static std::unique_ptr<ContactFile> Open(const std::string& path);
  ~ContactFile();
  ContactFile(const ContactFile&) = delete;
  ContactFile& operator=(const ContactFile&) = delete;

  void Refresh(int64_t contact_ns);
  void SetMaxOrphan(int64_t max_orphan_ns);
  int64_t last_contact_ns() const;
  int64_t max_orphan_ns() const;
  // BootTimeNs() at which the task becomes an orphan.
  int64_t deadline_ns() const { return last_contact_ns() + max_orphan_ns(); }

 private:
  struct Layout;
  explicit ContactFile(Layout* layout) : layout_(layout) {}
  static std::unique_ptr<ContactFile> Map(const std::string& path, int flags);

  Layout* layout_;
};

}  // namespace heddle::control
