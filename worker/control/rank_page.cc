#include "worker/control/rank_page.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstddef>
#include <cstring>

namespace heddle::control {
namespace {

constexpr char kPageMagic[8] = {'H', 'D', 'L', 'P', 'A', 'G', 'E', '1'};
constexpr char kContactMagic[8] = {'H', 'D', 'L', 'C', 'N', 'T', 'C', '1'};
// A writer that died inside a write leaves an odd version; readers then give up.
constexpr int kReadAttempts = 4096;

enum class Part { kNone, kCompute, kData, kDisk };
constexpr struct {
  uint32_t number;
  Part part;
} kPhases[] = {
#define HEDDLE_PHASE(number, name, text, part) {number, Part::part},
#include "base/rank_words/words.def"
};

// What a rank waits in these is taken off the time that it computes (training-runtime.md 17.4); the
// waits of an evaluation or a save were never counted in it.
bool CountsWaits(uint32_t phase) {
  for (const auto& one : kPhases) {
    if (one.number == phase) return one.part == Part::kCompute;
  }
  return false;
}

// Values guarded by a version: odd while they change. One writer, any readers.
struct SeqLock {
  std::atomic<uint64_t> version;

  template <typename Write>
  void Write_(Write write) {
    const uint64_t odd = version.load(std::memory_order_relaxed) | 1;
    version.store(odd, std::memory_order_relaxed);
    std::atomic_thread_fence(std::memory_order_release);
    write();
    version.store(odd + 1, std::memory_order_release);
  }

  template <typename Read>
  bool Read_(Read read) const {
    for (int i = 0; i < kReadAttempts; ++i) {
      const uint64_t before = version.load(std::memory_order_acquire);
      if (before & 1) continue;
      read();
      std::atomic_thread_fence(std::memory_order_acquire);
      if (version.load(std::memory_order_relaxed) == before) return true;
    }
    return false;
  }
};

// Gives the file its size with every block behind it: a store into a hole of a mapping has no way
// to fail but SIGBUS once the disk is full. 0 or an errno.
int Allocate(int fd, size_t size) {
  int error = EINTR;
  while (error == EINTR) error = posix_fallocate(fd, 0, static_cast<off_t>(size));
  return error;
}

// Maps `size` bytes of the file; makes and sizes it when O_CREAT is among `flags`. A file that
// exists must have at least `needed` of them; what is missing is not to be touched.
void* MapFile(const std::string& path, int flags, size_t size, size_t needed, size_t* found) {
  const int fd = open(path.c_str(), flags | O_RDWR | O_CLOEXEC | O_NOFOLLOW, 0600);
  if (fd < 0) return nullptr;
  struct stat info = {};
  void* mapped = MAP_FAILED;
  int error = (flags & O_CREAT) ? Allocate(fd, size) : 0;
  if (error != 0) {
    unlink(path.c_str());  // made just now, and of no use to anybody
  } else if (fstat(fd, &info) != 0) {
    error = errno;
  } else if (info.st_size < static_cast<off_t>(needed)) {
    error = EINVAL;
  } else {
    *found = static_cast<size_t>(info.st_size);
    mapped = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    error = errno;
  }
  close(fd);
  errno = error;
  return mapped == MAP_FAILED ? nullptr : mapped;
}

}  // namespace

int64_t BootTimeNs() {
  timespec now = {};
  clock_gettime(CLOCK_BOOTTIME, &now);
  return int64_t{now.tv_sec} * 1'000'000'000 + now.tv_nsec;
}

struct RankPage::Layout {
  char magic[8];
  uint64_t reserved[7];
  struct alignas(64) {
    SeqLock lock;
    std::atomic<uint64_t> fence;
    std::atomic<int64_t> deadline_ns;
  } permit;
  struct alignas(64) {
    SeqLock lock;
    std::atomic<uint64_t> step;
    std::atomic<uint32_t> phase;
    std::atomic<int64_t> at_ns;
  } progress;
  struct alignas(64) {
    std::atomic<uint64_t> head;
  } ring_state;
  alignas(4096) CollectiveEntry ring[kRingEntries];
  // Not in pages of ranks that an older version started; those end here.
  struct alignas(4096) Tail {
    std::atomic<uint64_t> phase_ns[kPhaseSlots];
    std::atomic<uint64_t> waited_ns;
    std::atomic<int64_t> waiting_since_ns;  // 0: not in a wait
    std::atomic<int32_t> unit;              // 1 + the number; 0 none
    struct alignas(64) {
      std::atomic<uint32_t> allowed;
      std::atomic<uint32_t> taken;
      struct {
        std::atomic<uint32_t> count;  // written last; 0: not there
        std::atomic<uint32_t> thread;
        std::atomic<uint64_t> frames[kStackFrames];
      } threads[kStackThreads];
    } stacks;
  } tail;
};

std::unique_ptr<RankPage> RankPage::Map(const std::string& path, int flags) {
  size_t found = 0;
  void* mapped = MapFile(path, flags, sizeof(Layout), offsetof(Layout, tail), &found);
  if (mapped == nullptr) return nullptr;
  Layout* layout = static_cast<Layout*>(mapped);
  if (flags & O_CREAT) std::memcpy(layout->magic, kPageMagic, sizeof(kPageMagic));
  if (std::memcmp(layout->magic, kPageMagic, sizeof(kPageMagic)) != 0) {
    munmap(mapped, sizeof(Layout));
    errno = EINVAL;
    return nullptr;
  }
  return std::unique_ptr<RankPage>(new RankPage(layout, found >= sizeof(Layout)));
}

std::unique_ptr<RankPage> RankPage::Create(const std::string& path) {
  return Map(path, O_CREAT | O_EXCL);
}
std::unique_ptr<RankPage> RankPage::Open(const std::string& path) { return Map(path, 0); }
RankPage::~RankPage() { munmap(layout_, sizeof(Layout)); }

void RankPage::PublishPermit(const Permit& permit) {
  layout_->permit.lock.Write_([&] {
    layout_->permit.fence.store(permit.fence, std::memory_order_relaxed);
    layout_->permit.deadline_ns.store(permit.deadline_ns, std::memory_order_relaxed);
  });
}

Permit RankPage::ReadPermit() const {
  Permit permit;
  const bool whole = layout_->permit.lock.Read_([&] {
    permit.fence = layout_->permit.fence.load(std::memory_order_relaxed);
    permit.deadline_ns = layout_->permit.deadline_ns.load(std::memory_order_relaxed);
  });
  return whole ? permit : Permit{};
}

bool RankPage::HoldsPermit(uint64_t fence) const {
  const Permit permit = ReadPermit();
  return permit.fence == fence && BootTimeNs() < permit.deadline_ns;
}

void RankPage::PublishProgress(const Progress& progress) {
  const uint32_t left = layout_->progress.phase.load(std::memory_order_relaxed);
  const int64_t since = layout_->progress.at_ns.load(std::memory_order_relaxed);
  if (has_tail_ && since > 0 && progress.at_ns > since && left < kPhaseSlots) {
    layout_->tail.phase_ns[left].fetch_add(static_cast<uint64_t>(progress.at_ns - since),
                                           std::memory_order_relaxed);
  }
  layout_->progress.lock.Write_([&] {
    layout_->progress.step.store(progress.step, std::memory_order_relaxed);
    layout_->progress.phase.store(progress.phase, std::memory_order_relaxed);
    layout_->progress.at_ns.store(progress.at_ns, std::memory_order_relaxed);
  });
}

Progress RankPage::ReadProgress() const {
  Progress progress;
  const bool whole = layout_->progress.lock.Read_([&] {
    progress.step = layout_->progress.step.load(std::memory_order_relaxed);
    progress.phase = layout_->progress.phase.load(std::memory_order_relaxed);
    progress.at_ns = layout_->progress.at_ns.load(std::memory_order_relaxed);
  });
  return whole ? progress : Progress{};
}

CollectiveEntry* RankPage::ring() { return layout_->ring; }
const CollectiveEntry* RankPage::ring() const { return layout_->ring; }
std::atomic<uint64_t>& RankPage::ring_head() { return layout_->ring_state.head; }

CollectiveEntry RankPage::NewestCollective() const {
  CollectiveEntry entry = {};
  const uint64_t head = layout_->ring_state.head.load(std::memory_order_acquire);
  if (head != 0) entry = layout_->ring[head % kRingEntries];
  // Overwritten while it was copied: only by a rank that launches thousands meanwhile.
  return entry.seq == head ? entry : CollectiveEntry{};
}

void RankPage::BeginWait() {
  if (has_tail_) layout_->tail.waiting_since_ns.store(BootTimeNs(), std::memory_order_relaxed);
}

void RankPage::EndWait() {
  if (!has_tail_) return;
  const int64_t since = layout_->tail.waiting_since_ns.exchange(0, std::memory_order_relaxed);
  if (!CountsWaits(layout_->progress.phase.load(std::memory_order_relaxed))) return;
  layout_->tail.waited_ns.fetch_add(static_cast<uint64_t>(BootTimeNs() - since),
                                    std::memory_order_relaxed);
}

void RankPage::NoteUnit(int32_t unit) {
  if (has_tail_) layout_->tail.unit.store(unit + 1, std::memory_order_relaxed);
}

Activity RankPage::ReadActivity() const {
  Activity activity;
  if (!has_tail_) return activity;
  const Layout::Tail& tail = layout_->tail;
  const Progress progress = ReadProgress();
  const int64_t now = BootTimeNs();
  for (uint32_t i = 0; i < kPhaseSlots; ++i) {
    activity.phase_ns[i] = tail.phase_ns[i].load(std::memory_order_relaxed);
  }
  if (progress.at_ns > 0 && progress.at_ns < now && progress.phase < kPhaseSlots) {
    activity.phase_ns[progress.phase] += static_cast<uint64_t>(now - progress.at_ns);
  }
  activity.waited_ns = tail.waited_ns.load(std::memory_order_relaxed);
  const int64_t since = tail.waiting_since_ns.load(std::memory_order_relaxed);
  activity.waiting = since != 0;
  if (activity.waiting && since < now && CountsWaits(progress.phase))
    activity.waited_ns += static_cast<uint64_t>(now - since);
  activity.unit = tail.unit.load(std::memory_order_relaxed) - 1;
  return activity;
}

void RankPage::AllowStackSignal() {
  if (has_tail_) layout_->tail.stacks.allowed.store(1, std::memory_order_release);
}
bool RankPage::StackSignalAllowed() const {
  return has_tail_ && layout_->tail.stacks.allowed.load(std::memory_order_acquire) != 0;
}

void RankPage::BeginStacks() {
  if (!has_tail_) return;
  for (auto& thread : layout_->tail.stacks.threads) thread.count.store(0);
  layout_->tail.stacks.taken.store(0);
}

void RankPage::AddStack(uint32_t thread, void* const* frames, size_t count) {
  if (!has_tail_) return;
  const uint32_t index = layout_->tail.stacks.taken.fetch_add(1);
  if (index >= kStackThreads) return;
  auto& slot = layout_->tail.stacks.threads[index];
  if (count > kStackFrames) count = kStackFrames;
  slot.thread.store(thread, std::memory_order_relaxed);
  for (size_t i = 0; i < count; ++i) {
    slot.frames[i].store(reinterpret_cast<uint64_t>(frames[i]), std::memory_order_relaxed);
  }
  slot.count.store(static_cast<uint32_t>(count), std::memory_order_release);
}

std::vector<ThreadStack> RankPage::ReadStacks() const {
  std::vector<ThreadStack> stacks;
  if (!has_tail_) return stacks;
  for (const auto& slot : layout_->tail.stacks.threads) {
    // The rank's own bytes: not to be trusted with a length.
    const size_t count = slot.count.load(std::memory_order_acquire);
    if (count == 0 || count > kStackFrames) continue;
    ThreadStack& stack = stacks.emplace_back();
    stack.thread = slot.thread.load(std::memory_order_relaxed);
    for (size_t i = 0; i < count; ++i) {
      stack.frames.push_back(slot.frames[i].load(std::memory_order_relaxed));
    }
  }
  return stacks;
}

struct ContactFile::Layout {
  char magic[8];
  std::atomic<int64_t> last_contact_ns;
  std::atomic<int64_t> max_orphan_ns;
};

std::unique_ptr<ContactFile> ContactFile::Map(const std::string& path, int flags) {
  size_t found = 0;
  void* mapped = MapFile(path, flags, sizeof(Layout), sizeof(Layout), &found);
  if (mapped == nullptr) return nullptr;
  Layout* layout = static_cast<Layout*>(mapped);
  if (flags & O_CREAT) std::memcpy(layout->magic, kContactMagic, sizeof(kContactMagic));
  if (std::memcmp(layout->magic, kContactMagic, sizeof(kContactMagic)) != 0) {
    munmap(mapped, sizeof(Layout));
    errno = EINVAL;
    return nullptr;
  }
  return std::unique_ptr<ContactFile>(new ContactFile(layout));
}

std::unique_ptr<ContactFile> ContactFile::Create(const std::string& path, int64_t max_orphan_ns) {
  std::unique_ptr<ContactFile> file = Map(path, O_CREAT | O_EXCL);
  if (file != nullptr) {
    file->SetMaxOrphan(max_orphan_ns);
    file->Refresh(BootTimeNs());
  }
  return file;
}
std::unique_ptr<ContactFile> ContactFile::Open(const std::string& path) { return Map(path, 0); }
ContactFile::~ContactFile() { munmap(layout_, sizeof(Layout)); }

void ContactFile::Refresh(int64_t contact_ns) { layout_->last_contact_ns.store(contact_ns); }
void ContactFile::SetMaxOrphan(int64_t max_orphan_ns) {
  layout_->max_orphan_ns.store(max_orphan_ns);
}
int64_t ContactFile::last_contact_ns() const { return layout_->last_contact_ns.load(); }
int64_t ContactFile::max_orphan_ns() const { return layout_->max_orphan_ns.load(); }

}  // namespace heddle::control
