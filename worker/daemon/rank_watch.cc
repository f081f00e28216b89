#include "worker/daemon/rank_watch.h"

#include <poll.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <map>
#include <utility>

#include "base/rank_words/rank_words.h"
#include "base/status/status.h"
#include "worker/control/rank_page.h"
#include "worker/control/task_files.h"
#include "worker/daemon/launch_plan.h"
#include "worker/daemon/process_probe.h"
#include "worker/daemon/symbols.h"

namespace heddle::worker {
namespace {

constexpr size_t kReportBytesMax = 8 * 1024;
constexpr int kAnswerMs = 250;
constexpr int kLookMs = 10;
constexpr size_t kFramesShown = 24;

int64_t AgeMs(int64_t since_ns, int64_t now_ns) {
  return since_ns > 0 && since_ns < now_ns ? (now_ns - since_ns) / 1'000'000 : 0;
}

// The signal goes to threads one by one: a handler cannot list them.
void SignalThreads(const RankTarget& target, const std::vector<ThreadState>& threads) {
  for (const ThreadState& thread : threads) {
    if (!IsSameProcess(target.pid, target.start_ticks)) return;  // the number is another's by now
    syscall(SYS_tgkill, target.pid, thread.thread, SIGUSR2);
  }
}

std::map<int, std::vector<uint64_t>> AskForStacks(const RankTarget& target,
                                                  const std::vector<ThreadState>& threads) {
  std::map<int, std::vector<uint64_t>> stacks;
  const bool deaf = threads.empty() || threads.front().state == "T" ||
                    threads.front().state == "t" || threads.front().state == "Z";
  if (deaf || !target.page->StackSignalAllowed()) return stacks;
  target.page->BeginStacks();
  SignalThreads(target, threads);
  for (int waited = 0; waited < kAnswerMs && stacks.size() < threads.size(); waited += kLookMs) {
    poll(nullptr, 0, kLookMs);
    for (const control::ThreadStack& stack : target.page->ReadStacks()) {
      stacks[static_cast<int>(stack.thread)] = stack.frames;
    }
  }
  return stacks;
}

std::string ThreadLine(const ThreadState& thread) {
  return Str("thread ", thread.thread, " ", thread.name, " ", thread.state,
             thread.wait.empty() ? "" : " in ", thread.wait,
             thread.syscall.empty() || thread.syscall == "running" ? "" : ", syscall ",
             thread.syscall == "running" ? std::string() : thread.syscall,
             thread.kernel.empty() ? "" : ", kernel ", thread.kernel, "\n");
}

}  // namespace

RankWatch::RankWatch(TaskFolder* folder)
    : folder_(folder), seen_(static_cast<size_t>(folder->assignment().ranks_size())) {}

void RankWatch::OnSpawned(size_t local, int pid) {
  Seen& seen = seen_[local];
  seen.pid = pid;
  seen.start_ticks = control::ProcessStartTicks(pid);
}

void RankWatch::OnEnded(size_t local) { seen_[local].ended = true; }

std::vector<v1::RankHead> RankWatch::Heads() {
  std::vector<v1::RankHead> heads;
  if (IsCommand(folder_->assignment())) return heads;
  for (size_t local = 0; local < seen_.size(); ++local) {
    if (seen_[local].pid != 0) heads.push_back(Head(local));
  }
  return heads;
}

v1::RankHead RankWatch::Head(size_t local) {
  Seen& seen = seen_[local];
  const control::RankPage& page = *folder_->page(local);
  const control::Progress progress = page.ReadProgress();
  const control::CollectiveEntry newest = page.NewestCollective();
  const control::Activity activity = page.ReadActivity();
  const int64_t now = control::BootTimeNs();
  v1::RankHead head;
  head.set_rank(folder_->assignment().ranks(static_cast<int>(local)));
  head.set_step(progress.step);
  head.set_phase(progress.phase);
  head.set_phase_age_ms(AgeMs(progress.at_ns, now));
  head.set_seq(newest.seq);
  if (newest.seq != 0) {
    head.set_op(newest.op);
    head.set_count(newest.count);
    head.set_unit(newest.unit);
    head.set_fingerprint(newest.fingerprint);
    head.set_group(newest.group);
    head.set_age_ms(AgeMs(newest.launched_ns, now));
  }
  head.set_waiting(activity.waiting);
  for (const uint64_t ns : activity.phase_ns) head.add_phase_ns(ns);
  head.set_waited_ns(activity.waited_ns);
  if (!seen.ended && IsSameProcess(seen.pid, seen.start_ticks)) {
    head.set_process_state(ProcessState(seen.pid));
    seen.peak_bytes = std::max(seen.peak_bytes, PeakResidentBytes(seen.pid));
  }
  return head;
}

int64_t RankWatch::layers() const { return folder_->assignment().config().model().n_layers(); }

uint64_t RankWatch::step(size_t local) const { return folder_->page(local)->ReadProgress().step; }

std::string RankWatch::Doing(size_t local) const {
  if (IsCommand(folder_->assignment())) return "";
  const control::RankPage& page = *folder_->page(local);
  const control::Progress progress = page.ReadProgress();
  if (progress.at_ns == 0) return "";
  const control::Activity activity = page.ReadActivity();
  const control::CollectiveEntry newest = page.NewestCollective();
  const std::string unit = UnitText(activity.unit, layers());
  return Str("in ", PhaseText(progress.phase), unit.empty() ? "" : " of ", unit, " at step ",
             progress.step,
             activity.waiting && newest.seq != 0
                 ? Str(", waiting in ", CollectiveText(newest.seq, newest.op,
                                                       static_cast<int64_t>(newest.unit), layers()))
                 : std::string());
}

std::vector<RankTarget> RankWatch::Targets() const {
  std::vector<RankTarget> targets;
  if (IsCommand(folder_->assignment())) return targets;
  for (size_t local = 0; local < seen_.size(); ++local) {
    const Seen& seen = seen_[local];
    if (seen.pid == 0 || seen.ended) continue;
    targets.push_back({.rank = folder_->assignment().ranks(static_cast<int>(local)),
                       .pid = seen.pid,
                       .start_ticks = seen.start_ticks,
                       .page = folder_->page(local)});
  }
  return targets;
}

std::string DescribeStacks(const RankTarget& target) {
  if (!IsSameProcess(target.pid, target.start_ticks)) return "the process is gone\n";
  const std::vector<ThreadState> threads = ThreadsOf(target.pid, control::kStackThreads);
  const std::map<int, std::vector<uint64_t>> stacks = AskForStacks(target, threads);
  const std::vector<Mapping> mappings =
      stacks.empty() ? std::vector<Mapping>() : ReadMappings(target.pid);
  // One search per file for all threads: the tables of libraries are long.
  std::vector<uint64_t> addresses;
  for (const auto& [thread, frames] : stacks) {
    const size_t shown = std::min(frames.size(), kFramesShown);
    addresses.insert(addresses.end(), frames.begin(),
                     frames.begin() + static_cast<ptrdiff_t>(shown));
  }
  const std::vector<std::string> names = NameAddresses(mappings, addresses);
  std::map<uint64_t, std::string> name_of;
  for (size_t i = 0; i < addresses.size(); ++i) name_of[addresses[i]] = names[i];
  std::string text;
  for (const ThreadState& thread : threads) {
    text += ThreadLine(thread);
    const auto stack = stacks.find(thread.thread);
    if (stack == stacks.end()) continue;
    const size_t shown = std::min(stack->second.size(), kFramesShown);
    for (size_t i = 0; i < shown; ++i) text += Str("  ", name_of[stack->second[i]], "\n");
  }
  if (text.size() > kReportBytesMax) text.resize(kReportBytesMax);
  return text;
}

}  // namespace heddle::worker
