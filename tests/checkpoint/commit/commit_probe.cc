// One checkpoint commit as the product does it, in one process that a test can kill at any system
// call: the real shard writer for every rank, the real coverage check, one synced batch in the
// coordinator's real store. Used by kill_points_test.py.
//
//   commit_probe save DIR FENCE STEP    stops itself (SIGSTOP) before the first byte, goes on when
//                                       continued; prints "acked STEP" once the commit is durable
//   commit_probe check DIR FENCE STEP   loads every committed checkpoint, then saves another one;
//                                       prints {"records":N,"torn":N,"loadable":N,"newest":STEP}
#include <signal.h>
#include <sys/prctl.h>
#include <unistd.h>

#include <charconv>
#include <condition_variable>
#include <cstdio>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status/status.h"
#include "checkpoint/catalog/coverage.h"
#include "checkpoint/catalog/tensors.h"
#include "checkpoint/format/verify.h"
#include "checkpoint/tensor_io/load.h"
#include "checkpoint/tensor_io/save.h"
#include "coordinator/store/rocks_log.h"
#include "heddle/v1/checkpoints.pb.h"

namespace heddle::checkpoint {
namespace {

using heddle::v1::CheckpointRecord;
using heddle::v1::TensorInfo;

constexpr uint32_t kRanks = 2;
constexpr uint64_t kElements = 3000;

std::vector<TensorInfo> Tensors() {
  std::vector<TensorInfo> tensors;
  for (const char* name : {"a", "b", "c"}) {
    TensorInfo info;
    info.set_name(name);
    info.add_shape(kElements);
    info.add_classes(heddle::v1::TENSOR_CLASS_MASTER);
    info.add_classes(heddle::v1::TENSOR_CLASS_MOMENT1);
    tensors.push_back(info);
  }
  return *NumberTensors(tensors);
}

// Values tell the step, so that a load of another step's bytes is seen.
std::vector<float> ValuesOf(uint64_t step) {
  std::vector<float> values(kElements);
  for (uint64_t i = 0; i < kElements; ++i) {
    values[i] = static_cast<float>(step * 10000 + i);
  }
  return values;
}

StatusOr<CheckpointRecord> WriteShards(const std::string& root, uint64_t fence, uint64_t step) {
  CheckpointRecord record;
  record.set_job(1);
  record.set_fence(fence);
  record.set_step(step);
  record.set_world_size(kRanks);
  record.set_dir(StepDir(Str("j-probe/f", fence), step));
  const std::vector<TensorInfo> tensors = Tensors();
  const std::vector<float> values = ValuesOf(step);
  std::vector<LocalRange> whole;
  for (const TensorInfo& tensor : tensors) {
    *record.add_tensors() = tensor;
    for (const int tensor_class : tensor.classes()) {
      whole.push_back({.tensor = tensor.id(),
                       .tensor_class = static_cast<heddle::v1::TensorClass>(tensor_class),
                       .first = 0,
                       .count = kElements,
                       .data = values.data()});
    }
  }
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    Snapshot snapshot;
    RETURN_IF_ERROR(snapshot.Stage(tensors, ReplicaShare(tensors, whole, rank, kRanks)));
    ShardWriterOptions options;
    options.root = root;
    options.dir = record.dir();
    options.header.set_job(1);
    options.header.set_fence(fence);
    options.header.set_step(step);
    options.header.set_rank(rank);
    options.header.set_world_size(kRanks);
    ASSIGN_OR_RETURN(const std::vector<heddle::v1::ShardFile> files, snapshot.Write(options));
    heddle::v1::RankSeal* seal = record.add_seals();
    seal->set_rank(rank);
    for (const heddle::v1::ShardFile& file : files) {
      *seal->add_files() = file;
    }
  }
  record.set_state(heddle::v1::CHECKPOINT_STATE_COMMITTED);
  return record;
}

std::string KeyOf(uint64_t fence, uint64_t step) {
  std::string key;
  store::AppendBigEndian64(&key, fence);
  store::AppendBigEndian64(&key, step);
  return key;
}

Status Commit(store::RocksLog* log, const CheckpointRecord& record) {
  RETURN_IF_ERROR(CheckCoverage(record));
  store::Batch batch;
  batch.Put(store::Family::kCheckpoints, KeyOf(record.fence(), record.step()),
            record.SerializeAsString());
  std::mutex mutex;
  std::condition_variable changed;
  std::optional<Status> done;
  RETURN_IF_ERROR(log->Append(std::move(batch), [&](StatusOr<store::CommitSeq> seq) {
    const std::lock_guard<std::mutex> lock(mutex);
    done = seq.status();
    changed.notify_all();
  }));
  std::unique_lock<std::mutex> lock(mutex);
  changed.wait(lock, [&] { return done.has_value(); });
  return *done;
}

StatusOr<std::unique_ptr<store::RocksLog>> OpenLog(const std::string& dir) {
  store::RocksLogOptions options;
  options.dir = dir + "/state";
  return store::RocksLog::Open(std::move(options));
}

Status Save(const std::string& dir, uint64_t fence, uint64_t step) {
  ASSIGN_OR_RETURN(const std::unique_ptr<store::RocksLog> log, OpenLog(dir));
  ASSIGN_OR_RETURN(const CheckpointRecord record, WriteShards(dir + "/checkpoints", fence, step));
  RETURN_IF_ERROR(Commit(log.get(), record));
  std::printf("acked %llu\n", static_cast<unsigned long long>(step));
  std::fflush(stdout);
  return OkStatus();
}

bool LoadsRight(const CheckpointRecord& record, const std::string& root) {
  if (!VerifyCheckpoint(record, root).good()) {
    return false;
  }
  const StatusOr<std::vector<Weight>> weights = ReadModelWeights(record, root);
  if (!weights.ok() || weights->size() != 3) {
    return false;
  }
  for (const Weight& weight : *weights) {
    if (weight.values != ValuesOf(record.step())) {
      return false;
    }
  }
  return true;
}

struct Found {
  int records = 0;
  int torn = 0;
  uint64_t newest = 0;
};

StatusOr<Found> LoadAll(store::RocksLog* log, const std::string& root) {
  Found found;
  RETURN_IF_ERROR(log->Scan(store::Family::kCheckpoints, "", "",
                            [&](const std::string&, const std::string& value) {
                              CheckpointRecord record;
                              ++found.records;
                              if (record.ParseFromString(value) && LoadsRight(record, root)) {
                                found.newest = std::max(found.newest, record.step());
                              } else {
                                ++found.torn;
                              }
                              return true;
                            }));
  return found;
}

Status Check(const std::string& dir, uint64_t fence, uint64_t step) {
  ASSIGN_OR_RETURN(const std::unique_ptr<store::RocksLog> log, OpenLog(dir));
  ASSIGN_OR_RETURN(const Found found, LoadAll(log.get(), dir + "/checkpoints"));
  // What a crash left behind must not stop the next attempt.
  ASSIGN_OR_RETURN(const CheckpointRecord next, WriteShards(dir + "/checkpoints", fence, step));
  RETURN_IF_ERROR(Commit(log.get(), next));
  ASSIGN_OR_RETURN(const Found after, LoadAll(log.get(), dir + "/checkpoints"));
  std::printf("{\"records\":%d,\"torn\":%d,\"loadable\":%d,\"newest\":%llu}\n", found.records,
              found.torn + after.torn, after.newest == step ? found.records - found.torn : 0,
              static_cast<unsigned long long>(found.newest));
  return OkStatus();
}

bool Number(std::string_view text, uint64_t* value) {
  const std::from_chars_result end =
      std::from_chars(text.data(), text.data() + text.size(), *value);
  return end.ec == std::errc() && end.ptr == text.data() + text.size();
}

}  // namespace
}  // namespace heddle::checkpoint

int main(int argc, char** argv) {
  const std::string_view verb = argc == 5 ? argv[1] : "";
  uint64_t fence = 0;
  uint64_t step = 0;
  if ((verb != "save" && verb != "check") || !heddle::checkpoint::Number(argv[3], &fence) ||
      !heddle::checkpoint::Number(argv[4], &step)) {
    std::fprintf(stderr, "usage: commit_probe save|check DIR FENCE STEP\n");
    return 2;
  }
  heddle::Status status;
  if (verb == "save") {
    prctl(PR_SET_PTRACER, PR_SET_PTRACER_ANY, 0, 0, 0);
    raise(SIGSTOP);
    status = heddle::checkpoint::Save(argv[2], fence, step);
  } else {
    status = heddle::checkpoint::Check(argv[2], fence, step);
  }
  if (!status.ok()) {
    std::fprintf(stderr, "commit_probe: %s\n", heddle::Message(status).c_str());
    return 1;
  }
  return 0;
}
