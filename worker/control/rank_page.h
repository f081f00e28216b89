// The page a rank shares with its worker, one file per rank, and the contact file of its task
// (control-plane X1, L4, L5). The daemon writes the permit and the contact, the trainer writes its
// progress and the ring of collectives, the shim reads the contact. Only the standard library.
//
// Times are CLOCK_BOOTTIME in nanoseconds: it runs on through suspend and never steps.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

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

// Phases are counted by their numbers in base/rank_words/words.def, below this.
inline constexpr uint32_t kPhaseSlots = 16;

// Where a rank's time went since its start, and what it waits for now (17.1, 17.4).
struct Activity {
  std::array<uint64_t, kPhaseSlots> phase_ns = {};  // the phase of now counts up to now
  uint64_t waited_ns = 0;  // waiting for collectives in phases that compute
  bool waiting = false;    // in such a wait now
  int32_t unit = -1;       // of the model, in the passes; -1 none
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

// Where one thread of the rank was when it was asked.
inline constexpr size_t kStackThreads = 32;
inline constexpr size_t kStackFrames = 48;
struct ThreadStack {
  uint32_t thread = 0;
  std::vector<uint64_t> frames;  // return addresses, the innermost first
};

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
  // The newest entry of the ring; seq 0: no collective yet.
  CollectiveEntry NewestCollective() const;

  // ---- time; zeros and no effect on a page of a version before these were kept ----
  // Around every wait for a collective, by the thread that waits.
  void BeginWait();
  void EndWait();
  void NoteUnit(int32_t unit);
  Activity ReadActivity() const;

  // ---- stacks; as above ----
  // The rank answers SIGUSR2 from here on (stack_dump.h); without this word the signal would end
  // it.
  void AllowStackSignal();
  bool StackSignalAllowed() const;
  // Daemon: throws earlier stacks away; then each thread that gets the signal adds its own.
  void BeginStacks();
  // Async-signal-safe. Beyond kStackThreads threads or kStackFrames frames the rest is left out.
  void AddStack(uint32_t thread, void* const* frames, size_t count);
  std::vector<ThreadStack> ReadStacks() const;

 private:
  struct Layout;
  RankPage(Layout* layout, bool has_tail) : layout_(layout), has_tail_(has_tail) {}
  static std::unique_ptr<RankPage> Map(const std::string& path, int flags);

  Layout* layout_;
  const bool has_tail_;
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
