// Start, and what follows an error of the store (control-plane D7, D8, D10, N4).
#include <dirent.h>
#include <sys/stat.h>

#include <algorithm>
#include <boost/asio/post.hpp>
#include <charconv>
#include <filesystem>
#include <fstream>

#include "base/log/log.h"
#include "coordinator/runtime/coordinator.h"
#include "coordinator/runtime/records.h"
#include "coordinator/state/invariants.h"

namespace heddle::runtime {
namespace {

std::string RandomBytes(size_t count) {
  std::string bytes(count, '\0');
  std::ifstream("/dev/urandom", std::ios::binary)
      .read(bytes.data(), static_cast<std::streamsize>(count));
  return bytes;
}

std::string NewUuid() {
  std::string bytes = RandomBytes(16);
  bytes[6] = static_cast<char>((bytes[6] & 0x0F) | 0x40);
  bytes[8] = static_cast<char>((bytes[8] & 0x3F) | 0x80);
  static const char* const kDigits = "0123456789abcdef";
  std::string text;
  for (size_t i = 0; i < bytes.size(); ++i) {
    text += (i == 4 || i == 6 || i == 8 || i == 10) ? "-" : "";
    text += kDigits[static_cast<unsigned char>(bytes[i]) >> 4];
    text += kDigits[static_cast<unsigned char>(bytes[i]) & 15];
  }
  return text;
}

uint64_t HighestTerm(const std::string& folder) {
  uint64_t highest = 0;
  DIR* dir = opendir(folder.c_str());
  for (dirent* entry = dir == nullptr ? nullptr : readdir(dir); entry != nullptr;
       entry = readdir(dir)) {
    const std::string name = entry->d_name;
    uint64_t term = 0;
    const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), term);
    if (error == std::errc() && end == name.data() + name.size()) {
      highest = std::max(highest, term);
    }
  }
  if (dir != nullptr) {
    closedir(dir);
  }
  return highest;
}

}  // namespace

Status Coordinator::Start() {
  RETURN_IF_ERROR(OpenJournal());
  RETURN_IF_ERROR(ClaimTerm());
  RETURN_IF_ERROR(store::RestoreBallast(options_.state_dir, options_.disk));
  return Recover();
}

Status Coordinator::OpenJournal() {
  store::RocksLogOptions options;
  options.dir = options_.state_dir;
  options.repair = options_.repair;
  options.deliver = [this](std::function<void()> closure) {
    boost::asio::post(io_, std::move(closure));
  };
  ASSIGN_OR_RETURN(log_, store::RocksLog::Open(std::move(options)));
  return OkStatus();
}

// A folder per term: a coordinator on restored, older state finds a higher one and stops (N4).
Status Coordinator::ClaimTerm() {
  const std::string folder = Str(options_.checkpoint_root, "/TERM");
  RETURN_IF_ERROR(store::MakeFolders(folder));
  const uint64_t highest = HighestTerm(folder);
  if (highest >= log_->term()) {
    return FailedPrecondition(Str("the checkpoint root ", options_.checkpoint_root,
                                  " has seen term ", highest, ", this state folder is at ",
                                  log_->term(),
                                  ": it is an old copy, or another coordinator uses this root"));
  }
  const std::string mine = Str(folder, "/", log_->term());
  if (mkdir(mine.c_str(), 0700) != 0) {
    return FromErrno("cannot claim the term with", mine);
  }
  for (const auto& entry : std::filesystem::directory_iterator(folder)) {
    if (entry.path().filename() != Str(log_->term())) {  // only the highest one counts
      std::error_code ignored;
      std::filesystem::remove(entry.path(), ignored);
    }
  }
  return OkStatus();
}

Status Coordinator::Recover() {
  ASSIGN_OR_RETURN(state_, LoadState(*log_));
  for (const std::string& breach : state::CheckInvariants(state_)) {
    return Internal(Str("the stored state breaks an invariant, nothing was changed: ", breach));
  }
  const int64_t steady_ms = clock_.NowSteady() / 1'000'000;
  time_offset_ms_ = std::max(clock_.NowWallMs(), state_.newest_ms()) - steady_ms;
  ++generation_;
  appended_ = durable_ = 0;
  const uint64_t seen = durable_seq_;
  durable_seq_ = state_.next_seq() - 1;
  last_points_.clear();
  last_steps_.clear();
  leases_.emplace(options_.leases, Now().ms);
  awaited_workers_.clear();
  for (const auto& [id, node] : state_.nodes()) {
    if (node.record->state() != v1::WORKER_STATE_LEFT) {
      leases_->Recovered(id, node.record->session(), Now().ms);
    }
    if (!node.booked.empty() && node.record->state() != v1::WORKER_STATE_LOST) {
      awaited_workers_.insert(id);
    }
  }
  awaited_at_start_ = awaited_workers_.size();
  const uint64_t newest_job = state_.jobs().empty() ? 0 : state_.jobs().rbegin()->first;
  job_ids_.emplace(0, JobId{newest_job});
  rendezvous_.Load(log_.get(), [this](Fence fence) {
    const v1::AttemptRecord* attempt = state_.attempt_of(fence);
    return attempt != nullptr && attempt->state() != v1::ATTEMPT_STATE_FENCING &&
           attempt->state() != v1::ATTEMPT_STATE_ENDED;
  });
  RETURN_IF_ERROR(PublishUnseen(seen + 1));
  poisoned_ = false;
  state::event::CoordinatorStarted started;
  started.term = Term{static_cast<uint32_t>(log_->term())};
  started.cluster_id = NewUuid();
  started.secret = RandomBytes(16);
  Execute(std::move(started), [](const state::Outcome&) {});
  HEDDLE_INFO("recovered", {"term", log_->term()}, {"jobs", state_.jobs().size()},
              {"workers", state_.nodes().size()}, {"events", durable_seq_});
  return OkStatus();
}

// A batch whose sync failed may be in the log all the same: followers that outlived the store's
// failure get its events now. At a start nobody follows yet.
Status Coordinator::PublishUnseen(uint64_t from_seq) {
  if (event_sinks_.empty()) {
    return OkStatus();
  }
  ASSIGN_OR_RETURN(const std::vector<v1::EventRecord> unseen,
                   runtime::ReadEvents(*log_, from_seq, durable_seq_, 0, SIZE_MAX));
  Publish(unseen);
  return OkStatus();
}

// Nothing after the last durable batch was ever shown: it is thrown away, and its callers learn
// that nobody knows (R12).
void Coordinator::Poison(const Status& why) {
  if (poisoned_) {
    return;
  }
  HEDDLE_ERROR("the store failed: no change is acknowledged until it is open again",
               {"error", why});
  poisoned_ = true;
  ++generation_;
  std::deque<Release> waiting = std::move(releases_);
  releases_.clear();
  StatusOr<state::State> durable = LoadState(*log_);
  if (durable.ok()) {
    state_ = *std::move(durable);
  } else {
    HEDDLE_ERROR("what is durable cannot be read now", {"error", durable.status()});
  }
  for (const Release& release : waiting) {
    release.run(Unavailable("the coordinator's store failed; repeat with the same request id"));
  }
}

void Coordinator::TryReopen() {
  const StatusOr<store::DiskSpace> space = store::FreeSpace(options_.state_dir);
  if (!space.ok() || space->free_bytes < options_.disk.reopen_bytes) {
    const Status dropped = store::DropBallast(options_.state_dir);
    HEDDLE_WARN("waiting for free space to reopen the store",
                {"free_bytes", space.ok() ? space->free_bytes : 0}, {"ballast", dropped});
    const StatusOr<store::DiskSpace> now = store::FreeSpace(options_.state_dir);
    if (!now.ok() || now->free_bytes < options_.disk.reopen_bytes) {
      return;
    }
  }
  log_.reset();
  Status opened = OpenJournal();
  if (opened.ok()) {
    opened = ClaimTerm();
  }
  if (opened.ok()) {
    opened = Recover();
  }
  if (!opened.ok()) {
    HEDDLE_ERROR("the store cannot be reopened yet", {"error", opened});
    poisoned_ = true;
    return;
  }
  // What workers said meanwhile was refused without a word: they register anew and say it again.
  for (const auto& [worker, stream] : streams_) {
    SendTo(worker, [](v1::CoordMsg* message) {
      message->mutable_stale()->set_reason("the coordinator opened its store again");
    });
  }
}

void Coordinator::CheckDisk() {
  const StatusOr<store::DiskSpace> space = store::FreeSpace(options_.state_dir);
  const StatusOr<store::DiskSpace> root = store::FreeSpace(options_.checkpoint_root);
  if (!space.ok() || !root.ok()) {
    return;
  }
  const bool before = figures_.read_only;
  figures_.free_disk_bytes = std::min(space->free_bytes, root->free_bytes);
  figures_.read_only =
      store::IsReadOnly(*space, options_.disk) || store::IsReadOnly(*root, options_.disk);
  if (before != figures_.read_only) {
    if (figures_.read_only) {
      HEDDLE_WARN("READ_ONLY: the disk is nearly full; running jobs go on, nothing new starts",
                  {"free_bytes", figures_.free_disk_bytes});
    } else {
      HEDDLE_INFO("the disk has room again", {"free_bytes", figures_.free_disk_bytes});
      (void)store::RestoreBallast(options_.state_dir, options_.disk);  // tried again next time
    }
  }
}

}  // namespace heddle::runtime
